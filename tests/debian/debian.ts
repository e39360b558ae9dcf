/**
 * Types the README's first two commands on minimal Debians, as a newcomer does:
 * each is made by debootstrap, with what the README asks for and no more. They
 * lie in vendor/debian/; each run has a copy, which goes with it. The machine
 * stays as it is.
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

/** The roots, by release, and the copies in use. */
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
  /** Whether a user without root's rights tries the lab as well. */
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
  /** As Debian's login sets it: only root has the folders of sbin. */
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

/** What runs now, to be ended when this program is. */
let running: Deno.ChildProcess | undefined;
let isInterrupted = false;

/** Ends what runs; who started it throws, so that the copy is removed. */
function interrupt(): void {
  isInterrupted = true;
  running?.kill("SIGKILL");
}

function throwIfInterrupted(): void {
  if (isInterrupted) throw new Error("Interrupted");
}

/** How a command ended, what it wrote, and the seconds it took. */
interface Result {
  success: boolean;
  output: string;
  seconds: number;
}

/** Runs a program in namespaces that end with it; its mounts do, too. */
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

/** Runs a shell line in a root, as a user whose environment is fresh. */
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

/** The same, for what has to work before a command can be tried. */
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
  if (words === "lab test") return lines;
  throw new Error(`The README begins with "${words}" in place of "lab test"`);
}

/** Runs a program for its output, or throws. */
async function read(program: string, ...args: string[]): Promise<string> {
  const { success, stdout } = await new Deno.Command(program, {
    ...{ args, stderr: "inherit" },
  }).output();
  throwIfInterrupted();
  if (!success) throw new Error(`It failed: ${program} ${args.join(" ")}`);
  return new TextDecoder().decode(stdout).trim();
}

/** Makes those roots that aren't there yet. */
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
  /** The certificates that these name. */
  files: string[];
}

/** Variables that say how to reach a network, beside npm's own. */
const NETWORK = /^(\w+_proxy|NODE_EXTRA_CA_CERTS|SSL_CERT_FILE|DENO_CERT)$/i;

/** Looks how this machine reaches npm's registry. */
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

/** What a newcomer has before the first command: npm's settings, a clone. */
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

/** Types commands in a fresh checkout; returns how many failed. */
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

/** A fresh Debian, with the last commit as a repository to clone. */
async function copy(name: string, root: string, { files }: Network) {
  await read("rm", "-rf", root);
  await read("cp", "-a", "--reflink=auto", `${DEBIANS}/${name}`, root);
  const repository = `${root}/srv/custom-cni.git`;
  await read("git", "clone", "-q", "--bare", "--no-local", ROOT, repository);
  for (const file of files) {
    await read("install", "-D", "-m644", file, root + file);
  }
}

/** Tries one release in a copy of its root; returns how many failed. */
async function tryOut(
  { number, name, checkout, hasStudent }: Release,
  lines: string[],
  network: Network,
): Promise<number> {
  const root = `${DEBIANS}/${name}.copy`;
  const title = `Debian ${number}`;
  try {
    await copy(name, root, network);
    const place = { title, root, user: ADMIN, checkout };
    const failed = await type(lines, place, network);
    if (!hasStudent) return failed;
    await prepare(root, `useradd --create-home ${STUDENT.name}`);
    const other = {
      ...{ title: `${title}, without root`, root, user: STUDENT },
      checkout: `${STUDENT.home}/custom-cni`,
    };
    // The lab alone: the tests want root.
    return failed + await type(lines.slice(0, 1), other, network);
  } finally {
    await read("rm", "-rf", root);
  }
}

/** The releases that somebody asks for, by number or by name. */
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
  if (Deno.uid() !== 0) throw new Error("Be root, for debootstrap");
  const releases = choose(words);
  const lines = await readCommands();
  // A root has no modules, since the kernel is the machine's.
  if (!await exists("/proc/sys/net/bridge")) await sh("modprobe br_netfilter");
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
