/**
 * The tutorial on one machine, step by step: something fails before a command and
 * works after it. Each line behind a prompt is run, and each output is real.
 *
 * @module
 */
import { capture, Cluster, readPods, type Sighting } from "./cluster.ts";
import { type Node, type Pod, run } from "./node.ts";
import { ROOT } from "../setup/root.ts";
import {
  expect,
  readFlags,
  say,
  show,
  type Step,
  untilCtrlC,
  walk,
} from "./walk.ts";

const HELP =
  `Walks through the tutorial: two nodes, three pods, on this machine.

  --step N   stop after step N (1 to 6)
  --keep     keep the nodes at the end, until Ctrl-C
  --quiet    print one line a step
  --help     print this text`;

/** The machines, and the pods once they are there. */
interface World {
  cluster: Cluster;
  pods: Record<string, Pod & { node: Node; address: string }>;
}

/** Starts a shell in a node. */
const SHELL = "/run/shell";

/** The Service of nginx2, as a cluster's DNS would name it. */
const SERVICE = "10.96.0.20";

/** Runs a shell line on a node, and shows it. */
async function on(node: Node, line: string): Promise<string> {
  const { stdout, stderr } = await node.run("sh", "-c", line);
  show(node.name, line, stdout + stderr);
  return stdout;
}

/** Runs node-setup.ts on a node, as an operator would. */
async function setup(node: Node, flags: string, status = 0): Promise<void> {
  const line = `deno run -A node-setup.ts ${flags}`;
  const deno = `cd '${ROOT}' && exec '${Deno.execPath()}'`;
  const { code, stdout, stderr } = await node.run(
    ...["sh", "-c", line.replace("deno", deno)],
  );
  show(node.name, line, stdout + stderr);
  expect(code === status, `${line} on ${node.name}`);
}

/** Sends a request from a pod or a node; it must work, or fail. */
async function request(
  from: { name: string; enter: string[] },
  to: string,
  wish: "works" | "fails",
): Promise<string> {
  const line = `wget -qO- http://${to}/`;
  // busybox, as in the image alpine; its own -T ends in a segmentation fault.
  const { code, stdout, stderr } = await run(
    [...from.enter, "timeout", "2", "busybox", ...line.split(" ")],
  );
  const silence = code === 0 ? "" : "(no answer in 2 seconds)";
  show(from.name, line, stdout + stderr || silence);
  expect((code === 0) === (wish === "works"), `${from.name} to ${to} ${wish}`);
  return stdout;
}

const STEPS: Step<World>[] = [
  { title: "Every pod gets an interface, an address and a route", run: pods },
  { title: "Pod to pod on one node: FORWARD", run: sameNode },
  { title: "Pod to pod across nodes: routes", run: acrossNodes },
  { title: "Pod to the internet: MASQUERADE", run: internet },
  {
    title: "A Service: kube-proxy rewrites, the plugin's network carries",
    run: service,
  },
  { title: "The way of a packet, interface by interface", run: packets },
];

