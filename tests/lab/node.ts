/**
 * A Kubernetes node without Kubernetes: one process in its own namespaces, where
 * the plugin finds its real paths. A few lines do the work of a kubelet's
 * container runtime.
 *
 * The machine stays as it is. Links, rules and files belong to the namespaces,
 * and these end with this program.
 *
 * @module
 */
import { join } from "@std/path/posix/join";
import { ROOT } from "../setup/root.ts";

export const BINARY = join(ROOT, "dist/custom-cni");
/** What `deno compile` builds upon, for DENORT_BIN. */
export const DENORT = join(ROOT, "vendor/denort");
export const CONF_FILE = "/etc/cni/net.d/10-custom-cni.conf";
export const NODE_SETUP = [
  ...[Deno.execPath(), "run", "-A", join(ROOT, "node-setup.ts")],
];
export const CONF = JSON.parse(
  Deno.readTextFileSync(join(ROOT, "10-custom-cni.conf")),
);

/** A command's exit status and output. */
export interface Output {
  code: number;
  stdout: string;
  stderr: string;
}

/** What a runtime passes to a plugin, if it is not the usual. */
export interface CallOptions {
  conf?: unknown;
  /** Variables to set; undefined leaves one out. */
  env?: Record<string, string | undefined>;
  plugin?: string;
  /** When to send SIGKILL, in milliseconds. */
  killAfter?: number;
}

/** What a plugin answered. */
export interface Answer extends Output {
  // deno-lint-ignore no-explicit-any -- a test looks at any key of the answer
  json: any;
}

/** A sandbox, as a container runtime makes it: a namespace with a name. */
export interface Pod {
  name: string;
  containerID: string;
  netns: string;
}

/** The tutorial's conf with some changes. */
export const conf = (changes: Record<string, unknown>) => ({
  ...CONF,
  ...changes,
});

/** The conf for the version that brought GC and STATUS. */
export const CONF_1_1 = conf({ cniVersion: "1.1.0" });

const PATH = Deno.env.get("PATH")!;

/** A PATH on which the scripts of `shim()` come first. */
export const SHIM_PATH = `/opt/shims:${PATH}`;

/** The pod's address in the result of ADD, without its prefix. */
export const addressOf = ({ json }: Answer): string =>
  json.ips[0].address.split("/")[0];

/** The host veth in the result of ADD. */
export const vethOf = ({ json }: Answer): string => json.interfaces[1].name;

/** Runs a command for at most two minutes. */
export async function run(
  command: string[],
  options: {
    stdin?: string;
    env?: Record<string, string>;
    killAfter?: number;
  } = {},
): Promise<Output> {
  const [program, ...args] = command;
  const child = new Deno.Command(program, {
    args,
    env: { LC_ALL: "C.UTF-8", ...options.env },
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
    signal: AbortSignal.timeout(120_000),
  }).spawn();
  const { killAfter } = options;
  const kill = killAfter === undefined ? 0 : setTimeout(() => {
    try {
      child.kill("SIGKILL");
    } catch {
      // It has just ended.
    }
  }, killAfter);
  const writer = child.stdin.getWriter();
  await writer.write(new TextEncoder().encode(options.stdin ?? ""))
    .then(() => writer.close())
    .catch(() => {}); // it ended without reading
  const { code, stdout, stderr } = await child.output();
  clearTimeout(kill);
  const decoder = new TextDecoder();
  return {
    code,
    stdout: decoder.decode(stdout),
    stderr: decoder.decode(stderr),
  };
}

/** Reads a program's output up to some words, and returns it. */
export async function hear(
  stream: ReadableStream<Uint8Array>,
  words: string,
): Promise<string> {
  const reader = stream.getReader();
  let said = "";
  while (!said.includes(words)) {
    const { value, done } = await reader.read();
    if (done) throw new Error(`It ended before it said "${words}": ${said}`);
    said += new TextDecoder().decode(value);
  }
  reader.releaseLock();
  return said;
}

/**
 * Turns a process into a node. It has its own network, mounts and name, and a
 * fresh sysfs shows that network. The checkout and Deno may lie in a folder that
 * is covered, so both are put back, read-only. /run/shell starts a shell that
 * finds them. `cat` waits for the end of its stdin, which comes when this
 * program ends, in whatever way.
 */
