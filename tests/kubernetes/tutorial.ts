/**
 * The tutorial on a real Kubernetes, step by step: what fails before a command
 * works after it. It runs every line that follows a prompt, and every output is
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
  --quiet    print one line a step
  --help     print this`;

type Wish = "works" | "fails";

/** The cluster, its pods' addresses, and figures for the last line. */
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

/** Requests a page from a pod or a node; it must work or fail, as wished. */
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

/** The seconds since a time, as text. */
const since = (then: number) => `${((Date.now() - then) / 1000).toFixed(0)} s`;

const STEPS: Step<World>[] = [
  { title: "A node without a plugin is not ready", run: nodes },
  { title: "Every pod gets an address", run: pods },
  { title: "Pod to pod on one node: FORWARD", run: sameNode },
  { title: "Pod to pod across nodes: routes", run: acrossNodes },
  { title: "Pod to the internet: MASQUERADE", run: internet },
  { title: "A Service: kube-proxy rewrites, pods answer", run: service },
];

/** Step 1: what a kubelet waits for. */
async function nodes({ kubernetes, started, figures }: World): Promise<void> {
  const { node1, node2 } = kubernetes;
  say(`
node1 has the control plane. Both nodes have containerd, a kubelet and a
kube-proxy. The kubelets have registered their nodes, and wait for a network.`);
  const before = await type(node1, "kubectl get nodes");
  expect(before.match(/NotReady/g)?.length === 2, "both nodes are not ready");
  const words = await type(
    node1,
    "kubectl describe node node2 | grep -o 'runtime network not ready.*'",
  );
  expect(words.includes("cni plugin not initialized"), "the kubelet waits");
  say(`
Install the plugin and its conf on each node, as in the README. The podcidr is
the pod CIDR that Kubernetes gave to the node.`);
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
containerd sees the files within seconds. A kubelet reports the state of its
node every ten seconds.`);
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
There are no pods yet. A registry on the router has the images of pods.yaml:
both are busybox, and this nginx says whose request it answers.`);
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
  // The kubelet chooses which of node2's two pods is first.
  const expected = ["10.240.0.2", "10.240.0.3", "10.240.1.2"];
  const given = Object.values(addresses).sort();
  expect(`${given}` === `${expected}`, `the addresses are ${expected}`);
  say(`
The kubelet called containerd for each pod, and containerd called the plugin.
The plugin's log has a line for each call.`);
  await type(node2, "cat /var/log/cni.log");
}

/** Sends requests from alpine1; each must work or fail, as wished. */
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
alpine1 calls nginx1 on its own node, nginx2 on the other one, and the internet:
${INTERNET} stands for it. FORWARD drops everything, even between two pods on
one bridge. The rules of kube-proxy accept only its own packets.`);
  await type(world.kubernetes.node2, "iptables -S FORWARD");
  await ask(world, "fails", "fails", "fails");
  say(`
Two rules on each node accept what comes from its pods and what goes to them.
node-setup.ts learns from Kubernetes all nodes, their addresses and their pod
CIDRs.`);
  await setup(world, " --only forward");
  await ask(world, "works", "fails", "fails");
}

/** Step 4: how a node finds the other node's pods. */
async function acrossNodes(world: World): Promise<void> {
  say(`
nginx1 answers. Now each node gets a route to the other one's pods.`);
  await setup(world, " --only routes");
  await ask(world, "works", "works", "fails");
}

/** Step 5: a source that the internet can answer. */
async function internet(world: World): Promise<void> {
  say(`
nginx2 answers too. The internet has no route back to a pod's address, so the
node's address replaces it. This is all of node-setup.ts, as you run it on a
real node.`);
  await setup(world);
  await ask(world, "works", "works", "works");
}

/** Step 6: an address that no host has. */
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
On both nodes kube-proxy has written rules that replace that address and port
8000 with nginx2's address and port 80. Nothing else is needed: pods and nodes
reach it, and even nginx2 itself does.`);
  for (const from of ["alpine1", "nginx1", "nginx2", "node1", "node2"]) {
    const seen = await request(kubernetes, from, `${ip}:8000`);
    expect(seen.startsWith("nginx2"), `${from} reaches nginx2`);
  }
  const rules = await type(node2, "iptables -t nat -n -L KUBE-SERVICES");
  expect(rules.includes(ip), "KUBE-SERVICES has the Service");
}

/** The end: the pods and the rules are removed, and nothing is left. */
async function end({ kubernetes }: World): Promise<void> {
  const { node1, node2, nodes } = kubernetes;
  say("\nThe pods end: the kubelet stops them, and containerd calls DEL.");
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

/** The memory of all processes of the cluster. Each page counts once. */
async function memory({ nodes }: Kubernetes): Promise<string> {
  const add =
    "cat /proc/[0-9]*/smaps_rollup | awk '/^Pss:/ {s += $2} END {print s}'";
  const sizes = await Promise.all(nodes.map((node) => node.sh(add)));
  const sum = sizes.reduce((sum, size) => sum + Number(size), 0);
  return `${Math.round(sum / 1024)} MiB of memory`;
}

/** How long each ADD took, from the plugin's log. */
async function durations({ nodes }: Kubernetes): Promise<string> {
  const find = `grep ' ADD ' /var/log/cni.log | grep -oE '[0-9]+ ms' || :`;
  const found = await Promise.all(nodes.map((node) => node.sh(find)));
  return `ADD ${found.flatMap((lines) => lines.split("\n")).join(", ")}`;
}

/** Keeps the cluster until Ctrl-C, and prints how to get in. */
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
The nodes have kubectl, which also opens a shell in a pod:

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