/** Step 1: what the kubelet's runtime and the plugin do for a pod. */
async function pods(world: World): Promise<void> {
  const { node2 } = world.cluster;
  say(`
Two nodes are on one network. Each has the plugin and its own conf, where a
kubelet looks for them. A router leads to the internet. The policy of FORWARD is
DROP, as Docker leaves it.

${picture()}`);
  await on(node2, "ls /opt/cni/bin /etc/cni/net.d");
  await on(node2, "cat /etc/cni/net.d/10-custom-cni.conf");
  say(`
The kubelet wants the pods of pods.yaml. For each pod, the container runtime
makes a network namespace and runs the plugin: the pod in CNI_* variables, the
conf on stdin. Then it reads the result from stdout.`);
  for (const { name, node: nodeName } of await readPods()) {
    const node = world.cluster.node(nodeName);
    const isFirst = Object.keys(world.pods).length === 0;
    const conf = JSON.parse(
      await node.sh("cat /etc/cni/net.d/10-custom-cni.conf"),
    );
    if (isFirst) conf.logLevel = "DEBUG";
    const pod = await node.start(name, { conf });
    const address = pod.json.ips[0].address.split("/")[0];
    world.pods[name] = { ...pod, node, address };
    const call = `CNI_COMMAND=ADD CNI_CONTAINERID=${pod.containerID} \\
    CNI_NETNS=${pod.netns} \\
    CNI_IFNAME=eth0 /opt/cni/bin/custom-cni < /etc/cni/net.d/10-custom-cni.conf`;
    if (isFirst) {
      show(node.name, call, pod.stdout);
      say(`
This is what the plugin did. With "logLevel": "DEBUG" in the conf, as for this
one pod, the log has each command, ready to paste. Compare them with the
script's.`);
      await on(node, "cut -d ' ' -f 2- /var/log/cni.log");
    } else say(`\n${node.name}: ADD gives ${name} ${pod.json.ips[0].address}`);
    await node.serve(pod.netns, `${name} on ${node.name}`);
    const { code } = await run(
      node.enterPod(pod, "ping", "-c1", "-W5", pod.json.ips[0].gateway),
    );
    expect(code === 0, `${name} reaches its gateway`);
  }
  const { alpine1 } = world.pods;
  say(`
On the node: a bridge with the gateway's address, and the host veth of each pod.
Its alias names the pod's container.`);
  await on(node2, "ip -4 -br addr; ip link show master cni0");
  say(`
In the pod: the other end of the pair, with the name that the runtime asked for.
The plugin named the namespace after the container, so \`ip netns exec\` works.`);
  const exec = `ip netns exec ${alpine1.containerID}`;
  await on(node2, `${exec} ip -4 addr show eth0`);
  await on(node2, `${exec} ip route`);
  await on(node2, `${exec} ping -c1 10.240.0.1`);
  say(`
The counter went up by one for each pod. At its usual level the log has one line
a call. And node-setup.ts --check finds what is missing, with the command that
fixes it. The next steps do that.`);
  await on(node2, "cat /tmp/last_allocated_ip; tail -n 1 /var/log/cni.log");
  await setup(node2, "--check --dry-run --peer 10.0.2.14", 1);
}

/** Step 2: why a bridge alone is not enough. */
async function sameNode({ cluster, pods }: World): Promise<void> {
  const { alpine1, nginx1 } = pods;
  say(`
alpine1 and nginx1 are on one bridge. But bridged packets pass through iptables
(net.bridge.bridge-nf-call-iptables=1), and FORWARD drops them.`);
  await on(cluster.node2, "iptables -S FORWARD");
  await request(fromPod(alpine1), nginx1.address, "fails");
  say(`
Two rules on each node accept packets from its pods and to its pods.`);
  await setup(cluster.node2, "--only forward --peer 10.0.2.14");
  await setup(cluster.node1, "--only forward --peer 10.0.2.15");
  await request(fromPod(alpine1), nginx1.address, "works");
}

/** Step 3: who knows where the other node's pods are. */
async function acrossNodes({ cluster, pods }: World): Promise<void> {
  const { alpine1, nginx2 } = pods;
  say(`
nginx2 is on the other node. node2 has no route to 10.240.1.0/24, so it sends
the packet to its default gateway. That router knows no pods.`);
  await on(cluster.node2, `ip route get ${nginx2.address}`);
  await request(fromPod(alpine1), nginx2.address, "fails");
  say(`
Each node gets a route to the other node's pods. Both need it: the answer must
find its way back.`);
  await setup(cluster.node2, "--only routes --peer 10.0.2.14");
  await setup(cluster.node1, "--only routes --peer 10.0.2.15");
  const seen = await request(fromPod(alpine1), nginx2.address, "works");
  expect(seen.includes(alpine1.address), "nginx2 sees the pod's own address");
  say(`
nginx2 sees the pod's own address as the source. The next step's rule changes
that.`);
}

