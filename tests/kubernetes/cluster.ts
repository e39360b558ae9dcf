/**
 * A real Kubernetes on the lab's two nodes, with this plugin as its network:
 * the control plane on node1, and on each node what makes it one, containerd,
 * a kubelet and a kube-proxy.
 *
 *     await using kubernetes = await Kubernetes.start();
 *     await kubernetes.install();
 *     await kubernetes.kubectl("get nodes");
 *
 * All of it ends with this program, however that ends.
 *
 * @module
 */
import { Cluster } from "../lab/cluster.ts";
import { Runtimes, until } from "../runtimes/runtimes.ts";
import { conf, type Node, type Output } from "../lab/node.ts";
import { ROOT } from "../setup/root.ts";

const ADDRESSES = { node1: "10.0.2.14", node2: "10.0.2.15" };
const PODS = "10.240.0.0/16"; // of all nodes, each gets a /24 of it
// The allocator of ranges skips one where the machine is busy: let none be left.
const TWO_NODES = "10.240.0.0/23";
const SERVICES = "10.96.0.0/16";
const KUBECONFIG = "/etc/kubernetes/admin.conf";

/** What gives a node the plugin, as the README has it. */
export const INSTALL = `install -dm700 /opt/cni/bin/.custom-cni
cp dist/custom-cni /opt/cni/bin/custom-cni.new
mv /opt/cni/bin/custom-cni.new /opt/cni/bin/custom-cni`;

/** What gives a node its rules and routes, and all that it needs for them. */
export const SETUP =
  "kubectl get nodes -o json | deno run -A node-setup.ts --nodes -";

/** What a shell on a node knows; HOME is where kubectl keeps its cache. */
const ENV = {
  KUBECONFIG,
  HOME: "/run/home",
  PATH: `${Deno.execPath().replace(/[^/]*$/, "")}:${Deno.env.get("PATH")}`,
};

/** The daemons and their flags, in the order in which they start. */
const FLAGS = {
  etcd: "--data-dir=/var/lib/etcd",
  // Whoever has the token may do all. The key of the certificate that the
  // apiserver makes for itself signs the service accounts' tokens as well.
  // Without InternalIP `kubectl exec` looks for the node's name in DNS.
  "kube-apiserver": `--etcd-servers=http://127.0.0.1:2379 --secure-port=6443
    --advertise-address=${ADDRESSES.node1} --allow-privileged
    --service-cluster-ip-range=${SERVICES} --authorization-mode=AlwaysAllow
    --token-auth-file=/etc/kubernetes/tokens --cert-dir=/run/kubernetes
    --service-account-issuer=https://kubernetes.default
    --service-account-key-file=/run/kubernetes/apiserver.key
    --service-account-signing-key-file=/run/kubernetes/apiserver.key
    --disable-admission-plugins=ServiceAccount
    --kubelet-preferred-address-types=InternalIP`,
  "kube-controller-manager": `--kubeconfig=${KUBECONFIG} --leader-elect=false
    --allocate-node-cidrs --cluster-cidr=${TWO_NODES}
    --service-cluster-ip-range=${SERVICES}
    --service-account-private-key-file=/run/kubernetes/apiserver.key`,
  "kube-scheduler": `--kubeconfig=${KUBECONFIG} --leader-elect=false`,
  // These run on every node.
  kubelet: `--kubeconfig=${KUBECONFIG} --config=/etc/kubernetes/kubelet.json
    --container-runtime=remote --node-ip=$IP
    --container-runtime-endpoint=unix:///run/containerd/containerd.sock`,
  // How many connections are tracked is a setting of the whole machine: as is.
  "kube-proxy": `--kubeconfig=${KUBECONFIG} --proxy-mode=iptables
    --cluster-cidr=${PODS} --conntrack-max-per-core=0 --oom-score-adj=0`,
};

/** A program of Kubernetes, as it runs on a node. */
export type Daemon = keyof typeof FLAGS;

