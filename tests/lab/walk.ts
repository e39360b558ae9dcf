/**
 * Tells a walk through the tutorial, step by step: paragraphs, commands and
 * their output. It notes whatever turns out differently.
 *
 * @module
 */
import { parseArgs } from "@std/cli/parse-args";

/** One step. It finds the machines as the step before left them. */
export interface Step<World> {
  title: string;
  run: (world: World) => Promise<void>;
}

let isQuiet = false;
let misbehaved = 0;

/** Prints a paragraph. */
export function say(text: string): void {
  if (!isQuiet) console.log(text);
}

/** Prints a command with its prompt and its output. */
export function show(prompt: string, line: string, output: string): void {
  say(`\n${prompt}# ${line}`);
  if (output.trim()) say(output.trimEnd().replace(/^/gm, "  "));
}

/** Notes what turned out differently. The exit status will be 1. */
export function expect(isSo: boolean, what: string): void {
  if (isSo) return;
  misbehaved++;
  Deno.exitCode = 1;
  console.log(`UNEXPECTED: ${what}`);
}

/** Reads --step, --keep and --quiet, or prints the help. */
export function readFlags(help: string, steps: number) {
  const flags = parseArgs(Deno.args, {
    boolean: ["keep", "quiet", "help"],
    string: ["step"],
    unknown: (flag) => {
      console.error(`Unknown flag ${flag}\n\n${help}`);
      Deno.exit(2);
    },
  });
  if (flags.help) {
    console.log(help);
    Deno.exit(0);
  }
  isQuiet = flags.quiet;
  const last = Number(flags.step ?? steps);
  if (!Array.from({ length: steps }, (_, i) => i + 1).includes(last)) {
    console.error(`There is no step ${flags.step}\n\n${help}`);
    Deno.exit(2);
  }
  return { last, keep: flags.keep };
}

/** Runs the steps: a heading for each, or one line with --quiet. */
export async function walk<World>(
  steps: Step<World>[],
  world: World,
): Promise<void> {
  for (const [i, { title, run }] of steps.entries()) {
    const before = misbehaved;
    const heading = `Step ${i + 1}. ${title}`;
    say(`\n${heading}\n${"=".repeat(heading.length)}`);
    await run(world);
    if (isQuiet) {
      console.log(`${misbehaved === before ? "ok  " : "BAD "} ${heading}`);
    }
  }
}

/** Waits for Ctrl-C or SIGTERM. */
export async function untilCtrlC(): Promise<void> {
  console.log("\nCtrl-C here takes all of it down.");
  await new Promise<void>((resolve) => {
    for (const signal of ["SIGINT", "SIGTERM"] as const) {
      Deno.addSignalListener(signal, () => resolve());
    }
  });
}
