/**
 * node-setup.ts --check: problems that an operator can't see, by their symptom.
 * The node has a peer behind its NIC, and the packets are real.
 *
 * @module
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { CONF, Node, NODE_SETUP, run, vethOf } from "../lab/node.ts";
import { ROOT } from "../setup/root.ts";

/** The same words as a shell takes them, whatever folder they are in. */
const SETUP = NODE_SETUP.map((word) => `'${word}'`).join(" ");

const PEER = ["--peer", "10.0.2.14"];
const FOLDER = "/etc/cni/net.d";

/** node2 and its peer node1 after the tutorial, each with a pod. */
class World {
  private constructor(
    readonly node: Node,
    readonly peer: Node,
    readonly veth: string,
  ) {}

  static async start(): Promise<World> {
    const [node, peer] = await Promise.all([
      Node.start("node2", CONF),
      Node.start("node1", { ...CONF, podcidr: "10.240.1.0/24" }),
    ]);
    await node.sh(`ip link add enp0s3 type veth \
      peer name enp0s3 netns ${peer.pid}`);
    const both = [
      { node, address: "10.0.2.15", other: "10.0.2.14" },
      { node: peer, address: "10.0.2.14", other: "10.0.2.15" },
    ];
    const [pod] = await Promise.all(both.map(async (it) => {
      await it.node.sh(`ip link set enp0s3 up
        ip addr add ${it.address}/24 dev enp0s3
        ip route add default via 10.0.2.2
        ${SETUP} --peer ${it.other}`);
      return await it.node.start("pod");
    }));
    return new World(node, peer, vethOf(pod));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.node[Symbol.asyncDispose]();
    await this.peer[Symbol.asyncDispose]();
  }
}

/** What is wrong, and the commands that fix it or show more. */
interface Problem {
  message: string;
  commands: string[];
}

/** The problems that --check finds, on a node with a peer or without. */
async function check(node: Node, ...flags: string[]): Promise<Problem[]> {
  const words = [...NODE_SETUP, "--check", ...flags];
  const { code, stdout, stderr } = await node.run(...words);
  assertMatch(stdout, /^((ok {3}.+|BAD {2}.+(\n {5}.+)*)\n)+$/, stderr);
  const problems = Array.from(
    stdout.matchAll(/^BAD {2}(.*)\n((?: {5}.*\n)*)/gm),
    ([, message, lines]) => ({
      message,
      commands: lines.trim().split(/\n */),
    }),
  );
  assertEquals(code, problems.length > 0 ? 1 : 0, stdout);
  return problems;
}

const messages = (problems: Problem[]) => problems.map((it) => it.message);

/** All that node-setup.ts could change, except the counter. */
function everything(node: Node): Promise<string> {
  return node.sh(`iptables-save; iptables-legacy-save; nft list ruleset
    ip rule; ip route show table all; ip -o addr; ip -d -o link; ip netns
    sysctl -a 2> /dev/null | grep -E 'forwarding|bridge-nf|rp_filter'
    cut -d' ' -f2,3 /proc/mounts | sort
    find /run /etc/cni /opt -xdev ! -path '*/.custom-cni/*'`);
}