/** What the files in /etc/kubernetes say. */
const FILES = {
  tokens: "lab,admin,admin,system:masters\n",
  "admin.conf": JSON.stringify({
    ...{ apiVersion: "v1", kind: "Config", "current-context": "lab" },
    contexts: [{ name: "lab", context: { cluster: "lab", user: "admin" } }],
    users: [{ name: "admin", user: { token: "lab" } }],
    clusters: [{
      name: "lab",
      cluster: {
        server: `https://${ADDRESSES.node1}:6443`,
        "insecure-skip-tls-verify": true,
      },
    }],
  }),
  // The node has no cgroups but those of its pods, and the disk is the
  // machine's: a kubelet that finds it full is not to end pods.
  "kubelet.json": JSON.stringify({
    apiVersion: "kubelet.config.k8s.io/v1beta1",
    kind: "KubeletConfiguration",
    authentication: {
      anonymous: { enabled: true },
      webhook: { enabled: false },
    },
    authorization: { mode: "AlwaysAllow" },
    ...{ cgroupDriver: "cgroupfs", cgroupsPerQOS: false },
    ...{ enforceNodeAllocatable: [], oomScoreAdj: 0, failSwapOn: false },
    evictionHard: { "memory.available": "0%", "nodefs.available": "0%" },
    imageGCHighThresholdPercent: 100,
    ...{ resolvConf: "", volumePluginDir: "/var/lib/kubelet/volumeplugins" },
  }),
};

/**
 * A kubelet insists on values for some settings of the whole machine. Here it
 * writes to files that cover them, which nobody else sees.
 */
const SETTINGS = `cd /proc/sys
for key in vm/overcommit_memory vm/panic_on_oom kernel/panic \
    kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
  mkdir -p /run/sys/$(dirname $key)
  cat $key > /run/sys/$key
  mount --bind /run/sys/$key $key
done`;

/** Where containerd looks for what pods call nginx and alpine. */
const REGISTRY = `
[plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]
  endpoint = ["http://10.0.2.2:5000"]`;

/** A node with containerd, and with the daemons that are started on it. */
export class KubernetesNode {
  private constructor(readonly runtimes: Runtimes) {}

  /** Puts the programs on a node of the lab, and starts containerd. */
  static async on(lab: Node): Promise<KubernetesNode> {
    const runtimes = await Runtimes.on(lab, ["kubernetes", "bookworm"]);
    const node = new KubernetesNode(runtimes);
    await node.sh(`${SETTINGS}
      echo '${REGISTRY}' >> /run/containerd.toml
      mkdir -p /etc/kubernetes /run/home
      sed -i '2i export KUBECONFIG=${KUBECONFIG} HOME=${ENV.HOME}' /run/shell`);
    for (const [name, text] of Object.entries(FILES)) {
      await Deno.writeTextFile(node.path(`/etc/kubernetes/${name}`), text);
    }
    await runtimes.startContainerd();
    await runtimes.loadImage("k8s.io"); // that of every sandbox
    return node;
  }

  get name(): string {
    return this.runtimes.node.name;
  }

  /** Its range of pods, as in the tutorial. */
  get podCIDR(): string {
    return this.name === "node1" ? "10.240.1.0/24" : "10.240.0.0/24";
  }

  /** A path of the node, seen from outside. */
  path(path: string): string {
    return this.runtimes.path(path);
  }

  /** Runs a shell line in the repository's folder, whatever its status. */
  run(line: string): Promise<Output> {
    return this.runtimes.run(`cd ${ROOT}\n${line}`, ENV);
  }

  /** The same, and throws unless it succeeds. */
  sh(line: string): Promise<string> {
    return this.runtimes.sh(`cd ${ROOT}\n${line}`, ENV);
  }

