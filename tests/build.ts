/**
 * Makes dist/custom-cni: the plugin and Deno's runtime in one file. Does
 * nothing while that file is newer than all it is made of.
 *
 *     deno run -A tests/build.ts
 */

import { DENORT, exists } from "./offline.ts";

/** All that the binary may do. Deno refuses it the rest, network included. */
const PERMISSIONS = {
  // Set up the pods' network, link their namespaces, look at the firewall.
  run: ["ip", "ln", "iptables"],
  // What a container runtime tells its plugins, and where programs are.
  env: ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "PATH"],
  read: [
    "/tmp/last_allocated_ip", // the counter
    "/var/run/netns", // the pods' namespaces, by the name in CNI_NETNS
    "/run/netns", // and by the folder's true name
    "/etc/cni/net.d", // the conf, for a run by hand
    "/var/log/cni.log",
  ],
  write: [
    "/tmp/last_allocated_ip",
    "/var/run/netns", // a symlink named by container ID
    "/run/netns",
    "/var/log/cni.log",
  ],
};

/**
 * So short a run ends before compiled code or a second thread pays. And where
 * nothing is compiled, no memory is both writable and executable.
 */
export const V8_FLAGS = "--v8-flags=--jitless,--single-threaded";

const INPUTS = ["custom-cni.ts", "ipam.ts", "deno.json", "tests/build.ts"];
const OUTPUT = "dist/custom-cni";

if (import.meta.main) {
  Deno.chdir(`${import.meta.dirname}/..`);
  Deno.mkdirSync("dist", { recursive: true });
  // A second build waits here and then finds the work done. The kernel ends
  // the lock with the process, whatever ends that.
  const folder = Deno.openSync("dist");
  folder.lockSync(true);
  if (isFresh()) console.log(`${OUTPUT} is up to date`);
  else await build();
}

function isFresh(): boolean {
  const changed = (path: string) => Deno.statSync(path).mtime!;
  return exists(OUTPUT) &&
    INPUTS.every((input) => changed(input) < changed(OUTPUT));
}

/** What makes Deno keep to the permissions. */
export function permissionFlags(): string[] {
  return Object.entries(PERMISSIONS).map(([name, values]) =>
    `--allow-${name}=${values}`
  );
}

async function build(): Promise<void> {
  // A denort fits the deno of its own version only: npm's brings its deno.
  const given = Deno.env.get("DENORT_BIN");
  const npm = !given && exists(DENORT.path);
  const denort = npm ? Deno.realPathSync(DENORT.path) : given;
  const version = npm ? DENORT.version : Deno.version.deno;
  const deno = version === Deno.version.deno
    ? [Deno.execPath()]
    : ["npx", "-y", `deno@${version}`];

  const options = ["--no-prompt"];
  // `deno task check` looks at the types; here that would double the time.
  options.push("--no-check");
  // The cache would lie in /tmp, and the binary would trust anybody's.
  options.push("--no-code-cache");
  options.push(V8_FLAGS, ...permissionFlags());

  // A runtime may start the plugin at any moment, so it appears by a rename.
  const draft = "dist/draft/custom-cni";
  if (exists("dist/draft")) Deno.removeSync("dist/draft", { recursive: true });
  const [command, ...args] = deno;
  args.push("compile", ...options, "--output", draft, "custom-cni.ts");
  const env = denort ? { DENORT_BIN: denort } : undefined;
  const result = await new Deno.Command(command, { args, env }).output();
  if (!result.success) {
    await Deno.stderr.write(result.stderr);
    Deno.exit(1);
  }
  Deno.renameSync(draft, OUTPUT);
  Deno.removeSync("dist/draft");

  const base = npm
    ? `the denort from npm, sha256 ${DENORT.sha256}`
    : given ?? "its own denort";
  console.log(`${OUTPUT}: compiled by Deno ${version} upon ${base}`);
}
