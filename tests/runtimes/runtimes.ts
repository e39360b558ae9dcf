/**
 * A node of the lab with real container runtimes, as if Debian's packages were
 * installed there, and a client that calls containerd, as a kubelet does.
 *
 * @module
 */
// Not in deno.json, so that the plugin's build sees nothing of npm.
// deno-lint-ignore no-import-prefix
import * as grpc from "npm:@grpc/grpc-js@1.13.4";
// deno-lint-ignore no-import-prefix
import { loadSync } from "npm:@grpc/proto-loader@0.7.15";
import { exists } from "@std/fs/exists";
import { join } from "@std/path/posix/join";
import { hear, Node, type Output, run } from "../lab/node.ts";
import { DEBS } from "../setup/debian.ts";

const API = "usr/share/gocode/src/k8s.io/cri-api/pkg/apis/runtime/v1/api.proto";
const SOCKET = "/run/containerd/containerd.sock";

/** The image of every container here: busybox. */
export const IMAGE = "localhost/box:1";

/** Mounts cgroups of version 2, or of version 1 if that is in use. */
const CGROUPS = `set -e
v1=$(sed -n 's/^[1-9][0-9]*:\\([^:]*\\):.*/\\1/p' /proc/self/cgroup)
if [ "$v1" ]; then
  mount -t tmpfs tmpfs /sys/fs/cgroup
  for controllers in $v1; do
    group=/sys/fs/cgroup/\${controllers#name=}
    mkdir $group
    case $controllers in name=*) controllers=none,$controllers ;; esac
    mount -t cgroup -o $controllers cgroup $group
  done
  groups=$(echo /sys/fs/cgroup/*)
else
  mount -t cgroup2 cgroup /sys/fs/cgroup
  groups=/sys/fs/cgroup
fi
join() {
  for group in $groups; do
    if [ ! -d $group/$1 ]; then
      mkdir $group/$1
      for key in cpuset.cpus cpuset.mems; do # empty at first in version 1
        [ ! -f $group/$key ] || cat $group/$key > $group/$1/$key
      done
    fi
    echo 0 > $group/$1/cgroup.procs
  done
}
`;

/**
 * The node's runtimes run in a PID namespace, so that none outlives it, and in
 * their own cgroups. `cat` ends with this program, and everything with `cat`.
 */
const RUNTIMES = `trap '' INT
${CGROUPS}
home=custom-cni-$$
join $home
unshare --pid --fork --kill-child --mount --cgroup sh -c "$1" sh "$2" || :
join .
for group in $groups; do
  for try in 1 2 3 4 5; do
    [ -d $group/$home ] || break
    find $group/$home -depth -type d -exec rmdir {} + 2> /dev/null || sleep 0.2
  done
done`;

/** Inside that namespace. $1: folders of unpacked packages, the first wins. */
const INSIDE = `set -e
mount -t proc proc /proc
umount -R /sys/fs/cgroup
${CGROUPS}
join init
lower=
for debs in $1; do
  [ ! -d $debs/etc/containers ] || cp -r $debs/etc/containers /etc
  lower=$lower$debs/usr:
done
mount -t overlay -o lowerdir=$lower/usr overlay /usr
mount -t tmpfs -o mode=755 tmpfs /var/lib
mkdir -p /opt/cni/bin
cp /usr/lib/cni/loopback /opt/cni/bin
cat > /run/containerd.toml << 'END'
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "${IMAGE}"
  restrict_oom_score_adj = true
END
echo ready
cat`;

/** Joins the node's cgroups, which nsenter does not. */
const JOIN = `for group in /sys/fs/cgroup/init /sys/fs/cgroup/*/init; do
  [ ! -d $group ] || echo 0 > $group/cgroup.procs
done`;

// deno-lint-ignore no-explicit-any -- the messages of api.proto
export type Message = any;

/** Runtimes on a node. `await using` ends them and all that they started. */
export class Runtimes implements AsyncDisposable {
  #client?: grpc.Client;

  private constructor(
    readonly node: Node,
    readonly process: Deno.ChildProcess,
  ) {}

  /** Puts the packages of these releases of Debian on a node. */
  static async on(node: Node, releases = ["bookworm"]): Promise<Runtimes> {
    const folders = releases.map((release) => join(DEBS, release)).join(" ");
    const [program, ...args] = [
      ...node.enter("sh", "-c", RUNTIMES),
      ...["sh", INSIDE, folders],
    ];
    const process = new Deno.Command(program, {
      ...{ args, stdin: "piped", stdout: "piped", stderr: "inherit" },
    }).spawn();
    await hear(process.stdout, "ready");
    // The child of `unshare`, the first process in the namespaces.
    const children = async (pid: number | string) => {
      const path = `/proc/${pid}/task/${pid}/children`;
      return (await Deno.readTextFile(path)).trim();
    };
    const unshare = await children(process.pid);
    const runtimes = new Runtimes(node, process);
    runtimes.#init = await children(unshare);
    return runtimes;
  }
  #init = "";

  async [Symbol.asyncDispose](): Promise<void> {
    this.#client?.close();
    await this.process.stdin.close();
    await this.process.stdout.cancel();
    await this.process.status;
  }

  /** The words that run a command on the node. */
  enter(...command: string[]): string[] {
    const namespaces = ["-n", "-m", "-u", "-p", "-C"];
    return ["nsenter", `-t${this.#init}`, ...namespaces, "--", ...command];
  }

  /** Runs a shell line on the node, whatever its status. */
  run(line: string, env: Record<string, string> = {}): Promise<Output> {
    const variables = Object.entries(env).map(([key, to]) => `${key}=${to}`);
    const shell = ["sh", "-c", `${JOIN}\n${line}`];
    return run(this.enter("env", ...variables, ...shell));
  }

