/** node-setup.ts on the real tables of nodes, and what it refuses. */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { join } from "@std/path/posix/join";
import { verdict } from "../node-setup.ts";
import { CONF, Node, type Output, ROOT, run } from "./lab.ts";

const SCRIPT = [Deno.execPath(), "run", "-A", join(ROOT, "node-setup.ts")];
const PEER = "--peer 10.0.2.14";

/** A node as in the tutorial: node2, with a way to its peer. */
async function start(name = "node2", address = "10.0.2.15"): Promise<Node> {
  const node = await Node.start(name, CONF);
  await node.sh(`ip link add enp0s3 up type bridge
    ip addr add ${address}/24 dev enp0s3
    ip route add default via 10.0.2.2
    iptables -P FORWARD DROP
    iptables -t nat -P POSTROUTING ACCEPT`); // now there is a table nat
  return node;
}

function setup(node: Node, flags: string, stdin = ""): Promise<Output> {
  const words = flags.split(" ").filter(Boolean);
  return run(node.enter(...SCRIPT, ...words), { stdin });
}

/** All that node-setup.ts may change. */
function tables(node: Node): Promise<string> {
  return node.sh(`iptables-save | grep -v '^[#:]'; iptables -S; ip route
    cat /proc/sys/net/ipv4/ip_forward`);
}

const RULES = [
  "iptables -A FORWARD -s 10.240.0.0/24 -j ACCEPT",
  "iptables -A FORWARD -d 10.240.0.0/24 -j ACCEPT",
  "ip route add 10.240.1.0/24 via 10.0.2.14 dev enp0s3",
  "iptables -t nat -A POSTROUTING -s 10.240.0.0/24 ! -o cni0 -j MASQUERADE",
];

Deno.test("node-setup.ts prints and runs the tutorial's commands", async () => {
  await using node = await start();
  const { code, stdout } = await setup(node, PEER);
  assertEquals(code, 0);
  assertEquals(stdout.trim().split("\n"), [
    "sysctl -w net.ipv4.ip_forward=1",
    ...RULES,
    "# 5 new, 0 there already",
  ]);
  const now = await tables(node);
  for (const rule of RULES.slice(0, 2)) {
    assert(now.includes(rule.slice(9)), now);
  }
  assertMatch(now, /10\.240\.1\.0\/24 via 10\.0\.2\.14 dev enp0s3/);
  assertMatch(now, /-s 10\.240\.0\.0\/24 ! -o cni0 -j MASQUERADE/);
  assertMatch(now, /^1$/m);
});