const NODE = `set -e
name=$1 root=$(realpath "$2") deno=$(dirname "$(realpath "$3")") binary=$4
mount --make-rprivate /
hostname "$name"
mount -t sysfs sysfs /sys
# Either may lie below /mnt, which is covered next.
exec 3< "$root" 4< "$deno"
mount -t tmpfs tmpfs /mnt
cd /mnt
mkdir upper work root deno
mount --no-canonicalize --bind /proc/self/fd/3 root
mount --no-canonicalize --bind /proc/self/fd/4 deno
exec 3<&- 4<&-
mount -t overlay -o lowerdir=/etc,upperdir=upper,workdir=work etc /etc
for folder in /opt /run /var/log /tmp; do
  mount -t tmpfs -o mode=755 tmpfs $folder
done
chmod 1777 /tmp
for kept in root deno; do
  eval path=\\$$kept
  mkdir -p "$path"
  mount --bind $kept "$path"
  # In a user namespace a mount must keep these flags if it had them.
  mount -o remount,bind,ro,nosuid,nodev "$path"
done
cd /
umount -l /mnt
# tcpdump becomes another user. Only an installed package creates that user.
grep tcpdump /etc/passwd > /dev/null || {
  { cat /etc/passwd; echo tcpdump:x:0:0::/:/bin/sh; } > /run/passwd
  mount --bind /run/passwd /etc/passwd
}
mkdir -p /etc/cni /opt/cni/bin
mount -t tmpfs -o mode=755 tmpfs /etc/cni
mkdir /etc/cni/net.d
install -dm700 /opt/cni/bin/.custom-cni
if [ -n "$binary" ]; then
  touch /opt/cni/bin/custom-cni
  mount --bind "$binary" /opt/cni/bin/custom-cni
fi
cat > /run/shell << END
#!/bin/sh
cd "$root" && PATH="$deno:\\$PATH" PS1="\\\${1:-$name}# " exec bash --norc
END
chmod +x /run/shell
ip link set lo up
trap '' INT
echo ready
cat
[ ! -f /run/background ] || kill $(cat /run/background)`;

/** A node: `await using node = await Node.start("node1")`. */
export class Node implements AsyncDisposable {
  #process: Deno.ChildProcess;

  private constructor(readonly name: string, process: Deno.ChildProcess) {
    this.#process = process;
  }

  /** Starts a node. With a conf, the plugin is installed for a kubelet. */
  static async start(name: string, conf: unknown = CONF): Promise<Node> {
    const process = new Deno.Command("unshare", {
      args: [
        ...["--net", "--mount", "--uts", "sh", "-c", NODE],
        ...["sh", name, ROOT, Deno.execPath(), conf ? BINARY : ""],
      ],
      stdin: "piped",
      stdout: "piped",
      stderr: "inherit",
    }).spawn();
    const node = new Node(name, process);
    await hear(process.stdout, "ready");
    if (conf) await node.configure(conf);
    return node;
  }

  /** Ends the node with its namespaces, links and files. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#process.stdin.close();
    await this.#process.stdout.cancel();
    await this.#process.status;
  }

  /** The process that holds the namespaces. */
  get pid(): number {
    return this.#process.pid;
  }

  /** The path outside of a path on the node. */
  path(path: string): string {
    return `/proc/${this.pid}/root${path}`;
  }

  /** Writes the node's conf. */
  async configure(conf: unknown): Promise<void> {
    const file = this.path(CONF_FILE);
    await Deno.writeTextFile(file, JSON.stringify(conf, null, 2) + "\n");
  }

  /** The words that run a command in the node. */
  enter(...command: string[]): string[] {
    const namespaces = ["-n", "-m", "-u"];
    // Its root and folder, too: otherwise a lab in a chroot would leave it.
    const folders = ["-r", "-w"];
    return [
      ...["nsenter", `-t${this.pid}`, ...namespaces, ...folders, "--"],
      ...command,
    ];
  }

  /** Runs a command in the node; any exit status is fine. */
  run(...command: string[]): Promise<Output> {
    return run(this.enter(...command));
  }

  /** Runs a shell line in the node; throws if it fails. */
  async sh(line: string): Promise<string> {
    const { code, stdout, stderr } = await this.run("sh", "-c", line);
    if (code) throw new Error(`${this.name}# ${line}: ${stderr}${stdout}`);
    return stdout.trimEnd();
  }

  /** Makes a sandbox, as a runtime does before ADD. */
  async sandbox(name: string): Promise<Pod> {
    const id = crypto.randomUUID();
    await this.sh(`ip netns add cni-${id}`);
    const containerID = id.replaceAll("-", "");
    return { name, containerID, netns: `/var/run/netns/cni-${id}` };
  }

  /** Removes a sandbox, as a runtime does after DEL. */
  async remove(pod: Pod): Promise<void> {
    await this.sh(`ip netns del ${pod.netns.split("/").pop()}`);
  }

