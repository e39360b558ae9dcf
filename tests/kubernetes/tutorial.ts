/**
 * The tutorial on a real Kubernetes, step by step: what fails before a command
 * works after it. Every line that follows a prompt was run, every output is
 * real.
 *
 *     deno task kubernetes
 *
 * @module
 */
import { readPods } from "../lab/cluster.ts";
import { until } from "../runtimes/runtimes.ts";
import {
  expect,
  readFlags,
  say,
  show,
  type Step,
  untilCtrlC,
  walk,
} from "../lab/walk.ts";
import { INSTALL, Kubernetes, type KubernetesNode, SETUP } from "./cluster.ts";

const HELP =
  `Walks through the tutorial on a real Kubernetes: two nodes, on this machine.

  --step N   stop after step N (1 to 6)
  --keep     leave the cluster standing at the end, until Ctrl-C
  --quiet    one line a step
  --help     this text`;

type Wish = "works" | "fails";

/** The cluster, its pods' addresses once they are known, and what it took. */
interface World {
  kubernetes: Kubernetes;
  started: number;
  addresses: Record<string, string>;
  figures: string[];
}

const INTERNET = "203.0.113.8";

/** Runs a shell line on a node, and shows it. */
async function type(
  node: KubernetesNode,
  line: string,
  wish: Wish = "works",
): Promise<string> {
  const { code, stdout, stderr } = await node.run(line);
  show(node.name, line, stdout + stderr);
  expect((code === 0) === (wish === "works"), `${line} ${wish}`);
  return stdout + stderr;
}

/** A request from a pod, or from a node, that must work, or fail. */
async function request(
  { node1, nodes }: Kubernetes,
  from: string,
  to: string,
  wish: Wish = "works",
): Promise<string> {
  const wget = `wget -qO- http://${to}/`;
  const node = nodes.find(({ name }) => name === from);
  return await (node
    ? type(node, `timeout 2 busybox ${wget}`, wish)
    : type(node1, `kubectl exec ${from} -- timeout 2 ${wget}`, wish));
}

/** Seconds, since then, for a reader. */
const since = (then: number) => `${((Date.now() - then) / 1000).toFixed(0)} s`;

const STEPS: Step<World>[] = [
  { title: "A node without a plugin is not ready", run: nodes },
  { title: "Every pod gets an address", run: pods },
  { title: "Pod to pod on one node: FORWARD", run: sameNode },
  { title: "Pod to pod across nodes: routes", run: acrossNodes },
  { title: "Pod to the internet: MASQUERADE", run: internet },
  { title: "A Service: kube-proxy rewrites, pods answer", run: service },
];

/** Step 1: what the kubelet waits for. */
async function nodes({ kubernetes, started, figures }: World): Promise<void> {
  const { node1, node2 } = kubernetes;
  say(`
The control plane is on node1, and on both nodes there are a containerd, a
kubelet and a kube-proxy. The kubelets have registered their nodes, and wait.`);
  const before = await type(node1, "kubectl get nodes");
  expect(before.match(/NotReady/g)?.length === 2, "both nodes are not ready");
  const words = await type(
    node1,
    "kubectl describe node node2 | grep -o 'runtime network not ready.*'",
  );
  expect(words.includes("cni plugin not initialized"), "the kubelet waits");
  say(`
The plugin and its conf, on each node, as the README has it. The podcidr is the
range that Kubernetes gave to the node.`);
  const columns = "custom-columns=NAME:.metadata.name,CIDR:.spec.podCIDR";
  await type(node1, `kubectl get nodes -o ${columns}`);
  for (
    const [node, conf] of [
      [node2, "cp 10-custom-cni.conf"],
      [node1, "sed 's,10.240.0.0/24,10.240.1.0/24,' 10-custom-cni.conf >"],
    ] as const
  ) {
    const copy = `${conf} /etc/cni/net.d/10-custom-cni.conf`;
    await type(node, `${INSTALL}\n${copy}`);
  }
  say(`
containerd sees the files within seconds, and a kubelet tells every ten seconds
how its node is.`);
  const ready = "kubectl wait --for=condition=Ready node --all --timeout=60s";
  await type(node1, ready);
  figures.push(`${since(started)} from nothing to ready nodes`);
  const after = await type(node1, "kubectl get nodes");
  expect(after.match(/ Ready/g)?.length === 2, "both nodes are ready");
}