Deno.test("node-setup.ts twice is once, and --delete takes it back", async () => {
  await using node = await start();
  await node.sh(`iptables -A FORWARD -s 10.9.0.0/24 -j ACCEPT
    iptables -t nat -A POSTROUTING -s 10.9.0.0/24 -j MASQUERADE
    sysctl -qw net.ipv4.ip_forward=1`);
  const before = await tables(node);
  for (
    const flags of [
      PEER,
      `${PEER} --keep-source`,
      "--only masquerade --only forward",
      "--peer 10.0.2.14=10.250.0.0/16 --peer 10.0.2.16=10.251.0.0/16",
      `${PEER} --podcidr 10.240.0.0/24 --bridge br1 --dev enp0s3`,
    ]
  ) {
    assertEquals((await setup(node, flags)).code, 0, flags);
    const once = await tables(node);
    assert(once !== before, flags);
    const { stdout } = await setup(node, flags);
    assertMatch(stdout, /^# 0 new, \d+ there already\n$/, flags);
    assertEquals(await tables(node), once, flags);
    assertEquals((await setup(node, `${flags} --delete`)).code, 0, flags);
    assertEquals(await tables(node), before, flags);
    const again = await setup(node, `${flags} --delete`);
    assertMatch(again.stdout, /^# 0 taken back, \d+ not there\n$/, flags);
  }
});

Deno.test("node-setup.ts --dry-run prints, and changes nothing", async () => {
  await using node = await start();
  const before = await tables(node);
  const { code, stdout } = await setup(node, `${PEER} --dry-run`);
  assertEquals(code, 0);
  for (const rule of RULES) assert(stdout.includes(rule), stdout);
  assertEquals(await tables(node), before);
});

Deno.test("node-setup.ts --help tells of each flag", async () => {
  const { code, stdout } = await run([...SCRIPT, "--help"]);
  assertEquals(code, 0);
  for (
    const flag of [
      ...["peer", "nodes", "podcidr", "conf", "bridge", "dev"],
      ...["keep-source", "only", "delete", "dry-run", "help"],
    ]
  ) assertMatch(stdout, new RegExp(`^  --${flag}\\b`, "m"));
});

/** What is refused: the flags, the exit status, what the error says. */
const REFUSED: [flags: string, code: number, says: RegExp][] = [
  ["", 2, /peer/],
  [`${PEER} --what`, 2, /--what/],
  [`${PEER} what`, 2, /what/],
  ["--peer", 2, /--peer/],
  [`${PEER} --only nothing`, 2, /nothing/],
  ["--peer 10.0.2", 1, /10\.0\.2/],
  ["--peer 10.0.2.14=10.240.1.0", 1, /10\.240\.1\.0/],
  ["--peer 10.0.2.14=10.240.1.5/24", 1, /10\.240\.1\.5\/24/],
  ["--peer 10.0.2.14=10.240.0.0/16", 1, /overlaps/],
  ["--peer 10.0.2.14=10.0.2.0/24", 1, /overlaps/],
  ["--peer 10.0.2.15", 1, /this node/],
  ["--peer 127.0.0.1", 1, /this node/],
  ["--peer 192.0.2.1", 1, /neighbour/],
  [`${PEER} --peer 10.0.2.16`, 1, /overlaps/],
  [`${PEER} --podcidr 10.9.0.0/24`, 1, /CIDR/],
  [`${PEER} --podcidr nonsense`, 1, /nonsense/],
  [`${PEER} --dev none0`, 1, /none0/],
  [`${PEER} --bridge a/b`, 1, /a\/b/],
  [`${PEER} --conf /none.conf`, 1, /\/none\.conf/],
  [`${PEER} --conf /etc/hostname`, 1, /\/etc\/hostname/],
  ["--nodes /none.json", 1, /\/none\.json/],
  ["--nodes -", 1, /nodes|-/],
];

Deno.test("node-setup.ts refuses with a reason, and changes nothing", async () => {
  await using node = await start();
  const before = await tables(node);
  for (const [flags, status, says] of REFUSED) {
    const { code, stdout, stderr } = await setup(node, flags, "{}");
    assertEquals([code, stdout], [status, ""], `${flags}: ${stderr}`);
    assertMatch(stderr, says, flags);
    assertMatch(stderr, /^Error: /, flags);
  }
  await node.sh("ip route del default");
  assertEquals((await setup(node, "--peer 192.0.2.1")).code, 1);
  await node.sh("ip route add default via 10.0.2.2");
  assertEquals(await tables(node), before);
});

Deno.test("node-setup.ts leaves a foreign route to the peer's pods", async () => {
  await using node = await start();
  await node.sh("ip route add 10.240.1.0/24 via 10.0.2.99");
  const before = await tables(node);
  for (const flags of [PEER, `${PEER} --delete`]) {
    const { code, stderr } = await setup(node, flags);
    assertEquals(code, flags === PEER ? 1 : 0, stderr);
    assertEquals(await tables(node), before);
  }
});

Deno.test("node-setup.ts takes back what it did if a command fails", async () => {
  await using node = await start();
  const path = Deno.env.get("PATH");
  const before = await tables(node);
  for (const bad of ["-d 10.240.0.0/24 -j ACCEPT", "MASQUERADE", "route"]) {
    await node.sh("mkdir -p /opt/shims");
    const shim = bad === "route"
      ? `case "$*" in *-force*|*get*|*show*|*json*) exec ip "$@";; esac; exit 1`
      : `case "$*" in *"-A "*"${bad}"*) echo no >&2; exit 1;; esac
         exec iptables "$@"`;
    const name = bad === "route" ? "ip" : "iptables";
    await Deno.writeTextFile(
      node.path(`/opt/shims/${name}`),
      `#!/bin/sh\nPATH=${path}\n${shim}\n`,
      { mode: 0o755 },
    );
    const words = [...SCRIPT, ...PEER.split(" ")];
    const { code, stdout, stderr } = await run(
      node.enter("env", `PATH=/opt/shims:${path}`, ...words),
    );
    await node.sh("rm -r /opt/shims");
    assertEquals(code, 1, `${bad}: ${stdout}`);
    assertMatch(stderr, /^Error: /, bad);
    assertEquals(await tables(node), before, `${bad}: ${stdout}${stderr}`);
  }
});

Deno.test("node-setup.ts says which rule drops before its own", async () => {
  await using node = await start();
  await node.sh("iptables -A FORWARD -j REJECT");
  const { code, stderr } = await setup(node, PEER);
  assertEquals(code, 0);
  assertMatch(stderr, /-A FORWARD -j REJECT/);
});

Deno.test("verdict() follows chains and passes over partial rules", () => {
  const rules = [
    "-P FORWARD DROP",
    "-N DOCKER-USER",
    "-A FORWARD -j DOCKER-USER",
    "-A FORWARD -s 10.240.0.0/24 -j ACCEPT",
    "-A DOCKER-USER -p tcp -j DROP",
    "-A DOCKER-USER -i eth9 -j DROP",
    "-A DOCKER-USER -j RETURN",
  ];
  const packet = { "-A": "FORWARD", "-i": "cni0", "-s": "10.240.0.0/24" };
  assertEquals(verdict(rules, packet), rules[3]);
  rules[5] = "-A DOCKER-USER ! -i eth9 -j DROP";
  assertEquals(verdict(rules, packet), rules[5]);
});

/** What `kubectl get nodes -o json` prints of some nodes. */
function kubectl(nodes: [name: string, ip: string, podCIDR?: string][]) {
  return JSON.stringify({
    items: nodes.map(([name, address, podCIDR]) => ({
      metadata: { name },
      spec: { podCIDR },
      status: { addresses: [{ type: "InternalIP", address }] },
    })),
  });
}

Deno.test("node-setup.ts --nodes routes to 1,000 nodes by one ip", async () => {
  await using node = await start();
  const before = await tables(node);
  const nodes = Array.from({ length: 1000 }, (_, i) =>
    [
      `n${i}`,
      `10.0.2.${16 + i % 200}`,
      `10.${100 + (i >> 8)}.${i & 255}.0/24`,
    ] as [string, string, string]);
  nodes.push(["node2", "10.0.2.15", "10.240.0.0/24"]);
  const list = kubectl([...nodes, ["new", "10.0.2.250"]]);
  // A shim counts how often `ip` starts to change something.
  const path = Deno.env.get("PATH");
  await node.sh("mkdir -p /opt/shims");
  await Deno.writeTextFile(
    node.path("/opt/shims/ip"),
    `#!/bin/sh\necho "$@" >> /opt/calls\nPATH=${path} exec ip "$@"\n`,
    { mode: 0o755 },
  );
  const words = [...SCRIPT, "--nodes", "-"];
  const { code, stdout, stderr } = await run(
    node.enter("env", `PATH=/opt/shims:${path}`, ...words),
    { stdin: list },
  );
  assertEquals(code, 0, stderr);
  assertMatch(stderr, /"new"/);
  assertMatch(stdout, /# 1004 new/);
  const calls = await Deno.readTextFile(node.path("/opt/calls"));
  assert(calls.trim().split("\n").length <= 4, calls);
  assertEquals(await node.sh("ip route | grep -c via"), "1001");
  assertEquals((await setup(node, "--nodes - --delete", list)).code, 0);
  await node.sh("sysctl -qw net.ipv4.ip_forward=0");
  assertEquals(await tables(node), before);
});

Deno.test("node-setup.ts --nodes joins the pods of three nodes", async () => {
  await using router = await Node.start("router", null);
  await router.sh("ip link add br0 up type bridge");
  const nodes: Node[] = [];
  await using stack = new AsyncDisposableStack();
  const list = kubectl(
    [1, 2, 3].map((n) => [`n${n}`, `10.0.2.${n}`, `10.240.${n}.0/24`]),
  );
  for (const n of [1, 2, 3]) {
    const conf = { ...CONF, podcidr: `10.240.${n}.0/24` };
    const node = stack.use(await Node.start(`n${n}`, conf));
    nodes.push(node);
    await router.sh(`
      ip link add n${n} type veth peer name enp0s3 netns ${node.pid}
      ip link set n${n} up master br0`);
    await node.sh(`ip link set enp0s3 up
      ip addr add 10.0.2.${n}/24 dev enp0s3
      iptables -P FORWARD DROP`);
  }
  const pods = await Promise.all(nodes.map((node) => node.start("pod")));
  const reach = async (from: number, to: number) => {
    const address = pods[to].json.ips[0].address.split("/")[0];
    const ping = ["ping", "-c1", "-W1", address];
    const { code } = await run(nodes[from].enterPod(pods[from], ...ping));
    return code === 0;
  };
  assert(!await reach(0, 1));
  for (const node of nodes) {
    const { code, stderr } = await setup(node, "--nodes -", list);
    assertEquals(code, 0, stderr);
  }
  for (const from of [0, 1, 2]) {
    for (const to of [0, 1, 2].filter((to) => to !== from)) {
      assert(await reach(from, to), `n${from + 1} to n${to + 1}`);
    }
  }
});