  /** Runs a shell line on the node, and throws unless it succeeds. */
  async sh(line: string, env?: Record<string, string>): Promise<string> {
    const { code, stdout, stderr } = await this.run(line, env);
    if (code) throw new Error(`${this.node.name}# ${line}: ${stderr}${stdout}`);
    return stdout.trimEnd();
  }

  /** A path of the node, seen from outside. */
  path(path: string): string {
    return `/proc/${this.#init}/root${path}`;
  }

  /** Starts containerd, and waits until it answers `ctr` and the CRI. */
  async startContainerd(): Promise<void> {
    await this.sh(`
      setsid containerd -c /run/containerd.toml >> /run/containerd.log 2>&1 &
      echo $! > /run/containerd.pid`);
    this.#client?.close();
    this.#client = undefined;
    await until("containerd answers", async () => {
      const { code } = await this.run("timeout 5 ctr version");
      const status = code === 0 && this.cri("Status").catch(() => false);
      return !!await status;
    });
  }

  /** Kills containerd. Its containers go on. */
  async killContainerd(): Promise<void> {
    await this.sh("kill -9 $(cat /run/containerd.pid)");
  }

  /** Gives an image to containerd, in one of its namespaces. */
  async loadImage(namespace: string): Promise<void> {
    await this.sh(`ctr -n ${namespace} images import ${DEBS}/box.tar`);
  }

  /** Calls a method of the CRI's RuntimeService. */
  cri(method: string, request: Message = {}): Promise<Message> {
    this.#client ??= new Service(
      `unix:${this.path(SOCKET)}`,
      grpc.credentials.createInsecure(),
    );
    const client = this.#client as Message;
    const deadline = Date.now() + 60_000;
    return new Promise((resolve, reject) =>
      client[method](
        request,
        { deadline },
        (error: Error | null, response: Message) =>
          error ? reject(error) : resolve(response),
      )
    );
  }

  /** RunPodSandbox, as a kubelet calls it; returns its ID. */
  async runSandbox(name: string): Promise<{ id: string; config: Message }> {
    const config = {
      metadata: { name, uid: crypto.randomUUID(), namespace: "default" },
      hostname: name,
      log_directory: "/run",
      linux: {},
    };
    const { pod_sandbox_id: id } = await this.cri("RunPodSandbox", { config });
    return { id, config };
  }

  /** Starts a container in a sandbox, and returns its ID. */
  async runContainer(
    sandbox: { id: string; config: Message },
    ...args: string[]
  ): Promise<string> {
    const { container_id } = await this.cri("CreateContainer", {
      pod_sandbox_id: sandbox.id,
      sandbox_config: sandbox.config,
      config: { metadata: { name: "box" }, image: { image: IMAGE }, args },
    });
    await this.cri("StartContainer", { container_id });
    return container_id;
  }

  /** The address that PodSandboxStatus reports. */
  async address({ id }: { id: string }): Promise<string> {
    const request = { pod_sandbox_id: id };
    return (await this.cri("PodSandboxStatus", request)).status.network.ip;
  }

  /** ExecSync: runs a command in a container; throws if it fails. */
  async exec(container_id: string, ...cmd: string[]): Promise<string> {
    const request = { container_id, cmd, timeout: 20 };
    const { exit_code, stdout, stderr } = await this.cri("ExecSync", request);
    if (exit_code) throw new Error(`${cmd.join(" ")}: ${stderr}${stdout}`);
    return `${stdout}`;
  }

  /** StopPodSandbox and RemovePodSandbox. */
  async removeSandbox({ id }: { id: string }): Promise<void> {
    await this.cri("StopPodSandbox", { pod_sandbox_id: id });
    await this.cri("RemovePodSandbox", { pod_sandbox_id: id });
  }

  /**
   * What the plugin, later plugins and libcni could leave behind, as lines:
   * links except the bridge, names of namespaces, rules, results.
   */
  async leftovers(): Promise<string[]> {
    const found = await this.sh(`
      ip -br link show type ifb
      ip -br link show type veth | grep -vE '^(enp0s3|outside0)' || :
      ls -A /run/netns 2> /dev/null || :
      iptables-save | grep -E 'CNI-[DS]N-|10\\.240\\.[0-9.]+/32' || :
      tc qdisc show | grep -E 'tbf|ingress' || :
      ls -A /var/lib/cni/results 2> /dev/null || :`);
    return found.split("\n").filter((line) => line);
  }
}

const Service = await (async () => {
  const proto = join(DEBS, "cri-forky", API);
  if (!await exists(proto)) throw new Error("Run this first: deno task e2e");
  const definition = loadSync(proto, { keepCase: true, defaults: true });
  const { runtime } = grpc.loadPackageDefinition(definition) as Message;
  return runtime.v1.RuntimeService;
})();

/** Waits until something is so, by default at most half a minute. */
export async function until(
  what: string,
  isSo: () => Promise<boolean>,
  seconds = 30,
): Promise<void> {
  const end = Date.now() + seconds * 1000;
  while (!await isSo()) {
    if (Date.now() > end) {
      throw new Error(`Not within ${seconds} seconds: ${what}`);
    }
    await new Promise((resume) => setTimeout(resume, 100));
  }
}

/** Steps that build upon each other: after a failed one none runs. */
export function inOrder(t: Deno.TestContext) {
  return async (name: string, run: () => Promise<void>): Promise<void> => {
    if (!await t.step(name, run)) throw new Error(`No step after "${name}"`);
  };
}
