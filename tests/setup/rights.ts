/**
 * Says whether this machine can do a task, before anything is fetched or built:
 * in one line what is missing, and what you can do about it.
 *
 *     deno run -A tests/setup/rights.ts lab
 *
 * @module
 */
import { ROOT } from "./root.ts";
import { exists, has, missingPackages } from "./tools.ts";

/** What a first run takes on the disk at most, in megabytes, once Deno is there. */
const SPACE = 350;

/** The rights that a lab needs, with their bits in capabilities(7). */
const CAPABILITIES = { CAP_NET_ADMIN: 12, CAP_NET_RAW: 13, CAP_SYS_ADMIN: 21 };

/** How each node of the lab begins. It all ends with the script. */
const TRIAL = `
! grep -q ' /proc/sys proc ro' /proc/mounts || mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work
mount -t overlay -o lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work etc /etc
hostname lab`;

const isRoot = Deno.build.os === "linux" && Deno.uid() === 0;

/** What stands in the way of a lab, if anything does. */
function obstacleToLab(task: string): string | undefined {
  const privileged = "docker run --privileged";
  if (Deno.build.os !== "linux") {
    return "The lab needs Linux. For a Mac or Windows, README.md has a line";
  }
  if (!isRoot && task !== "lab") {
    return `"deno task ${task}" needs root. "deno task lab" does not`;
  }
  if (!has("mount")) {
    return "The program mount is missing. As root: apt-get install mount";
  }
  const missing = isRoot ? missingCapabilities().join(", ") : "";
  if (missing) {
    return `Root lacks ${missing} here. In a container: start it with ` +
      privileged;
  }
  const refusal = tryNamespaces();
  if (refusal && isRoot) {
    return `Root can't make a network here (${refusal}). In a container: ` +
      `start it with ${privileged}`;
  }
  if (refusal) {
    return "This kernel lets no plain user make a network of its own " +
      `(${refusal}). Run it as root`;
  }
  if (!hasBridgeFilter()) {
    return "The kernel module br_netfilter is not loaded: without it no " +
      "bridged packet meets iptables. On the host: sudo modprobe br_netfilter";
  }
  const packages = missingPackages().join(" ");
  if (packages && !has("apt-get")) {
    return `Tools are missing. Install what Debian has as: ${packages}`;
  }
  return undefined;
}

/** What stands in the way of a build, if anything does. */
function obstacleToBuild(): string | undefined {
  if (Deno.build.os !== "linux") return undefined;
  for (const folder of ["", "dist", "vendor"]) {
    if (!isWritable(`${ROOT}${folder}`)) {
      return `You can't write to ${ROOT}${folder}. Who owns it?`;
    }
  }
  const free = freeSpace();
  if (!exists(`${ROOT}dist/custom-cni`) && free < SPACE) {
    return `The first run takes ${SPACE} MB, and there are ${free} MB free`;
  }
  return undefined;
}

/** Makes the namespaces of a node; returns the words of what refuses. */
function tryNamespaces(): string {
  const user = isRoot ? [] : ["--user", "--map-root-user"];
  const script = ["sh", "-ec", TRIAL];
  const { success, stderr } = run(
    ["unshare", ...user, "--net", "--mount", "--uts", ...script],
  );
  return success ? "" : stderr.split("\n")[0];
}

/** Which of the rights root does not have, as in most containers. */
function missingCapabilities(): string[] {
  const status = Deno.readTextFileSync("/proc/self/status");
  const [, hex] = /^CapEff:\s*(\w+)$/m.exec(status)!;
  const rights = BigInt(`0x${hex}`);
  return Object.entries(CAPABILITIES)
    .filter(([, bit]) => (rights >> BigInt(bit) & 1n) === 0n)
    .map(([name]) => name);
}

/** Whether bridged packets can meet iptables. Root loads what that takes. */
function hasBridgeFilter(): boolean {
  const isLoaded = () => exists("/proc/sys/net/bridge");
  if (isLoaded() || !isRoot || !has("modprobe")) return isLoaded();
  console.log("$ modprobe br_netfilter");
  run(["modprobe", "br_netfilter"]);
  return isLoaded();
}

/** Whether a folder can be written, if it is there. */
function isWritable(folder: string): boolean {
  return !exists(folder) || run(["test", "-w", folder]).success;
}

/** The megabytes that are free, for the checkout or for Deno's cache. */
function freeSpace(): number {
  const home = Deno.env.get("HOME") ?? "/";
  const { stdout } = run(["df", "--output=avail", "-m", ROOT, home]);
  const [, ...numbers] = stdout.trim().split("\n");
  return Math.min(...numbers.map(Number));
}

function run([program, ...args]: string[]) {
  const env = { LC_ALL: "C" };
  const output = new Deno.Command(program, { args, env }).outputSync();
  const decoder = new TextDecoder();
  return {
    success: output.success,
    stdout: decoder.decode(output.stdout),
    stderr: decoder.decode(output.stderr).trim(),
  };
}

const [task] = Deno.args;
let line = task === "build" ? undefined : obstacleToLab(task);
line ??= obstacleToBuild();
if (line) {
  console.error(line);
  Deno.exit(1);
}
