/**
 * Types the README's two commands on minimal Debians, as a newcomer does. Each
 * Debian is made by debootstrap in vendor/debian/, with the packages that the
 * README asks for and no others. A run works in a copy and removes it. The
 * machine stays as it is.
 *
 *     deno task debian              all of them
 *     deno task debian 13 forky     these, by number or by name
 *
 * @module
 */
import { ensureDir } from "@std/fs/ensure-dir";
import { exists } from "@std/fs/exists";
import { APT, DEBS, prepareApt, sh, unpack } from "../setup/debian.ts";
import { ROOT } from "../setup/root.ts";

/** The roots by release, and the copies in use. */
const DEBIANS = `${ROOT}vendor/debian`;
const ENTER = `${ROOT}tests/debian/enter.sh`;
const MAKE = `${ROOT}tests/debian/make.sh`;
const DEBOOTSTRAP = `${DEBS}/debootstrap`;

/** What a newcomer has installed. */
const PACKAGES = ["git", "nodejs", "npm"];

/** One Debian, and the folder of the checkout in it. */
interface Release {
  number: string;
  name: string;
  checkout: string;
  /** Whether a plain user tries the lab, too. */
  hasStudent?: boolean;
}

const RELEASES: Release[] = [
  // A blank and an umlaut, as in many a home.
  { number: "12", name: "bookworm", checkout: "/srv/Meine Übung 1/custom-cni" },
  // The lab covers /mnt, which is where WSL has the disks of Windows.
  {
    ...{ number: "13", name: "trixie", checkout: "/mnt/c/custom-cni" },
    hasStudent: true,
  },
  { number: "14", name: "forky", checkout: "/srv/custom-cni" },
];

/** Who types a command. */
interface User {
  name: string;
  home: string;
  /** As a login sets it on Debian: only root has the sbin folders. */
  path: string;
}

const ADMIN: User = {
  ...{ name: "root", home: "/root" },
  path: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
};
const STUDENT: User = {
  ...{ name: "student", home: "/home/student" },
  path: "/usr/local/bin:/usr/bin:/bin",
};

/** The longest that a command may take, in seconds. */
const LIMIT = 1200;

/** The running child, which must end with this program. */
let running: Deno.ChildProcess | undefined;
let isInterrupted = false;

/** Ends the child. Its caller then throws, which removes the copy. */
function interrupt(): void {
  isInterrupted = true;
  running?.kill("SIGKILL");
}

function throwIfInterrupted(): void {
  if (isInterrupted) throw new Error("Interrupted");
}

/** A command's success and output, and the seconds it took. */
interface Result {
  success: boolean;
  output: string;
  seconds: number;
}

/** Runs a program in its own namespaces. They end with it, and so do mounts. */
async function contain(args: string[]): Promise<Result> {
  throwIfInterrupted();
  const namespaces = ["--mount", "--pid", "--uts", "--ipc"];
  const start = performance.now();
  running = new Deno.Command("unshare", {
    args: [...namespaces, "--fork", "--kill-child", ...args],
    ...{ stdin: "null", stdout: "piped", stderr: "inherit" },
  }).spawn();
  const { success, stdout } = await running.output();
  running = undefined;
  throwIfInterrupted();
  const output = new TextDecoder().decode(stdout);
  return { success, output, seconds: (performance.now() - start) / 1000 };
}

/** Runs a shell line in a root, as a user with a fresh environment. */
function enter(
  root: string,
  line: string,
  { name, home, path }: User = ADMIN,
  env: Record<string, string> = {},
): Promise<Result> {
  const own = { USER: name, LOGNAME: name, HOME: home, PATH: path };
  const variables = Object.entries({ ...env, ...own })
    .map(([key, value]) => `${key}=${value}`);
  const ids = [`--reuid=${name}`, `--regid=${name}`, "--init-groups"];
  return contain([
    ...["sh", ENTER, root, "/usr/bin/timeout", "-k", "9", `${LIMIT}`],
    ...["/usr/bin/setpriv", ...ids, "/usr/bin/env", "-i", ...variables],
    ...["/bin/sh", "-c", `exec 2>&1; cd; ${line}`],
  ]);
}

/** Runs a shell line of the preparation; throws if it fails. */
async function prepare(root: string, line: string): Promise<void> {
  const { success, output } = await enter(root, `set -e; ${line}`);
  if (!success) throw new Error(`It failed: ${line}\n${output}`);
}

