/**
 * How a walk through the tutorial is told: step by step, in paragraphs, with
 * commands and what they wrote. What does not go as it was said is noted.
 *
 * @module
 */
import { parseArgs } from "@std/cli/parse-args";

/** A part of a walk; it finds the machines as the one before left them. */
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

/** Prints a command with its prompt and what it wrote. */
export function show(prompt: string, line: string, output: string): void {
  say(`\n${prompt}# ${line}`);
  if (output.trim()) say(output.trimEnd().replace(/^/gm, "  "));
}

/** Notes what did not go as it was said; the exit status will tell. */
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

/** Goes the steps, with a heading for each, or in short with a line. */
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

/** Waits for Ctrl-C, or for a kill. */
export async function untilCtrlC(): Promise<void> {
  console.log("\nCtrl-C here takes all of it down.");
  await new Promise<void>((resolve) => {
    for (const signal of ["SIGINT", "SIGTERM"] as const) {
      Deno.addSignalListener(signal, () => resolve());
    }
  });
}