/** Step 2: the pods of pods.yaml. */
async function pods({ kubernetes, addresses, figures }: World): Promise<void> {
  const { node1, node2 } = kubernetes;
  say(`
There are no pods yet. Those of pods.yaml come from a registry on the router: by
these names it has busybox, and an nginx that says whose request it answers.`);
  await type(node1, "kubectl exec alpine1 -- true", "fails");
  const started = Date.now();
  await type(node1, "kubectl apply -f pods.yaml");
  const ready = "kubectl wait --for=condition=Ready pod --all --timeout=60s";
  await type(node1, ready);
  figures.push(`${since(started)} from there to running pods`);
  await type(node1, "kubectl get pods -o wide");
  for (const { name } of await readPods()) {
    const path = "-o jsonpath={.status.podIP}";
    const { stdout } = await kubernetes.kubectl(`get pod ${name} ${path}`);
    addresses[name] = stdout;
  }
  // Which of node2's two pods is first is left to the kubelet.
  const expected = ["10.240.0.2", "10.240.0.3", "10.240.1.2"];
  const given = Object.values(addresses).sort();
  expect(`${given}` === `${expected}`, `the addresses are ${expected}`);
  say(`
The kubelet asked containerd for them, and containerd the plugin, which has a
line for each in its log.`);
  await type(node2, "cat /var/log/cni.log");
}

/** Asks all three from alpine1, and tells which of them answer. */
async function ask(
  { kubernetes, addresses: { nginx1, nginx2 } }: World,
  ...wishes: [nginx1: Wish, nginx2: Wish, internet: Wish]
): Promise<void> {
  for (const [n, to] of [nginx1, nginx2, INTERNET].entries()) {
    await request(kubernetes, "alpine1", to, wishes[n]);
  }
}

/** Runs node-setup.ts on both nodes. */
async function setup({ kubernetes }: World, flags = ""): Promise<void> {
  for (const node of kubernetes.nodes) await type(node, SETUP + flags);
}

/** Step 3: why a bridge alone is not enough. */
async function sameNode(world: World): Promise<void> {
  say(`
alpine1 asks nginx1 on its own node, nginx2 on the other, and the internet, for
which ${INTERNET} stands. FORWARD drops all of it, also between two pods on one
bridge: the rules that kube-proxy has added accept only what is its own.`);
  await type(world.kubernetes.node2, "iptables -S FORWARD");
  await ask(world, "fails", "fails", "fails");
  say(`
Two rules on each node let pass what comes from its pods and what goes to them.
Kubernetes knows all nodes, their addresses and their ranges, so node-setup.ts
need not be told.`);
  await setup(world, " --only forward");
  await ask(world, "works", "fails", "fails");
}

/** Step 4: who knows where the other node's pods are. */
async function acrossNodes(world: World): Promise<void> {
  say(`
nginx1 answers. Now each node learns where the other's pods are.`);
  await setup(world, " --only routes");
  await ask(world, "works", "works", "fails");
}

/** Step 5: a source that the internet can answer. */
async function internet(world: World): Promise<void> {
  say(`
nginx2 answers as well. The internet has no way back to a pod's address, so the
node's takes its place. This is all of node-setup.ts, as an operator runs it.`);
  await setup(world);
  await ask(world, "works", "works", "works");
}

