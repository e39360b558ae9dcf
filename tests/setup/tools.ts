/**
 * The programs that the lab and the tests start. What this machine lacks of
 * them is unpacked into vendor/tools/, where `enter.ts` takes it from. So the
 * machine stays as it is, and you need not be root.
 *
 * It imports nothing that Deno would have to fetch: `rights.ts` asks it before
 * anything is fetched.
 *
 * @module
 */
import { ROOT } from "./root.ts";

/** A program, and the Debian package that has it. */
export const TOOLS: Record<string, string> = {
  busybox: "busybox",
  ip: "iproute2",
  iptables: "iptables",
  nft: "nftables",
  ping: "iputils-ping",
  sysctl: "procps",
  tcpdump: "tcpdump",
  "/usr/bin/time": "time",
  "/usr/lib/cni/bridge": "containernetworking-plugins",
  "/usr/lib/cni/host-local": "containernetworking-plugins",
};

/** Where the unpacked tools are, in a usr of their own. */
const TOOLS_FOLDER = `${ROOT}vendor/tools`;

/** The PATH of root. That of other users has no sbin, where some tools are. */
export const PATH = `${Deno.env.get("PATH") ?? ""}:/usr/sbin:/sbin`;

/** Whether there is a file, or a program of this name on the PATH. */
export function has(tool: string): boolean {
  if (tool.startsWith("/")) return exists(tool);
  return PATH.split(":").some((folder) => exists(`${folder}/${tool}`));
}

/** The packages of those tools that this machine lacks. */
export function missingPackages(): string[] {
  const missing = Object.keys(TOOLS).filter((tool) => !has(tool));
  return [...new Set(missing.map((tool) => TOOLS[tool]))];
}

/**
 * Downloads packages with all that they need and this machine lacks. apt gets
 * lists of its own, since those of the machine may be old, and are root's.
 */
const UNPACK = `set -e
mkdir -p lists/partial archives/partial
cat > apt.conf << END
Dir::State::lists "$PWD/lists";
Dir::Cache "$PWD";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
APT::Sandbox::User "root";
Debug::NoLocking "true";
Acquire::Languages "none";
Acquire::Retries "3";
END
export APT_CONFIG="$PWD/apt.conf"
# One source of several that does not answer is no reason to stop.
apt-get -qq update || true
apt-get -qq --yes --no-install-recommends --download-only install "$@"
for deb in archives/*.deb; do
  dpkg -x "$deb" unpacked
  rm "$deb"
done
# Debian 12 still has packages with files in /bin, which is a link to /usr/bin.
for folder in bin sbin lib lib64; do
  [ ! -d unpacked/$folder ] || cp -a unpacked/$folder unpacked/usr
done
# These links are made where the package is installed.
if [ -e unpacked/usr/sbin/xtables-nft-multi ]; then
  for name in iptables iptables-save iptables-restore; do
    ln -sf xtables-nft-multi unpacked/usr/sbin/$name
  done
fi
mv unpacked/usr .
rm -r apt.conf archives lists unpacked`;

/**
 * Unpacks the missing tools, and returns their folder; "" if none is missing. A
 * second run finds them there, unless the machine is another one, or lacks
 * something else.
 *
 * @throws {Error} if apt-get can't get them.
 */
export async function unpackTools(): Promise<string> {
  const packages = missingPackages();
  if (packages.length === 0) return "";
  // A second run waits here and then finds the work done.
  using vendor = Deno.openSync(`${ROOT}vendor`);
  vendor.lockSync(true);
  const stamp = `${packages.join(" ")}\n${release()}`;
  const isDone = exists(`${TOOLS_FOLDER}/stamp`) &&
    Deno.readTextFileSync(`${TOOLS_FOLDER}/stamp`) === stamp;
  if (isDone) return TOOLS_FOLDER;

  console.log(`Unpacking ${packages.join(", ")} into vendor/tools`);
  // By its name, npm.ts removes it after an interruption.
  const draft = `${ROOT}vendor/tmp-tools-${Deno.pid}`;
  Deno.mkdirSync(draft);
  try {
    const args = ["-c", UNPACK, "sh", ...packages];
    const env = { DEBIAN_FRONTEND: "noninteractive", PATH };
    const sh = new Deno.Command("sh", { args, env, cwd: draft });
    const { success } = await sh.spawn().status;
    if (!success) {
      const install = `apt-get install ${packages.join(" ")}`;
      throw new Error(`apt-get can't get these tools. As root: ${install}`);
    }
    Deno.writeTextFileSync(`${draft}/stamp`, stamp);
    remove(TOOLS_FOLDER);
    Deno.renameSync(draft, TOOLS_FOLDER);
  } finally {
    remove(draft);
  }
  return TOOLS_FOLDER;
}

/** The release of this machine, whose libraries the tools need. */
function release(): string {
  return exists("/etc/os-release")
    ? Deno.readTextFileSync("/etc/os-release")
    : "";
}

function remove(folder: string): void {
  if (exists(folder)) Deno.removeSync(folder, { recursive: true });
}

/** Whether there is a file or a folder. */
export function exists(path: string): boolean {
  try {
    Deno.statSync(path);
    return true;
  } catch {
    return false;
  }
}
