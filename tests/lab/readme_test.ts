/**
 * The README and the lab say the same: what stands behind a prompt is typed in
 * the lab that the README tells to open, and must answer as the README has it.
 *
 *     deno run -A tests/lab/readme_test.ts # writes the lab's answers into it
 *
 * @module
 */
import { assert, assertEquals } from "@std/assert";
import { existsSync } from "@std/fs/exists";
import { join } from "@std/path/posix/join";
import { ROOT } from "../setup/root.ts";
import { hear } from "./node.ts";

const README = join(ROOT, "README.md");
const LAB = ["run", "-A", join(ROOT, "tests/lab/tutorial.ts")];
const END = "-- end of an answer --";

/** A shell in the lab: what is typed there, line by line, and answered. */
class Shell {
  #child: Deno.ChildProcess;
  #writer: WritableStreamDefaultWriter<Uint8Array>;
  #reader: ReadableStreamDefaultReader<Uint8Array>;

  constructor(words: string) {
    const [program, ...args] = words.split(" ");
    this.#child = new Deno.Command(program, {
      ...{ args, stdin: "piped", stdout: "piped", stderr: "inherit" },
      env: { LC_ALL: "C.UTF-8" },
    }).spawn();
    this.#writer = this.#child.stdin.getWriter();
    this.#reader = this.#child.stdout.getReader();
  }

  async type(line: string): Promise<string> {
    const typed = `{ ${line}\n} 2>&1 < /dev/null; echo; echo "${END}"\n`;
    await this.#writer.write(new TextEncoder().encode(typed));
    const late = setTimeout(() => this.#child.kill(), 60_000);
    let text = "";
    while (!text.includes(END)) {
      const { value, done } = await this.#reader.read();
      if (done) throw new Error(`No end of the answer to: ${line}\n${text}`);
      text += new TextDecoder().decode(value);
    }
    clearTimeout(late);
    return text.slice(0, text.indexOf(END)).trimEnd();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#writer.close();
    await this.#reader.cancel();
    await this.#child.status;
  }
}

/** The lab as the README opens it, with a shell in each of its places. */
async function openLab() {
  const lab = new Deno.Command(Deno.execPath(), {
    args: [...LAB, "--step", "1", "--keep", "--quiet"],
    stdout: "piped",
  }).spawn();
  const said = await hear(lab.stdout, "Ctrl-C");
  const places = said.matchAll(/^ {2}(\S+) +(nsenter .*)$/gm);
  const shells = new Map(
    Array.from(places, ([, name, words]) => [name, new Shell(words)]),
  );
  const close = async () => {
    for (const shell of shells.values()) await shell[Symbol.asyncDispose]();
    lab.kill("SIGINT");
    await lab.stdout.cancel();
    await lab.status;
  };
  return { shells, [Symbol.asyncDispose]: close };
}

/** What is another each time gives way to a word. */
function normalize(text: string): string {
  return text
    .replaceAll(/\b[0-9a-f]{32}\b/g, "CONTAINERID")
    .replaceAll(/cni-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/g, "cni-NETNS")
    .replaceAll(
      /\b(?!0a:5[89]|ff:ff|00:00)([0-9a-f]{2}:){5}[0-9a-f]{2}\b/g,
      "MAC",
    )
    .replaceAll(/\d{4}-\d\d-\d\dT[\d:.]+Z/g, "TIME")
    .replaceAll(/\d\d:\d\d:\d\d\.\d+/g, "TIME")
    .replaceAll(/[\d.]+ ?ms\b/g, "MS")
    .replaceAll(/^rtt .*$/gm, "RTT")
    .replaceAll(/(seq|ack|id|val|ecr|length|win) \d+(:\d+)?/g, "$1 N")
    .replaceAll(/\.\d{5}( >|:)/g, ".PORT$1")
    .replaceAll(/[ \t]+$/gm, "");
}

/** Does an answer say what the README has, where … stands for any lines? */
function agrees(answer: string, expected: string): boolean {
  const escape = (text: string) =>
    text.replaceAll(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const parts = normalize(expected).split(/^…$/m).map(escape);
  return new RegExp(`^${parts.join("[^]*?")}$`).test(normalize(answer));
}

/** Types all that stands behind a prompt, and puts the answers in its place. */
async function rerun(readme: string) {
  await using lab = await openLab();
  const differences: string[] = [];
  let commands = 0;
  const parts = readme.split(/^(```console\n[^]*?^```\n)/m);
  for (const [i, part] of parts.entries()) {
    if (!part.startsWith("```console")) continue;
    const body = part.split("\n").slice(1, -2).join("\n");
    let text = "```console\n";
    for (const entry of body.split(/^(?=\w+# )/m)) {
      const [, place, line, , expected] =
        /^(\w+)# ((.*\\\n)*.*)\n?([^]*)$/.exec(entry) ?? [];
      const shell = lab.shells.get(place);
      if (!shell) throw new Error(`No such place in the lab: ${entry}`);
      const answer = await shell.type(line);
      commands++;
      const isSo = agrees(answer, expected.trimEnd());
      if (!isSo) {
        differences.push(`${place}# ${line}\n${answer}\n--- not:\n${expected}`);
      }
      const rest = isSo ? expected.trimEnd() : answer;
      text += `${place}# ${line}\n${rest && `${rest}\n`}`;
    }
    parts[i] = text + "```\n";
  }
  return { text: parts.join(""), commands, differences };
}

Deno.test("the README has what the lab answers", async () => {
  const { commands, differences } = await rerun(Deno.readTextFileSync(README));
  assert(commands > 40, `${commands} commands`);
  assertEquals(differences, [], differences.join("\n\n"));
});

Deno.test("the README's links and names lead somewhere", () => {
  const readme = Deno.readTextFileSync(README);
  const prose = readme.replaceAll(/^```[^]*?^```$/gm, "");
  const anchors = Array.from(
    prose.matchAll(/^#+ (.*)$/gm),
    ([, title]) =>
      "#" + title.toLowerCase().replaceAll(/[^\p{L}\p{N} _-]/gu, "")
        .replaceAll(" ", "-"),
  );
  assertEquals(new Set(anchors).size, anchors.length, "a title twice");
  const links = Array.from(prose.matchAll(/\]\(([^)]+)\)/g), ([, to]) => to);
  for (const to of links.filter((link) => !link.includes("://"))) {
    assert(
      to.startsWith("#") ? anchors.includes(to) : existsSync(join(ROOT, to)),
      `a link to ${to}`,
    );
  }
  const source = ["custom-cni.ts", "ipam.ts", "node-setup.ts"]
    .map((file) => Deno.readTextFileSync(join(ROOT, file))).join("");
  const names = prose.matchAll(/`(\w+)\(\)`/g);
  for (const [, name] of names) {
    assert(source.includes(`${name}(`), `${name}() is in no file`);
  }
});

if (import.meta.main) {
  const { text, differences } = await rerun(Deno.readTextFileSync(README));
  await Deno.writeTextFile(README, text);
  console.log(differences.join("\n\n"));
}