  /** Starts a daemon; what it says is in /var/log/NAME.log. */
  async start(daemon: Daemon): Promise<void> {
    const ip = ADDRESSES[this.name as keyof typeof ADDRESSES];
    const flags = FLAGS[daemon].replaceAll(/\s+/g, " ").replace("$IP", ip);
    await this.sh(`setsid ${daemon} ${flags} >> /var/log/${daemon}.log 2>&1 &
      echo $! > /run/${daemon}.pid`);
  }

  /** Ends a daemon as the kernel would; its pods go on. */
  async kill(daemon: Daemon): Promise<void> {
    await this.sh(`kill -9 $(cat /run/${daemon}.pid)`);
  }

  /** Installs the plugin and its conf, whose keys may be others. */
  async install(keys: Record<string, unknown> = {}): Promise<void> {
    await this.sh(`mkdir -p /opt/cni/bin /etc/cni/net.d\n${INSTALL}`);
    const own = conf({ podcidr: this.podCIDR, ...keys });
    await this.runtimes.node.configure(own);
  }
}

/** A cluster of two nodes; `await using` ends all of it. */
export class Kubernetes implements AsyncDisposable {
  private constructor(
    readonly lab: Cluster,
    readonly node1: KubernetesNode,
    readonly node2: KubernetesNode,
  ) {}

  /** Starts it, without a network: the nodes are there, and not ready. */
  static async start(): Promise<Kubernetes> {
    const lab = await Cluster.start(null);
    const registry = `${Deno.execPath()} run -A tests/kubernetes/registry.ts`;
    await lab.router.sh(`cd ${ROOT}
      sh -c 'echo $$ >> /run/background; exec ${registry}' \
        > /run/registry.log 2>&1 &`);
    const machines = [lab.node1, lab.node2];
    const [node1, node2] = await Promise.all(
      machines.map((machine) => KubernetesNode.on(machine)),
    );
    const kubernetes = new Kubernetes(lab, node1, node2);
    await kubernetes.#startControlPlane();
    // Ranges are given in the order in which nodes come: node2 has the first.
    for (const node of [node2, node1]) {
      await node.start("kubelet");
      await kubernetes.until(
        `get node ${node.name} -o jsonpath={.spec.podCIDR}`,
        (stdout) => stdout === node.podCIDR,
      );
      await node.start("kube-proxy");
    }
    return kubernetes;
  }

  async #startControlPlane(): Promise<void> {
    await this.node1.start("etcd");
    await this.node1.start("kube-apiserver");
    await this.until("get --raw /readyz", (stdout) => stdout === "ok");
    await this.node1.start("kube-controller-manager");
    await this.node1.start("kube-scheduler");
  }

  /** Ends the cluster, and both nodes. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const { runtimes } of this.nodes) {
      await runtimes[Symbol.asyncDispose]();
    }
    await this.lab[Symbol.asyncDispose]();
  }

  get nodes(): KubernetesNode[] {
    return [this.node1, this.node2];
  }

  /** Installs the plugin on both nodes, and returns when they are ready. */
  async install(keys?: Record<string, unknown>): Promise<void> {
    for (const node of this.nodes) await node.install(keys);
    const ready = "wait --for=condition=Ready node --all --timeout=60s";
    await this.node1.sh(`kubectl ${ready}`);
  }

  /** Runs kubectl on node1, whatever its status. */
  kubectl(line: string): Promise<Output> {
    return this.node1.run(`kubectl ${line}`);
  }

  /** Waits for at most two minutes until kubectl answers so. */
  async until(line: string, isSo: (stdout: string) => boolean): Promise<void> {
    let last = "";
    const asked = async () => {
      const { stdout, stderr } = await this.kubectl(line);
      last = stdout + stderr;
      return isSo(stdout);
    };
    await until(`kubectl ${line}`, asked, 120).catch(async ({ message }) => {
      const { stdout } = await this.node1.run("tail -n 3 /var/log/*.log");
      throw new Error([message, last, stdout].join("\n"));
    });
  }
}