/** Step 6: an address that is no host's. */
async function service({ kubernetes, addresses }: World): Promise<void> {
  const { node1, node2 } = kubernetes;
  const expose = "kubectl expose pod nginx2 --name=nginx2 --port=8000 " +
    "--target-port=80";
  say(`
A Service finds its pods by their labels, and nginx2 has none yet.`);
  await type(node1, expose, "fails");
  await type(node1, "kubectl label pods nginx2 app=nginx2");
  await type(node1, expose);
  await type(node1, "kubectl get services");
  const { stdout: ip } = await kubernetes.kubectl(
    "get service nginx2 -o jsonpath={.spec.clusterIP}",
  );
  for (const node of kubernetes.nodes) {
    const rules = async () => (await node.run("iptables-save -t nat")).stdout;
    const isThere = async () =>
      (await rules()).includes(`--to-destination ${addresses.nginx2}:80`);
    await until(`kube-proxy of ${node.name} knows nginx2`, isThere);
  }
  say(`
On both nodes kube-proxy has written rules that turn that address and its port
8000 into nginx2's own and port 80. Nothing else is needed: pods and nodes reach
it, and so does nginx2 itself.`);
  for (const from of ["alpine1", "nginx1", "nginx2", "node1", "node2"]) {
    const seen = await request(kubernetes, from, `${ip}:8000`);
    expect(seen.startsWith("nginx2"), `${from} reaches nginx2`);
  }
  const rules = await type(node2, "iptables -t nat -n -L KUBE-SERVICES");
  expect(rules.includes(ip), "KUBE-SERVICES has the Service");
}

/** The end: what was set up is taken back, and nothing is left. */
async function end({ kubernetes }: World): Promise<void> {
  const { node1, node2, nodes } = kubernetes;
  say("\nThe pods end: the kubelet has them stopped, containerd calls DEL.");
  await type(node1, "kubectl delete pod --all --grace-period=1");
  for (const node of nodes) {
    await until(
      `no network is left on ${node.name}`,
      async () => (await node.runtimes.leftovers()).length === 0,
    );
  }
  const left = await type(node2, "ip link show master cni0; ls /run/netns");
  expect(left.trim() === "", "nothing is left of the pods");
  await type(node2, "cut -d ' ' -f 2,4- /var/log/cni.log");
  await setup({ kubernetes } as World, " --delete");
}

/** How much memory all processes of the cluster have, each page once. */
async function memory({ nodes }: Kubernetes): Promise<string> {
  const add =
    "cat /proc/[0-9]*/smaps_rollup | awk '/^Pss:/ {s += $2} END {print s}'";
  const sizes = await Promise.all(nodes.map((node) => node.sh(add)));
  const sum = sizes.reduce((sum, size) => sum + Number(size), 0);
  return `${Math.round(sum / 1024)} MiB of memory`;
}

/** How long the plugin took for each ADD, as its log has it. */
async function durations({ nodes }: Kubernetes): Promise<string> {
  const find = `grep ' ADD ' /var/log/cni.log | grep -oE '[0-9]+ ms' || :`;
  const found = await Promise.all(nodes.map((node) => node.sh(find)));
  return `ADD ${found.flatMap((lines) => lines.split("\n")).join(", ")}`;
}

/** Leaves the cluster standing until Ctrl-C, and tells how to get in. */
async function keep({ kubernetes }: World): Promise<void> {
  console.log("\nThe cluster stays. From another terminal, as root:\n");
  for (const { name, runtimes } of kubernetes.nodes) {
    console.log(
      `  ${name.padEnd(8)} ${runtimes.enter("/run/shell").join(" ")}`,
    );
  }
  const { router } = kubernetes.lab;
  console.log(`  router   ${router.enter("/run/shell").join(" ")}`);
  console.log(`
In the nodes there is kubectl, and with it a shell in a pod:

  kubectl get pods -o wide
  kubectl exec -it alpine1 -- sh`);
  await untilCtrlC();
}

if (import.meta.main) {
  const { last, keep: isKept } = readFlags(HELP, STEPS.length);
  const started = Date.now();
  await using kubernetes = await Kubernetes.start();
  const world: World = { kubernetes, started, addresses: {}, figures: [] };
  await walk(STEPS.slice(0, last), world);
  world.figures.push(await memory(kubernetes), await durations(kubernetes));
  console.log(`\nIt took ${world.figures.join(", ")}`);
  await (isKept ? keep(world) : end(world));
}