/** Step 4: a source that the internet can answer. */
async function internet({ cluster, pods }: World): Promise<void> {
  const { alpine1, nginx2 } = pods;
  say(`
203.0.113.8 stands for the internet. The packet gets there. But its source is
10.240.0.2, and nobody out there has a route to that: no answer comes.`);
  await request(fromPod(alpine1), "203.0.113.8", "fails");
  say(`
MASQUERADE replaces the source by the node's address, in each packet that leaves
the node by an interface other than cni0. In the answer it puts the pod's back.`);
  await setup(cluster.node2, "--peer 10.0.2.14");
  await setup(cluster.node1, "--peer 10.0.2.15");
  const seen = await request(fromPod(alpine1), "203.0.113.8", "works");
  expect(seen.includes("10.0.2.15"), "the internet sees the node");
  const node = await request(fromPod(alpine1), nginx2.address, "works");
  expect(node.includes("10.0.2.15"), "nginx2 sees the node's address");
  say(`
The rule says "not cni0", and enp0s3 is not cni0. So nginx2 now sees 10.0.2.15,
too, the address of alpine1's node. (With --keep-source it sees the pod's.)`);
}

/** Step 5: an address that no host has. */
async function service({ cluster, pods }: World): Promise<void> {
  const { alpine1, nginx1, nginx2 } = pods;
  say(`
No interface has a Service's address. On each node kube-proxy rewrites it to a
pod's address, and the network of the steps before carries the packet. A pod that
reaches itself this way needs two more things. kube-proxy's MASQUERADE: otherwise
it would see itself as the source. And hairpin mode, which the plugin sets on its
port: otherwise the bridge sends no packet back where it came from.`);
  for (const node of [cluster.node1, cluster.node2]) {
    await node.sh(
      `iptables-restore --noflush << 'END'\n${kubeProxy(nginx2.address)}\nEND`,
    );
  }
  await on(cluster.node1, "iptables -t nat -S | grep KUBE");
  for (
    const from of [
      fromPod(alpine1),
      fromPod(nginx1),
      { name: "node1", enter: cluster.node1.enter() },
      { name: "node2", enter: cluster.node2.enter() },
      fromPod(nginx2),
    ]
  ) {
    const seen = await request(from, SERVICE, "works");
    expect(seen.startsWith("nginx2"), `${from.name} reaches nginx2`);
  }
}

/** Step 6: the same requests, watched on each interface. */
async function packets({ cluster, pods }: World): Promise<void> {
  const { alpine1, nginx1, nginx2 } = pods;
  const { node1, node2, router } = cluster;
  say(`
Each interface is watched, as by tcpdump, while the first packet of a request
goes there and its answer comes back. A mark shows where an address changes. cni0
is promiscuous here, so you also see what it only bridges.`);
  const places: Record<string, string[]> = {
    alpine1: node2.enterPod(alpine1),
    node2: node2.enter(),
    router: router.enter(),
    node1: node1.enter(),
    nginx1: node2.enterPod(nginx1),
    nginx2: node1.enterPod(nginx2),
  };
  for (const node of [node1, node2]) {
    await node.sh("ip link set cni0 promisc on");
  }
  for (
    const [title, to] of [
      ["alpine1 to nginx1, on one node", nginx1.address],
      ["alpine1 to nginx2, across nodes", nginx2.address],
      ["alpine1 to the internet", "203.0.113.8"],
      ["alpine1 to the Service", SERVICE],
    ]
  ) {
    const sightings = await capture(
      places,
      () =>
        run(
          node2.enterPod(alpine1, "busybox", "wget", "-qO-", `http://${to}/`),
        ),
    );
    // The first packet of a connection, and the answer to it.
    const there = sightings.filter(({ flags }) => flags === "S");
    const back = sightings.filter(({ flags }) => flags === "S.");
    say(`\n${title}\n\n${path(there)}\n`);
    for (const way of [there, back]) say(`${trace(way)}\n`);
    expect(there.length > 2, `packets of ${title}`);
    expect(back.at(-1)?.place === "alpine1", `an answer to ${title}`);
  }
}

/** The interfaces that a packet passed, in one line. */
function path(sightings: Sighting[]): string {
  const stops = sightings.map(({ place, dev }, i) => {
    if (place === "router") return place;
    return place === sightings[i - 1]?.place ? dev : `${place} ${dev}`;
  });
  return "  " + stops.filter((stop, i) => stop !== stops[i - 1]).join(" > ");
}

