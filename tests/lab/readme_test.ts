/**
 * The READMEs are true. What stands behind a prompt is typed in the lab that the
 * file tells you to open, and the lab must answer as the file has it. The table
 * beside the script has what the plugin types. Every link leads somewhere.
 *
 *     deno run -A tests/lab/readme_test.ts # writes the lab's answers into them
 *     deno run -A tests/lab/readme_test.ts tests/lab/README.md # into this one
 *
 * @module
 */
import { assert, assertEquals } from "@std/assert";
import { existsSync } from "@std/fs/exists";
import { expandGlobSync } from "@std/fs/expand-glob";
import { dirname } from "@std/path/posix/dirname";
import { join } from "@std/path/posix/join";
import { relative } from "@std/path/posix/relative";
import { ROOT } from "../setup/root.ts";
import { conf, hear, Node } from "./node.ts";

const LAB = ["run", "-A", join(ROOT, "tests/lab/tutorial.ts")];
const END = "-- end of an answer --";

/** Files of the repository, by their paths in it. */
const find = (glob: string): string[] =>
  Array.from(
    expandGlobSync(glob, { root: ROOT }),
    ({ path }) => relative(ROOT, path),
  ).sort();

const READMES = ["README.md", ...find("tests/*/README.md")];

const read = (file: string) => Deno.readTextFileSync(join(ROOT, file));

const hasPrompts = (file: string) => /^```console$/m.test(read(file));

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

/** The lab as a README opens it, with a shell in each of its places. */
async function openLab(readme: string) {
  const [, flags] = /deno task lab (.*--keep)$/m.exec(readme)!;
  const lab = new Deno.Command(Deno.execPath(), {
    args: [...LAB, ...flags.split(" "), "--quiet"],
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

/** What differs from run to run, or between releases, gives way to a word. */
function normalize(text: string): string {
  return text
    .replaceAll(/\b[0-9a-f]{32}\b/g, "CONTAINERID")
    .replaceAll(/cni-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/g, "cni-NETNS")
    .replaceAll(
      /\b(?!0a:5[89]|ff:ff|00:00)([0-9a-f]{2}:){5}[0-9a-f]{2}\b/g,
      "MAC",
    )
    .replaceAll(/check-\d+-[ab]/g, "check-POD")
    .replaceAll(/\d{4}-\d\d-\d\dT[\d:.]+Z/g, "TIME")
    .replaceAll(/\d\d:\d\d:\d\d\.\d+/g, "TIME")
    .replaceAll(/[\d.]+ ?ms\b/g, "MS")
    .replaceAll(/(seq|ack|id|val|ecr|length|win) \d+(:\d+)?/g, "$1 N")
    .replaceAll(/\.\d{5}( >|:)/g, ".PORT$1")
    // "iptables -L": 1.8.9 has a protocol's number, the others have its name.
    .replaceAll(/^(\S+ +)(6|tcp)( +--)/gm, "$1tcp$3")
    // "ping -M do": those from 2024 on say it in other words.
    .replaceAll(
      /^ping: (local error: message too long, mtu=\d+|sendmsg: Message too long)$/gm,
      "ping: TOO LONG",
    )
    // Columns are as wide as the release likes.
    .replaceAll(/(?<=\S)[ \t]+/g, " ")
    .replaceAll(/[ \t]+$/gm, "");
}

/** Does an answer say what the README has, where … stands for any words? */
function agrees(answer: string, expected: string): boolean {
  const escape = (text: string) =>
    text.replaceAll(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const parts = normalize(expected).split("…").map(escape);
  return new RegExp(`^${parts.join("[^]*?")}$`).test(normalize(answer));
}

/** Types all that stands behind a prompt, and puts the answers in its place. */
async function rerun(readme: string) {
  await using lab = await openLab(readme);
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

for (const file of READMES.filter(hasPrompts)) {
  Deno.test(`${file} has what the lab answers`, async () => {
    const { commands, differences } = await rerun(read(file));
    // A test without commands would see nothing.
    const atLeast = file === "README.md" ? 40 : 0;
    assert(commands > atLeast, `${commands} commands`);
    assertEquals(differences, [], differences.join("\n\n"));
  });
}

/** The table that has the script's steps on the left: its cells, by rows. */
function scriptTable(): string[][] {
  const [table] = /^\| the script [^]*?\n\n/m.exec(read("README.md"))!;
  const rows = table.trim().split("\n").slice(2);
  return rows.map((row) => row.split("|").slice(1, -1).map((it) => it.trim()));
}

Deno.test("the table beside the script has what the first ADD types", async () => {
  await using node = await Node.start("node2", conf({ logLevel: "DEBUG" }));
  const pod = await node.start("alpine1");
  const log = await node.sh("cut -d ' ' -f 2- /var/log/cni.log");
  const typed = log.split("\n").slice(0, -1).map((line) =>
    line.replaceAll(pod.netns, "NETNS")
      .replaceAll(pod.containerID, "CONTAINERID")
  );
  const cells = scriptTable().map(([, cell]) => cell.replaceAll("`", ""));
  const told = cells.filter(Boolean);
  // "…" stands for some words of a line.
  const isSo = told.length === typed.length &&
    told.every((line, i) => agrees(typed[i], line));
  assert(isSo, typed.map((line, i) => `${line}\n${told[i]}`).join("\n\n"));
});