/** The README's two commands, which are in its first block. */
async function readCommands(): Promise<string[]> {
  const text = await Deno.readTextFile(`${ROOT}README.md`);
  const [, block = ""] = /^```sh\n(.*?)^```/ms.exec(text) ?? [];
  const lines = block.match(/^npx .*$/gm) ?? [];
  const words = lines.map((line) => line.split(" ").at(-1)).join(" ");
  if (words !== "lab test") {
    throw new Error(`The README begins with "${words}" instead of "lab test"`);
  }
  const packages = `\`${PACKAGES.join(" ")}\``;
  if (!text.includes(packages)) {
    throw new Error(`The README does not ask for ${packages}`);
  }
  return lines;
}

/** Runs a program for its output; throws if it fails. */
async function read(program: string, ...args: string[]): Promise<string> {
  const { success, stdout } = await new Deno.Command(program, {
    ...{ args, stderr: "inherit" },
  }).output();
  throwIfInterrupted();
  if (!success) throw new Error(`It failed: ${program} ${args.join(" ")}`);
  return new TextDecoder().decode(stdout).trim();
}

/** Makes the roots that do not exist yet. */
async function makeRoots(releases: Release[]): Promise<void> {
  const missing: string[] = [];
  for (const { name } of releases) {
    if (!await exists(`${DEBIANS}/${name}`)) missing.push(name);
  }
  if (!missing.length) return;
  await ensureDir(DEBS);
  using lock = await Deno.open(DEBS);
  await lock.lock(true);
  const env = await prepareApt(["trixie"], "trixie");
  if (!await exists(DEBOOTSTRAP)) {
    await unpack(DEBOOTSTRAP, "debootstrap", "trixie", env);
  }
  const uris = "apt-get indextargets --format '$(REPO_URI)' | head -n 1";
  const mirror = (await sh(uris, env)).trim();
  await Deno.remove(APT, { recursive: true });
  for (const name of missing) {
    console.log(`$ debootstrap ${name}`);
    const root = `${DEBIANS}/${name}`;
    const draft = `${root}.draft`;
    await read("rm", "-rf", draft);
    const { success, output } = await contain([
      ...["sh", MAKE, DEBOOTSTRAP, name, mirror, draft],
    ]);
    if (!success) throw new Error(`debootstrap failed\n${output}`);
    // Not by debootstrap, which can't see that one package provides another.
    await prepare(
      draft,
      `apt-get update
      apt-get install -y --no-install-recommends ${PACKAGES.join(" ")}
      apt-get clean`,
    );
    await Deno.rename(draft, root);
  }
}

/** How this machine reaches npm's registry. */
interface Network {
  env: Record<string, string>;
  /** npm's settings, of the machine and of the user. */
  npmrc: string;
  /** The certificates that both name. */
  files: string[];
}

/** Other variables that say how to reach a network. */
const NETWORK = /^(\w+_proxy|NODE_EXTRA_CA_CERTS|SSL_CERT_FILE|DENO_CERT)$/i;

/** Reads how this machine reaches npm's registry. */
async function readNetwork(): Promise<Network> {
  const env: Record<string, string> = { NO_COLOR: "1" };
  for (const [key, value] of Object.entries(Deno.env.toObject())) {
    // npx adds what it knows of itself and of this home.
    const isNpms = /^npm_config_(?!npm_version|user_agent|yes)/i.test(key) &&
      /^[^/]/.test(value);
    if (isNpms || NETWORK.test(key)) env[key] = value;
  }
  let npmrc = "";
  for (const key of ["globalconfig", "userconfig"]) {
    const file = await read("npm", "config", "get", key);
    if (await exists(file)) npmrc += `${await Deno.readTextFile(file)}\n`;
  }
  const files: string[] = [];
  const cafile = await read("npm", "config", "get", "cafile");
  for (const path of new Set([...Object.values(env), cafile])) {
    if (path.startsWith("/") && await exists(path)) files.push(path);
  }
  return { env, npmrc, files };
}

/** Megabytes of folders in a root. */
async function size(root: string, ...folders: string[]): Promise<number> {
  const paths = folders.map((folder) => root + folder);
  const lines = (await read("du", "-csm", ...paths)).split("\n");
  return parseInt(lines.at(-1)!);
}

