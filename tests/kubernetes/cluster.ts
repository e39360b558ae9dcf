/**
 * A real Kubernetes on the lab's two nodes, with this plugin as its network.
 * node1 has the control plane. Each node has containerd, a kubelet and a
 * kube-proxy.
 *
 *     await using kubernetes = await Kubernetes.start();
 *     await kubernetes.install();
 *     await kubernetes.kubectl("get nodes");
 *
 * All of it ends with this program, even if that is killed.
 *
 * @module
 */
import { Cluster } from "../lab/cluster.ts";
import { Runtimes, until } from "../runtimes/runtimes.ts";
import { conf, type Node, type Output } from "../lab/node.ts";
import { ROOT } from "../setup/root.ts";

const ADDRESSES = { node1: "10.0.2.14", node2: "10.0.2.15" };
const PODS = "10.240.0.0/16"; // the pod CIDRs of all nodes
// On a busy machine the allocator of pod CIDRs skips one. Here it has no other.
const TWO_NODES = "10.240.0.0/23";
const SERVICES = "10.96.0.0/16";
const KUBECONFIG = "/etc/kubernetes/admin.conf";

/** Installs the plugin on a node, as in the README. */
export const INSTALL = `install -dm700 /opt/cni/bin/.custom-cni
cp dist/custom-cni /opt/cni/bin/custom-cni.new
mv /opt/cni/bin/custom-cni.new /opt/cni/bin/custom-cni`;

/** Adds a node's rules and routes. */
export const SETUP =
  "kubectl get nodes -o json | deno run -A node-setup.ts --nodes -";

/** The variables of a shell on a node. HOME is for kubectl's cache. */
const ENV = {
  KUBECONFIG,
  HOME: "/run/home",
  PATH: `${Deno.execPath().replace(/[^/]*$/, "")}:${Deno.env.get("PATH")}`,
};

/** The daemons and their flags, in the order in which they start. */
const FLAGS = {
  etcd: "--data-dir=/var/lib/etcd",
  // The token allows everything. The apiserver creates a certificate for
  // itself, and its key also signs the service accounts' tokens. Without
  // InternalIP `kubectl exec` would look up the node's name in DNS.
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
  // 0 leaves the limit of tracked connections alone: it is the whole machine's.
  "kube-proxy": `--kubeconfig=${KUBECONFIG} --proxy-mode=iptables
    --cluster-cidr=${PODS} --conntrack-max-per-core=0 --oom-score-adj=0`,
};

/** A program of Kubernetes, as it runs on a node. */
export type Daemon = keyof typeof FLAGS;

/** The files in /etc/kubernetes. */
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
  // The node only has the cgroups of its pods. The disk is the machine's: the
  // kubelet must not evict pods if it is full.
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
 * A kubelet insists on certain settings of the whole machine. Here it writes
 * them to files that cover the real ones, and that nobody else sees.
 */
const SETTINGS = `cd /proc/sys
for key in vm/overcommit_memory vm/panic_on_oom kernel/panic \
    kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
  mkdir -p /run/sys/$(dirname $key)
  cat $key > /run/sys/$key
  mount --bind /run/sys/$key $key
done`;

/** Where containerd gets the images nginx and alpine. */
const REGISTRY = `
[plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]
  endpoint = ["http://10.0.2.2:5000"]`;

/** A node with containerd and Kubernetes' daemons. */
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
    await runtimes.loadImage("k8s.io"); // for the sandboxes
    return node;
  }

  get name(): string {
    return this.runtimes.node.name;
  }

  /** Its pod CIDR, as in the tutorial. */
  get podCIDR(): string {
    return this.name === "node1" ? "10.240.1.0/24" : "10.240.0.0/24";
  }

  /** A path of the node, seen from outside. */
  path(path: string): string {
    return this.runtimes.path(path);
  }

  /** Runs a shell line in the repository's folder, whatever its status. */
  run(line: string): Promise<Output> {
    return this.runtimes.run(`cd '${ROOT}'\n${line}`, ENV);
  }

  /** The same; it must succeed. */
  sh(line: string): Promise<string> {
    return this.runtimes.sh(`cd '${ROOT}'\n${line}`, ENV);
  }

  /** Starts a daemon. Its log is /var/log/NAME.log. */
  async start(daemon: Daemon): Promise<void> {
    const ip = ADDRESSES[this.name as keyof typeof ADDRESSES];
    const flags = FLAGS[daemon].replaceAll(/\s+/g, " ").replace("$IP", ip);
    await this.sh(`setsid ${daemon} ${flags} >> /var/log/${daemon}.log 2>&1 &
      echo $! > /run/${daemon}.pid`);
  }

  /** Kills a daemon. Its pods go on. */
  async kill(daemon: Daemon): Promise<void> {
    await this.sh(`kill -9 $(cat /run/${daemon}.pid)`);
  }

  /** Installs the plugin and its conf, with some keys changed. */
  async install(keys: Record<string, unknown> = {}): Promise<void> {
    await this.sh(`mkdir -p /opt/cni/bin /etc/cni/net.d\n${INSTALL}`);
    const own = conf({ podcidr: this.podCIDR, ...keys });
    await this.runtimes.node.configure(own);
  }
}

/** A cluster of two nodes. `await using` ends all of it. */
export class Kubernetes implements AsyncDisposable {
  private constructor(
    readonly lab: Cluster,
    readonly node1: KubernetesNode,
    readonly node2: KubernetesNode,
  ) {}

  /** Starts it without a network, so the nodes are not ready. */
  static async start(): Promise<Kubernetes> {
    const lab = await Cluster.start(null);
    const registry = `${Deno.execPath()} run -A tests/kubernetes/registry.ts`;
    await lab.router.sh(`cd '${ROOT}'
      sh -c 'echo $$ >> /run/background; exec ${registry}' \
        > /run/registry.log 2>&1 &`);
    const machines = [lab.node1, lab.node2];
    const [node1, node2] = await Promise.all(
      machines.map((machine) => KubernetesNode.on(machine)),
    );
    const kubernetes = new Kubernetes(lab, node1, node2);
    await kubernetes.#startControlPlane();
    // Nodes get pod CIDRs in the order in which they register: node2 first.
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

  /** Installs the plugin on both nodes, and waits until they are ready. */
  async install(keys?: Record<string, unknown>): Promise<void> {
    for (const node of this.nodes) await node.install(keys);
    const ready = "wait --for=condition=Ready node --all --timeout=60s";
    await this.node1.sh(`kubectl ${ready}`);
  }

  /** Runs kubectl on node1, whatever its status. */
  kubectl(line: string): Promise<Output> {
    return this.node1.run(`kubectl ${line}`);
  }

  /** Waits at most two minutes until kubectl gives a certain answer. */
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
