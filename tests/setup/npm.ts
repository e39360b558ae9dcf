/**
 * Fetches what a build needs: from JSR and from Deno's download site, or from
 * npm where these are out of reach. A second run finds the work done and leaves
 * the network alone.
 *
 *     deno run -A tests/setup/npm.ts std      the @std modules
 *     deno run -A tests/setup/npm.ts denort   what `deno compile` builds upon
 *
 * It imports nothing that Deno would have to fetch, since it runs before
 * anything can be fetched. What it downloads lies in vendor/. To start afresh,
 * delete that folder.
 */
import { exists } from "./tools.ts";

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

/** The runtime of compiled programs: where it is put, and where it is from. */
const DENORT = "vendor/denort";
const DENORT_URL = "https://dl.deno.land/release/" +
  `v${Deno.version.deno}/denort-${Deno.build.target}.zip`;

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
 * Puts the denort, which `deno compile` builds upon, into vendor/: without its
 * symbols, which are a fifth of it. After the compilation it is too late, since
 * `deno compile` hangs the program on behind them.
 */
async function denort(): Promise<void> {
  const { deno } = Deno.version;
  const own = Deno.env.get("DENORT_BIN");
  const source = own ?? `Deno ${deno} for ${Deno.build.target}`;
  const isDone = exists(DENORT) &&
    Deno.readTextFileSync(`${DENORT}.source`) === source;
  if (isDone && !own) return;

  let bytes;
  if (own) bytes = Deno.readFileSync(own);
  else if (await answers(new URL(DENORT_URL))) bytes = await denortOfDeno();
  else bytes = await denortOfNPM();

  write(`${TMP}/denort.source`, source);
  Deno.writeFileSync(`${TMP}/denort`, withoutSymbols(bytes), { mode: 0o755 });
  {
    using draft = Deno.openSync(`${TMP}/denort`);
    draft.syncSync(); // or a power cut could leave half a file by its name
  }
  // The source last: it says that the work is done.
  Deno.renameSync(`${TMP}/denort`, DENORT);
  Deno.renameSync(`${TMP}/denort.source`, `${DENORT}.source`);
}

/** Fetches the denort from where `deno compile` would fetch it. */
async function denortOfDeno(): Promise<Uint8Array<ArrayBuffer>> {
  console.log(`$ fetch ${DENORT_URL}`);
  const response = await fetch(DENORT_URL);
  return await unzipped(await response.bytes());
}

/** Cuts the denort out of a program on npm that Deno compiled. */
async function denortOfNPM(): Promise<Uint8Array<ArrayBuffer>> {
  const { deno } = Deno.version;
  const { target } = Deno.build;
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
        `Deno ${deno}: run \`npx -y --package=deno@${COMPILED.deno} -- deno ` +
        `task …\`, or ${own}`,
    );
  }
  const files = await unpack(COMPILED);
  const file = files.find((file) => file.endsWith(COMPILED.path))!;
  const bytes = Deno.readFileSync(file).slice(0, COMPILED.size);
  const view = new DataView(bytes.buffer);
  for (const [at, size, value] of COMPILED.header) {
    if (size === 8) view.setBigUint64(at, BigInt(value), true);
    else view.setUint16(at, value, true);
  }
  verify(COMPILED.path, await sha256(bytes), COMPILED.denort);
  console.log(`${DENORT}: cut out of this one, sha256 verified`);
  return bytes;
}

/** The one file of a zip. Its layout is in PKWARE's APPNOTE, section 4.3. */
export async function unzipped(
  zip: Uint8Array<ArrayBuffer>,
): Promise<Uint8Array<ArrayBuffer>> {
  const view = new DataView(zip.buffer);
  const end = zip.length - 22; // the last record, which has no comment
  const entry = view.getUint32(end + 16, true);
  const isStored = view.getUint16(entry + 10, true) === 0;
  const size = view.getUint32(entry + 20, true);
  const head = view.getUint32(entry + 42, true);
  const nameLength = view.getUint16(head + 26, true);
  const extraLength = view.getUint16(head + 28, true);
  const start = head + 30 + nameLength + extraLength;
  const packed = zip.slice(start, start + size);
  if (isStored) return packed;
  const inflate = new DecompressionStream("deflate-raw");
  const stream = new Blob([packed]).stream().pipeThrough(inflate);
  return await new Response(stream).bytes();
}

/**
 * An ELF program up to the end of what the kernel loads. Behind that stand
 * symbols, and the table of sections, which only debuggers and linkers read.
 */
function withoutSymbols(program: Uint8Array<ArrayBuffer>) {
  const view = new DataView(program.buffer);
  const e_phoff = Number(view.getBigUint64(32, true));
  const e_phentsize = view.getUint16(54, true);
  const e_phnum = view.getUint16(56, true);
  let end = 0;
  for (let i = 0; i < e_phnum; i++) {
    const segment = e_phoff + i * e_phentsize;
    const p_offset = Number(view.getBigUint64(segment + 8, true));
    const p_filesz = Number(view.getBigUint64(segment + 32, true));
    end = Math.max(end, p_offset + p_filesz);
  }
  view.setBigUint64(40, 0n, true); // e_shoff, where the table of sections is
  view.setUint16(60, 0, true); // e_shnum, how many there are
  view.setUint16(62, 0, true); // e_shstrndx, the one with their names
  return program.subarray(0, end);
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
  const dir = `${TMP}/${spec.replace("/", "-")}`;
  Deno.mkdirSync(dir, { recursive: true });
  const tarball = `${dir}/${await pack(spec, dir)}`;
  verify(tarball, await sha256Of(tarball), sha256);
  // Whom the files belonged to elsewhere means nothing on this machine.
  const extract = ["tar", "-xvzf", tarball, "-C", dir, "--no-same-owner"];
  const files = await run(extract);
  return files.split("\n").map((file) => `${dir}/${file}`);
}

/** Fetches an npm package into a folder; returns the name of its file. */
async function pack(spec: string, folder: string): Promise<string> {
  console.log(`$ npm pack ${spec}`);
  // npm's own ten seconds before it tries again are long to a reader.
  const command = ["npm", "pack", spec, "--fetch-retry-mintimeout=1000"];
  try {
    // npm 7 ignores --pack-destination: it writes to where it is started.
    return await run(command, folder);
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
async function run(command: string[], cwd = "."): Promise<string> {
  const [program, ...args] = command;
  const output = await new Deno.Command(program, { args, cwd }).output();
  const [out, err] = [output.stdout, output.stderr].map((bytes) =>
    new TextDecoder().decode(bytes).trim()
  );
  if (!output.success) {
    const complaint = err.split("\n").slice(0, 4).join("\n");
    throw new Error(`${program} ${args[0]} failed\n${complaint}`);
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
    const steps: Record<string, () => Promise<void>> = { std, denort };
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