/** Who types, and where. */
interface Place {
  title: string;
  root: string;
  user: User;
  checkout: string;
}

/** Gives a newcomer npm's settings and a clone. */
async function settle(
  { root, user: { name, home }, checkout }: Place,
  npmrc: string,
): Promise<void> {
  await Deno.writeTextFile(`${root}${home}/.npmrc`, npmrc, { mode: 0o600 });
  await prepare(
    root,
    `mkdir -p '${checkout}'
    git clone -q /srv/custom-cni.git '${checkout}'
    chown -R ${name}: '${checkout}' ${home}`,
  );
}

/** Types commands in a fresh clone; returns how many failed. */
async function type(
  lines: string[],
  place: Place,
  { env, npmrc }: Network,
): Promise<number> {
  const { title, root, user, checkout } = place;
  await settle(place, npmrc);
  const own = () => size(root, user.home, checkout);
  const system = () => size(root, "/usr", "/var");
  const before = { own: await own(), system: await system() };
  let failed = 0;
  for (const line of lines) {
    const there = `cd '${checkout}' && ${line}`;
    const { success, output, seconds } = await enter(root, there, user, env);
    if (!success) {
      failed++;
      console.log(output);
    }
    const word = success ? "ok  " : "FAIL";
    console.log(`${word} ${title}: ${line} (${Math.round(seconds)} s)`);
  }
  const kept = await own() - before.own;
  const installed = await system() - before.system;
  console.log(
    `     ${kept} MB more in the home and the checkout, ${installed} MB in ` +
      "/usr and /var",
  );
  return failed;
}

/** Copies a root, and adds a repository of the last commit to clone. */
async function copy(name: string, root: string, { files }: Network) {
  await read("rm", "-rf", root);
  await read("cp", "-a", "--reflink=auto", `${DEBIANS}/${name}`, root);
  const repository = `${root}/srv/custom-cni.git`;
  await read("git", "clone", "-q", "--bare", "--no-local", ROOT, repository);
  for (const file of files) {
    await read("install", "-D", "-m644", file, root + file);
  }
}

/** Tries one release; returns how many commands failed. */
async function tryOut(
  { number, name, checkout, hasStudent }: Release,
  lines: string[],
  network: Network,
): Promise<number> {
  const root = `${DEBIANS}/${name}.copy`;
  const title = `Debian ${number}`;
  let failed = 0;
  try {
    if (hasStudent) {
      await copy(name, root, network);
      await prepare(root, `useradd --create-home ${STUDENT.name}`);
      const place = {
        ...{ title: `${title}, without root`, root, user: STUDENT },
        checkout: `${STUDENT.home}/custom-cni`,
      };
      // Only the lab, since the tests need root.
      failed += await type(lines.slice(0, 1), place, network);
    }
    // A fresh one, where nobody has unpacked the tools yet.
    await copy(name, root, network);
    const place = { title, root, user: ADMIN, checkout };
    failed += await type(lines, place, network);
  } finally {
    await read("rm", "-rf", root);
  }
  return failed;
}

/** The releases by their numbers or names; all without any. */
function choose(words: string[]): Release[] {
  if (!words.length) return RELEASES;
  return words.map((word) => {
    const found = RELEASES.find(({ number, name }) =>
      [number, name].includes(word)
    );
    if (found) return found;
    const known = RELEASES.map(({ number, name }) => `${number} (${name})`);
    throw new Error(`No such release: "${word}". Known: ${known.join(", ")}`);
  });
}

/** Tries releases; returns how many commands failed. */
async function main(words: string[]): Promise<number> {
  const releases = choose(words);
  const lines = await readCommands();
  await ensureDir(DEBIANS);
  // A second run waits here.
  using lock = await Deno.open(DEBIANS);
  await lock.lock(true);
  await makeRoots(releases);
  const network = await readNetwork();
  let failed = 0;
  for (const release of releases) {
    failed += await tryOut(release, lines, network);
  }
  return failed;
}

if (import.meta.main) {
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    Deno.addSignalListener(signal, interrupt);
  }
  try {
    Deno.exitCode = await main(Deno.args) ? 1 : 0;
  } catch (error) {
    console.error(`${error}`);
    Deno.exitCode = 1;
  }
  Deno.exit(); // whatever listens to signals
}