Deno.test("the table beside the script names functions that are there", () => {
  const cells = scriptTable().map(([, , cell]) => cell).filter(Boolean);
  for (const cell of cells) {
    const [, name, file = "custom-cni.ts"] =
      /^`(\w+)\(\)`(?: in `(.*)`)?$/.exec(cell) ?? [];
    assert(name && read(file).includes(`function ${name}(`), cell);
  }
});

/** What is no code: there a # begins a title, and brackets are links. */
const proseOf = (file: string) => read(file).replaceAll(/^```[^]*?^```$/gm, "");

/** The anchors that GitHub makes of a file's titles. */
function anchorsOf(file: string): string[] {
  const titles = proseOf(file).matchAll(/^#+ (.*)$/gm);
  return Array.from(
    titles,
    ([, title]) =>
      title.toLowerCase().replaceAll(/[^\p{L}\p{N} _-]/gu, "")
        .replaceAll(" ", "-"),
  );
}

for (const file of READMES) {
  Deno.test(`the links of ${file} lead somewhere`, () => {
    const anchors = anchorsOf(file);
    assertEquals(new Set(anchors).size, anchors.length, "a title twice");
    const links = proseOf(file).matchAll(/\]\(([^)]+)\)/g);
    for (const [, link] of links) {
      if (link.includes("://")) continue;
      const [path, anchor] = link.split("#");
      const to = path ? join(dirname(file), path) : file;
      assert(existsSync(join(ROOT, to)), `${file} links to ${link}`);
      const isThere = anchor === undefined || anchorsOf(to).includes(anchor);
      assert(isThere, `${file} links to ${link}`);
    }
  });
}

Deno.test("the functions that the READMEs name are there", () => {
  const sources = [...find("*.ts"), ...find("tests/*/*.ts")].map(read).join("");
  for (const file of READMES) {
    for (const [, name] of proseOf(file).matchAll(/`(?:\w+\.)?(\w+)\(\)`/g)) {
      const isThere = new RegExp(`\\b${name}(<\\w+>)?\\(`).test(sources);
      assert(isThere, `${file} names ${name}()`);
    }
  }
});

if (import.meta.main) {
  const files = Deno.args.length > 0 ? Deno.args : READMES;
  for (const file of files.filter(hasPrompts)) {
    const { text, differences } = await rerun(read(file));
    await Deno.writeTextFile(join(ROOT, file), text);
    console.log([file, ...differences].join("\n\n"));
  }
}