  /** Calls the plugin as a runtime does, with variables and the conf on stdin. */
  async cni(verb: string, pod?: Pod, call: CallOptions = {}): Promise<Answer> {
    const path = this.path(CONF_FILE);
    const conf = call.conf ?? await Deno.readTextFile(path);
    const variables = Object.entries({
      PATH,
      CNI_COMMAND: verb,
      CNI_CONTAINERID: pod?.containerID,
      CNI_NETNS: pod?.netns,
      CNI_IFNAME: pod && "eth0",
      CNI_ARGS: pod && `K8S_POD_NAMESPACE=default;K8S_POD_NAME=${pod.name}`,
      CNI_PATH: "/opt/cni/bin",
      ...call.env,
    }).flatMap(([key, value]) => value === undefined ? [] : `${key}=${value}`);
    const plugin = call.plugin ?? "/opt/cni/bin/custom-cni";
    const output = await run(this.enter("env", "-i", ...variables, plugin), {
      stdin: typeof conf === "string" ? conf : JSON.stringify(conf),
      killAfter: call.killAfter,
    });
    let json;
    try {
      json = JSON.parse(output.stdout);
    } catch {
      // Some verbs have no result.
    }
    return { ...output, json };
  }

  /** Makes a sandbox and calls ADD; throws if that fails. */
  async start(name: string, call?: CallOptions): Promise<Pod & Answer> {
    const pod = await this.sandbox(name);
    const answer = await this.cni("ADD", pod, call);
    if (answer.code) throw new Error(answer.stdout + answer.stderr);
    return { ...pod, ...answer };
  }

  /** The words that run a command in a pod. */
  enterPod(pod: Pod, ...command: string[]): string[] {
    const netns = pod.netns.split("/").pop()!;
    return this.enter("ip", "netns", "exec", netns, ...command);
  }

  /** Runs a shell line in a pod; throws if it fails. */
  in(pod: Pod, line: string): Promise<string> {
    return this.sh(`ip netns exec ${pod.netns.split("/").pop()} ${line}`);
  }

  /** Sends a packet there and back, from a pod or the node; throws if lost. */
  ping(to: string, from?: Pod, wait = 5): Promise<string> {
    const line = `ping -c1 -W${wait} ${to}`;
    return from ? this.in(from, line) : this.sh(line);
  }

  /** Writes the counter: n is the last number given. */
  async setCounter(n: number): Promise<void> {
    await this.sh(`echo ${n} > /tmp/last_allocated_ip`);
  }

  /**
   * Writes a script that replaces a program on SHIM_PATH. The script itself has
   * the usual PATH, so it finds the real program.
   */
  async shim(name: string, script: string): Promise<void> {
    await this.sh("mkdir -p /opt/shims");
    const text = `#!/bin/sh\nPATH="${PATH}"\n${script}\n`;
    const file = this.path(`/opt/shims/${name}`);
    await Deno.writeTextFile(file, text, { mode: 0o755 });
  }

  /** Starts a web server in a namespace. It ends with the node. */
  async serve(netns: string, greeting: string): Promise<void> {
    const folder = `/run/www/${netns.split("/").pop()}`;
    const answer = `#!/bin/sh\necho; echo "${greeting} sees $REMOTE_ADDR"\n`;
    await this.sh(`mkdir -p ${folder}/cgi-bin`);
    const script = this.path(`${folder}/cgi-bin/index.cgi`);
    await Deno.writeTextFile(script, answer, { mode: 0o755 });
    const server = `ip netns exec ${netns.split("/").pop()} \
      busybox httpd -f -p 0.0.0.0:80 -h ${folder}`;
    const line = `echo $$ >> /run/background; exec ${server}`;
    await this.sh(`sh -c '${line}' > /dev/null 2>&1 &`);
  }

  /**
   * Lists what a call may change, as text to compare: links, addresses, routes
   * and files of the node, and of a pod. The carrier is left out, since the
   * kernel settles it later, and so are the log and Deno's cache.
   */
  listing(pod?: Pod): Promise<string> {
    const netns = pod ? `"-n ${pod.netns.split("/").pop()}"` : "";
    return this.sh(`for n in "" ${netns}; do
        ip $n -o link; ip $n -o -4 addr; ip $n -4 route show table all
      done | sed -E 's/NO-CARRIER,|,M-DOWN|,LOWER_UP| linkdown//g
        s/ state [A-Z]+| link-netns(id)? [^ ]+//g'
      find /etc/cni /opt /run /tmp /var/log -xdev ! -name cni.log \
        ! -path '*/.custom-cni/*' -printf '%p %M %u %l\\n' | sort`);
  }
}