/** Where a packet was seen, with a mark where an address changed. */
function trace(sightings: Sighting[]): string {
  return sightings.map(({ place, dev, way, source, destination }, i) => {
    const last = sightings[i - 1] ?? { source, destination };
    const isSame = last.source === source && last.destination === destination;
    return `  ${`${place} ${dev}`.padEnd(16)} ${way.padEnd(3)}` +
      `  ${source.padEnd(18)} > ${destination.padEnd(18)}` +
      (isSame ? "" : " <- rewritten");
  }).join("\n").replaceAll(/ +$/gm, "");
}

/** The nodes with their addresses, and the pods with those they will get. */
function picture(): string {
  return `\
   node2 · 10.0.2.15                              node1 · 10.0.2.14
  ┌──────────────────────────────────┐           ┌──────────────────┐
  │  alpine1          nginx1         │           │  nginx2          │
  │  10.240.0.2       10.240.0.3     │           │  10.240.1.2      │
  │  eth0             eth0           │           │  eth0            │
  │   │                │             │           │   │              │
  │  veth2            veth3          │           │  veth2           │
  │   └──── cni0 ──────┘             │           │   └─ cni0        │
  │      10.240.0.1/24               │           │   10.240.1.1/24  │
  │           enp0s3                 │           │      enp0s3      │
  └──────────────┬───────────────────┘           └─────────┬────────┘
                 └──────── router · 10.0.2.2 ──────────────┘
                                  │
                       internet · 203.0.113.8`;
}

/** The rules of kube-proxy for a Service with one pod, in short. */
function kubeProxy(pod: string): string {
  return `*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-NGINX2 - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-SERVICES -d ${SERVICE}/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-NGINX2
-A KUBE-SVC-NGINX2 -s ${pod}/32 -j KUBE-MARK-MASQ
-A KUBE-SVC-NGINX2 -p tcp -m tcp -j DNAT --to-destination ${pod}:80
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE
COMMIT`;
}

function fromPod(pod: Pod & { node: Node }): { name: string; enter: string[] } {
  return { name: pod.name, enter: pod.node.enterPod(pod) };
}

/** The end: everything is undone, and nothing is left. */
async function end({ cluster, pods }: World): Promise<void> {
  const { node1, node2 } = cluster;
  say("\nThe pods end: the runtime calls DEL, then removes the namespace.");
  for (const pod of Object.values(pods)) {
    const { code } = await pod.node.cni("DEL", pod);
    expect(code === 0, `DEL of ${pod.name}`);
    await pod.node.remove(pod);
  }
  const left = await on(node2, "ip link show master cni0; ls /var/run/netns");
  expect(left.trim() === "", "nothing is left of the pods");
  await setup(node2, "--peer 10.0.2.14 --delete");
  await setup(node1, "--peer 10.0.2.15 --delete");
  const rules = await on(node2, "iptables -S FORWARD; ip route");
  expect(!rules.includes("10.240.1.0"), "nothing is left of node-setup.ts");
}

/** Keeps the nodes until Ctrl-C, and prints how to enter them. */
async function keep({ cluster, pods }: World): Promise<void> {
  const places: [name: string, words: string[]][] = [];
  for (const node of [cluster.node1, cluster.node2, cluster.router]) {
    places.push([node.name, node.enter(SHELL)]);
  }
  for (const pod of Object.values(pods)) {
    places.push([pod.name, pod.node.enterPod(pod, SHELL, pod.name)]);
  }
  // A plain user's other terminal is outside the lab's user namespace.
  const ofUser = Deno.env.has("LAB_OF_USER");
  const user = ofUser ? " -U --preserve-credentials" : "";
  const who = ofUser ? "the same user" : "root";
  console.log(`\nThe nodes stay. From another terminal, as ${who}:\n`);
  for (const [name, words] of places) {
    const line = words.join(" ").replace("nsenter", `nsenter${user}`);
    console.log(`  ${name.padEnd(8)} ${line}`);
  }
  await untilCtrlC();
}

if (import.meta.main) {
  const { last, keep: isKept } = readFlags(HELP, STEPS.length);
  await using cluster = await Cluster.start();
  const world: World = { cluster, pods: {} };
  await walk(STEPS.slice(0, last), world);
  await (isKept ? keep(world) : end(world));
}