/** A listing without what changes by itself: counters, and IPv6's attempts. */
const settled = (text: string) =>
  text.replaceAll(/^#.*$/gm, "")
    .replaceAll(/\[\d+:\d+\]|packets \d+ bytes \d+| tentative/g, "")
    .replaceAll(/_timer +[\d.]+/g, "")
    .replaceAll(/^.* (fe80|ff00)::.*$\n/gm, "");

Deno.test("--check finds nothing and changes nothing on a node that is well", async () => {
  await using world = await World.start();
  const { node } = world;
  const before = settled(await everything(node));
  assertEquals(await check(node), []);
  assertEquals(await check(node, ...PEER), []);
  assertEquals(settled(await everything(node)), before);
  assertEquals(await node.sh("cat /tmp/last_allocated_ip"), "6");
});

Deno.test("a namespace lives on after its pod: /run/netns is mounted twice", async () => {
  await using node = await Node.start("node2", CONF);
  // The namespace of a runtime that does not call `ip netns`.
  await node.sh("mkdir /run/netns; touch /run/netns/cni-1; sync");
  await node.sh("unshare --net=/run/netns/cni-1 true");
  const mounts = () => node.sh("cut -d' ' -f2,3 /proc/mounts");
  const before = await mounts();
  await node.run(...NODE_SETUP, "--check");
  assertEquals(await mounts(), before);
});

Deno.test("--check --dry-run starts no pod", async () => {
  await using world = await World.start();
  const { node } = world;
  const { code, stdout } = await node.run(
    ...[...NODE_SETUP, "--check", "--dry-run", ...PEER],
  );
  assertEquals(code, 0, stdout);
  assertMatch(stdout, /No pod was started/);
  assertEquals(await node.sh("cat /tmp/last_allocated_ip"), "2");
  await node.sh("iptables -F FORWARD");
  const { stdout: bad } = await node.run(
    ...[...NODE_SETUP, "--check", "--dry-run", ...PEER],
  );
  assertMatch(bad, /^BAD {2}FORWARD lacks a rule/m);
});

/** A problem that a printed command fixes. */
interface Missing {
  symptom: string;
  fault: string;
  says: RegExp;
  fix: RegExp;
}

const MISSING: Missing[] = [
  {
    symptom: "pods reach no other network: ip_forward is off",
    fault: "sysctl -qw net.ipv4.ip_forward=0",
    says: /forwards no packets/,
    fix: /^sysctl -w net\.ipv4\.ip_forward=1$/,
  },
  {
    symptom:
      "a Service is dead on its own node: bridged packets bypass iptables",
    fault: "sysctl -qw net.bridge.bridge-nf-call-iptables=0",
    says: /a Service is dead on its own node/,
    fix: /^sysctl -w net\.bridge\.bridge-nf-call-iptables=1$/,
  },
  {
    symptom: "a firewall reload removed a rule",
    fault: "iptables -D FORWARD -d 10.240.0.0/24 -j ACCEPT",
    says: /FORWARD lacks a rule/,
    fix: /^iptables -A FORWARD -d 10\.240\.0\.0\/24 -j ACCEPT$/,
  },
  {
    symptom: "the internet never answers: MASQUERADE is gone",
    fault: "iptables -t nat -F POSTROUTING",
    says: /Nobody on the internet can answer/,
    fix: /MASQUERADE$/,
  },
  {
    symptom: "a link that went down and up lost the route to a peer's pods",
    fault: "ip route del 10.240.1.0/24",
    says: /have no route/,
    fix: /^ip route add 10\.240\.1\.0\/24 via 10\.0\.2\.14 dev enp0s3$/,
  },
  {
    symptom: "a firewall reload removed a rule, and FORWARD drops the rest",
    fault: `iptables -P FORWARD DROP
      iptables -D FORWARD -d 10.240.0.0/24 -j ACCEPT`,
    says: /FORWARD lacks a rule/,
    fix: /^iptables -A FORWARD -d 10\.240\.0\.0\/24 -j ACCEPT$/,
  },
  {
    symptom: "cni0 is down",
    fault: "ip link set cni0 down",
    says: /^cni0 is down$/,
    fix: /^ip link set cni0 up$/,
  },
  {
    symptom: "cni0 lost its address",
    fault: "ip addr flush dev cni0",
    says: /^cni0 lacks 10\.240\.0\.1\/24$/,
    fix: /^ip addr add 10\.240\.0\.1\/24 dev cni0$/,
  },
  {
    symptom: "the node's own route to its pods is gone",
    fault: "ip route del 10.240.0.0/24",
    says: /no route to its pods/,
    fix: /^ip route add 10\.240\.0\.0\/24 dev cni0 src 10\.240\.0\.1$/,
  },
  {
    symptom: "a pod's veth was taken off the bridge",
    fault: "ip link set $veth nomaster",
    says: /^veth2 is not on cni0: the pod 10\.240\.0\.2 is cut off$/,
    fix: /^ip link set veth2 master cni0 up$/,
  },
  {
    symptom: "a pod's veth is down",
    fault: "ip link set $veth down",
    says: /^veth2 is down: the pod 10\.240\.0\.2 is cut off$/,
    fix: /^ip link set veth2 up$/,
  },
  {
    symptom: "a pod's veth was renamed",
    fault: "ip link set $veth down name lan7; ip link set lan7 up",
    says: /^lan7 was veth2: another pod may get 10\.240\.0\.2 too$/,
    fix: /^ip link set lan7 down name veth2$/,
  },
  {
    symptom: "a new pod waits for half a minute: STP",
    fault: "ip link set cni0 type bridge stp_state 1",
    says: /STP/,
    fix: /^ip link set cni0 type bridge stp_state 0$/,
  },
];

for (const { symptom, fault, says, fix } of MISSING) {
  Deno.test(symptom, async () => {
    await using world = await World.start();
    const { node, veth } = world;
    await node.sh(`veth=${veth}; ${fault}`);
    const [first] = await check(node, ...PEER);
    assertMatch(first.message, says);
    assertMatch(first.commands[0], fix);
    // Pasting the commands fixes it. The check's own ADD may have done so.
    await node.sh(`${first.commands.join("\n")} || true`);
    assertEquals(await check(node, ...PEER), []);
    await node.sh("ping -c1 -W5 10.240.0.2");
  });
}

/** A problem that only packets find. */
interface Dead {
  symptom: string;
  fault: string;
  /** Whether the fault is on the peer. */
  isPeers?: boolean;
  /** The message for each connection that fails. */
  dead: string[];
  /** A printed command, and what it shows. */
  look: [command: string, shows: RegExp];
}

const GATEWAY = "A pod does not reach its gateway 10.240.0.1";
const OTHER = "A pod does not reach another pod of this node";
const FROM_NODE = "The node does not reach a pod";
const NODE1 = "A pod does not reach the node 10.0.2.14";
const ITS_PODS =
  "A pod does not reach 10.240.1.1, which 10.0.2.14 gets with its first pod";

const DEAD: Dead[] = [
  {
    symptom: "pods of one node do not reach each other",
    fault: "iptables -I FORWARD -i cni0 -o cni0 -j DROP",
    dead: [OTHER],
    look: ["iptables -nvL FORWARD", /DROP .*cni0 +cni0/],
  },
  {
    symptom:
      "pods of one node do not reach each other: a reset looks like an answer",
    fault:
      "iptables -I FORWARD -p tcp -i cni0 -o cni0 -j REJECT --reject-with tcp-reset",
    dead: [OTHER],
    look: ["iptables -nvL FORWARD", /REJECT .*cni0 +cni0/],
  },
  {
    symptom: "pods reach no API server: INPUT drops",
    fault: "iptables -A INPUT -i cni0 -j DROP",
    dead: [GATEWAY, FROM_NODE],
    look: ["iptables -nvL INPUT", /DROP .*cni0/],
  },
  {
    symptom: "pods reach no API server: INPUT rejects new calls",
    fault: "iptables -A INPUT -m conntrack --ctstate NEW -i cni0 -j REJECT",
    dead: [GATEWAY],
    look: ["iptables -nvL INPUT", /REJECT .*cni0/],
  },
  {
    symptom: "pods reach no API server: INPUT resets new calls",
    fault: `iptables -A INPUT -p tcp -m conntrack --ctstate NEW -i cni0 \
      -j REJECT --reject-with tcp-reset`,
    dead: [GATEWAY],
    look: ["iptables -nvL INPUT", /tcp-reset/],
  },
  {
    symptom: "pods reach no API server: a cloud image's INPUT",
    fault:
      `iptables -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
      iptables -A INPUT -i lo -j ACCEPT
      iptables -A INPUT -j REJECT --reject-with icmp-host-prohibited`,
    dead: [GATEWAY],
    look: ["iptables -nvL INPUT", /icmp-host-prohibited/],
  },
  {
    symptom: "probes fail: OUTPUT rejects the node's calls to pods",
    fault:
      "iptables -A OUTPUT -d 10.240.0.0/24 -m conntrack --ctstate NEW -j REJECT",
    dead: [FROM_NODE],
    look: ["iptables -nvL OUTPUT", /REJECT .*10\.240\.0\.0\/24/],
  },
  {
    symptom: "OUTPUT drops everything to pods",
    fault: "iptables -A OUTPUT -o cni0 -j DROP",
    dead: [GATEWAY, FROM_NODE],
    look: ["iptables -nvL OUTPUT", /DROP .*cni0/],
  },
  {
    symptom: "forwarding is off only for the NIC",
    fault: "sysctl -qw net.ipv4.conf.enp0s3.forwarding=0",
    dead: [NODE1, ITS_PODS],
    look: [
      "sysctl -a | grep -wE 'forwarding|rp_filter'",
      /ipv4\.conf\.enp0s3\.forwarding = 0/,
    ],
  },
  {
    symptom: "forwarding is off only for cni0",
    fault: "sysctl -qw net.ipv4.conf.cni0.forwarding=0",
    dead: [NODE1, ITS_PODS],
    look: [
      "sysctl -a | grep -wE 'forwarding|rp_filter'",
      /ipv4\.conf\.cni0\.forwarding = 0/,
    ],
  },
  {
    symptom: "another firewall drops forwarded packets",
    fault: `nft add table inet other
      nft add chain inet other late \
        '{ type filter hook forward priority 9; policy drop; }'`,
    dead: [OTHER, NODE1, ITS_PODS],
    look: ["nft list ruleset", /policy drop/],
  },
  {
    symptom: "a table of another family drops frames",
    fault: `nft add table bridge other
      nft add chain bridge other passing \
        '{ type filter hook forward priority 0; policy drop; }'`,
    dead: [OTHER],
    look: ["nft list ruleset", /table bridge other/],
  },
  {
    symptom: "iptables-legacy drops forwarded packets",
    fault: "iptables-legacy -P FORWARD DROP",
    dead: [OTHER, NODE1, ITS_PODS],
    look: ["iptables -nvL FORWARD", /legacy tables present/],
  },
  {
    symptom: "a peer's pods are lost: another table shadows main",
    fault: `ip route add unreachable default table 99
      ip rule add pref 100 to 10.240.1.0/24 lookup 99`,
    dead: [ITS_PODS],
    look: ["ip route get 10.240.1.1", /No route to host/],
  },
  {
    symptom: "a peer drops everything from other nodes",
    fault: "iptables -A INPUT -i enp0s3 -j DROP",
    isPeers: true,
    dead: [NODE1, ITS_PODS],
    look: ["iptables -nvL FORWARD", /ACCEPT .*10\.240\.0\.0\/24/],
  },
  {
    symptom: "a peer rejects calls from other nodes",
    fault: "iptables -A INPUT -i enp0s3 -p tcp -j REJECT",
    isPeers: true,
    dead: [NODE1, ITS_PODS],
    look: ["ip route get 10.0.2.14", /dev enp0s3/],
  },
];

for (const { symptom, fault, isPeers, dead, look } of DEAD) {
  Deno.test(symptom, async () => {
    await using world = await World.start();
    const { node, peer } = world;
    await (isPeers ? peer : node).sh(fault);
    const problems = await check(node, ...PEER);
    assertEquals(messages(problems), dead);
    const [command, shows] = look;
    const { commands } = problems[0];
    assert(commands.includes(command), `${commands}`);
    assertMatch(await node.sh(`{ ${command}; } 2>&1 || true`), shows);
  });
}

Deno.test("older pods stay cut off after cni0 was deleted and created again", async () => {
  await using world = await World.start();
  const { node } = world;
  await node.sh("ip link del cni0");
  await node.start("next");
  const problems = await check(node, ...PEER);
  assertEquals(messages(problems), [
    "veth2 is not on cni0: the pod 10.240.0.2 is cut off",
  ]);
  await node.sh(problems[0].commands.join("\n"));
  assertEquals(await check(node, ...PEER), []);
  await node.sh("ping -c1 -W5 10.240.0.2");
});

Deno.test("--check finds nothing if a node has had no pod and has no cni0", async () => {
  await using world = await World.start();
  const { node } = world;
  await node.sh("ip link del cni0; ip link del veth2");
  assertEquals(await check(node, ...PEER), []);
});

Deno.test("large downloads hang: the NIC takes less than pods send", async () => {
  await using world = await World.start();
  const { node } = world;
  await node.sh("ip link set enp0s3 mtu 1400");
  for (const flags of [[], PEER]) {
    const [problem, ...others] = await check(node, ...flags);
    assertEquals(others, []);
    assertMatch(problem.message, /1500 bytes at once, too many for enp0s3$/);
    assertMatch(problem.commands[0], /^"mtu": 1400/);
  }
  await node.configure({ ...CONF, mtu: 1400 });
  assertEquals(await check(node), []);
  // Only devices on the way to other nodes count.
  await node.sh("ip link add thin0 mtu 1300 up type veth");
  assertEquals(await check(node), []);
});

Deno.test("no pod starts: the plugin is missing, truncated or not executable", async () => {
  await using world = await World.start();
  const { node } = world;
  const file = "/opt/cni/bin/custom-cni";
  await node.sh(`umount ${file}; install '${ROOT}dist/custom-cni' ${file}`);
  assertEquals(await check(node), []);
  for (const fault of ["truncate -s 9M", "chmod -x", "rm"]) {
    await node.sh(`${fault} ${file}`);
    const [problem, ...others] = await check(node);
    assertEquals(others, []);
    const says = /^A pod gets no network: .*custom-cni does not start/;
    assertMatch(problem.message, says);
    // The fix, from the repository's folder.
    await node.sh(`cd '${ROOT}'; ${problem.commands.at(-1)}`);
    assertEquals(await check(node), []);
  }
});

Deno.test("no pod starts: the node is full", async () => {
  await using world = await World.start();
  const { node } = world;
  await node.configure({ ...CONF, podcidr: "10.9.0.0/30" });
  await node.sh(`${SETUP} --only forward --only masquerade`);
  const problem = (await check(node)).at(-1)!;
  assertMatch(problem.message, /No free address in 10\.9\.0\.0\/30/);
  assertMatch(problem.commands[0], /a pod must end first/);
});

const CONF_OF_OTHERS = { cniVersion: "1.0.0", name: "other", type: "bridge" };
const LIST = { cniVersion: "1.0.0", name: "pods" };
const OURS = { type: "custom-cni", podcidr: "10.240.0.0/24" };

/** Files by name, and what --check says if no runtime or ADD accepts them. */
interface Conf {
  files: Record<string, unknown>;
  says?: RegExp;
  fix?: RegExp;
}

const CONFS: Conf[] = [
  { files: { "1.json": CONF } },
  {
    files: { "1.conflist": { ...LIST, plugins: [OURS, { type: "portmap" }] } },
  },
  { files: {}, says: /not initialized/, fix: /^cp 10-custom-cni\.conf/ },
  { files: { "1.conflist": CONF }, says: /not for custom-cni/, fix: /^mv / },
  {
    files: { "1.conf": { ...LIST, plugins: [OURS] } },
    says: /not for custom-cni/,
    fix: /^mv /,
  },
  {
    files: { "1.json": CONF_OF_OTHERS, "2.conf": CONF },
    says: /1\.json comes first, but is not for custom-cni/,
    fix: /^mv \S+1\.json/,
  },
  { files: { "1.conf": "" }, says: /Cannot read "\S+1\.conf"/, fix: /^vi / },
  { files: { "1.conf": "null" }, says: /Cannot read/, fix: /^vi / },
  { files: { "1.conf": '{ "name": ' }, says: /Cannot read/, fix: /Syntax/ },
  {
    files: { "1.conf": { ...CONF, podcidr: "10.0.0.1/24" } },
    says: /podcidr "10\.0\.0\.1\/24"/,
  },
  // ADD reports the following ones in its own words.
  {
    files: { "1.conf": { ...CONF, name: undefined } },
    says: /name is missing/,
  },
  { files: { "1.conf": { ...CONF, cniVersion: "1.2.0" } }, says: /"1\.2\.0"/ },
  { files: { "1.conf": { ...CONF, mtu: "1400" } }, says: /mtu "1400" must be/ },
];

Deno.test("no pod starts: no runtime or ADD accepts the conf", async () => {
  await using world = await World.start();
  const { node } = world;
  for (const { files, says, fix } of CONFS) {
    await node.sh(`rm -rf ${FOLDER}/*`);
    for (const [name, conf] of Object.entries(files)) {
      const text = typeof conf === "string" ? conf : JSON.stringify(conf);
      await Deno.writeTextFile(node.path(`${FOLDER}/${name}`), text);
    }
    const problems = await check(node);
    if (!says) {
      assertEquals(problems, [], JSON.stringify(files));
      continue;
    }
    assertEquals(problems.length, 1, JSON.stringify(problems));
    const [problem] = problems;
    assertMatch(problem.message, says);
    if (fix) assertMatch(problem.commands[0], fix);
  }
});

Deno.test("a stale cni0 has another prefix, or is not a bridge", async () => {
  await using world = await World.start();
  const { node } = world;
  await node.sh("ip link del veth2");
  for (const kind of ["bridge", "veth"]) {
    await node.sh(`ip link del cni0; ip link add cni0 up type ${kind}
      ip addr add 10.240.0.1/16 dev cni0`);
    const problems = await check(node, ...PEER);
    const all = problems.flatMap(({ commands }) => commands);
    assert(all.some((line) => line.includes("ip link del cni0")), kind);
  }
});

Deno.test("--check ends its pods even if it is interrupted", async () => {
  await using world = await World.start();
  const { node, peer } = world;
  // The peer answers nothing, so the check takes its two seconds.
  await peer.sh("iptables -A INPUT -i enp0s3 -j DROP");
  const before = settled(await everything(node));
  for (
    const { signal, seconds } of [
      { signal: "INT", seconds: 0.15 },
      { signal: "INT", seconds: 0.3 },
      { signal: "INT", seconds: 0.5 },
      { signal: "INT", seconds: 1.5 },
      { signal: "TERM", seconds: 0.4 },
      { signal: "HUP", seconds: 0.4 },
    ]
  ) {
    const words = [
      ...["timeout", "-s", signal, "-k", "20", `${seconds}`],
      ...[...NODE_SETUP, "--check", ...PEER],
    ];
    await run(node.enter(...words));
    const after = settled(await everything(node));
    assertEquals(after, before, `${signal} after ${seconds} s`);
  }
});

Deno.test("node-setup.ts shows iptables' own warning about legacy tables", async () => {
  await using world = await World.start();
  const { node } = world;
  await node.sh("iptables-legacy -P FORWARD DROP");
  const { code, stderr } = await node.run(...NODE_SETUP, ...PEER);
  assertEquals(code, 0);
  assertMatch(stderr, /^# Warning: iptables-legacy tables present/m);
});
