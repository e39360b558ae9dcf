/** What node-setup.ts does to the real tables of nodes, and what it refuses. */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { join } from "@std/path/posix/join";
import { CONF, Node, NODE_SETUP, type Output, run } from "../lab/node.ts";
import { ROOT } from "../setup/root.ts";
import SHAPES from "./nodes.json" with { type: "json" };

const PATH = Deno.env.get("PATH")!;
const PEER = "--peer 10.0.2.14";
const THIRD = "--peer 10.0.2.16=10.240.2.0/24";

/** A node as in the tutorial: node2, on its peer's network. */
async function start(): Promise<Node> {
  const node = await Node.start("node2", CONF);
  await node.sh(`ip link add enp0s3 up type veth peer name unplugged
    ip addr add 10.0.2.15/24 dev enp0s3
    ip link add enp0s8 up type bridge
    ip addr add 10.0.2.115/24 dev enp0s8 metric 200
    ip route add default via 10.0.2.2
    sysctl -qw net.ipv4.ip_forward=0
    iptables -P FORWARD DROP
    iptables -A FORWARD -s 10.9.0.0/24 -j ACCEPT
    iptables -t nat -A POSTROUTING -s 10.9.0.0/24 -j MASQUERADE`);
  return node;
}

/** Runs node-setup.ts on a node, with stand-ins first on the PATH. */
function setup(node: Node, flags: string, stdin = ""): Promise<Output> {
  const words = [...NODE_SETUP, ...flags.split(" ").filter(Boolean)];
  return run(node.enter("env", `PATH=/opt/shims:${PATH}`, ...words), { stdin });
}

/** The same; it must succeed. */
async function succeed(node: Node, flags: string, stdin = ""): Promise<string> {
  const { code, stdout, stderr } = await setup(node, flags, stdin);
  assertEquals(code, 0, `${flags}: ${stderr}`);
  return stdout;
}

/** Puts a stand-in for a program first on the PATH. */
async function shim(node: Node, name: string, script: string): Promise<void> {
  await node.sh("mkdir -p /opt/shims");
  const file = node.path(`/opt/shims/${name}`);
  const text = `#!/bin/sh\nPATH="${PATH}"\n${script}\nexec ${name} "$@"\n`;
  await Deno.writeTextFile(file, text, { mode: 0o755 });
}

/** All that node-setup.ts may change. */
function tables(node: Node): Promise<string> {
  return node.sh(`iptables -S; iptables -t nat -S; ip route
    sysctl net.ipv4.ip_forward net.bridge.bridge-nf-call-iptables`);
}

/** What `kubectl get nodes -o json` prints for some nodes. */
function kubectl(...nodes: [name: string, ip: string, podCIDR?: string][]) {
  return JSON.stringify({
    items: nodes.map(([name, address, podCIDR]) => ({
      metadata: { name },
      spec: { podCIDR },
      status: { addresses: [{ type: "InternalIP", address }] },
    })),
  });
}

/** What is already on in the tests' kernel. */
const BRIDGED = [
  "modprobe br_netfilter",
  "sysctl -w net.bridge.bridge-nf-call-iptables=1",
];

const COMMANDS = [
  "sysctl -w net.ipv4.ip_forward=1",
  ...BRIDGED,
  "iptables -A FORWARD -s 10.240.0.0/24 -j ACCEPT",
  "iptables -A FORWARD -d 10.240.0.0/24 -j ACCEPT",
  "ip route add 10.240.1.0/24 via 10.0.2.14 dev enp0s3",
  "iptables -t nat -A POSTROUTING -s 10.240.0.0/24 ! -o cni0 -j MASQUERADE",
];

Deno.test("node-setup.ts prints and runs the tutorial's commands", async () => {
  await using node = await start();
  const before = await tables(node);
  const printed = await succeed(node, PEER);
  const expected = COMMANDS.filter((line) => !BRIDGED.includes(line));
  expected.push("# 5 new, 2 already there");
  assertEquals(printed.trim().split("\n"), expected);
  const after = await tables(node);
  // The printed commands do the same by hand.
  await succeed(node, `${PEER} --delete`);
  await node.sh("sysctl -qw net.ipv4.ip_forward=0");
  assertEquals(await tables(node), before);
  await node.sh(printed);
  assertEquals(await tables(node), after);
});

/** Flags, and what the tables then have. */
const FLAGS: [flags: string, rule: RegExp][] = [
  [PEER, /^-A FORWARD -d 10\.240\.0\.0\/24 -j ACCEPT$/m],
  [
    `${PEER} ${PEER} ${THIRD}`,
    /^10\.240\.2\.0\/24 via 10\.0\.2\.16 dev enp0s3/m,
  ],
  ["--peer 10.0.2.14=10.250.0.0/16", /^10\.250\.0\.0\/16 via 10\.0\.2\.14/m],
  [`${PEER} --conf /etc/other`, /^-A FORWARD -s 10\.240\.1\.0\/24/m],
  ["--only forward --only masquerade", /^(?!.* via 10.0.2.14).*! -o cni0/s],
  [`${PEER} --only routes`, /^(?!.*10\.240\.0).*\n10\.240\.1\.0\/24 via/s],
  [
    `${PEER} ${THIRD} --keep-source`,
    /-d 10\.240\.2\.0\/24 -j RETURN.*-d 10\.240\.1\.0\/24 -j RETURN.*cni0/s,
  ],
];

Deno.test("a second run of node-setup.ts adds nothing; --delete removes it all", async () => {
  await using node = await start();
  await node.sh(`sysctl -qw net.ipv4.ip_forward=1
    echo '{ "podcidr": "10.240.1.0/24" }' > /etc/other`);
  const before = await tables(node);
  for (const [flags, rule] of FLAGS) {
    await succeed(node, flags);
    const once = await tables(node);
    assertMatch(once, rule, flags);
    assertMatch(await succeed(node, flags), /^# 0 new, \d+ already there\n$/);
    assertEquals(await tables(node), once, flags);
    assertMatch(await succeed(node, `${flags} --delete`), /, 0 not there\n$/);
    assertEquals(await tables(node), before, flags);
  }
  const again = await succeed(node, `${PEER} --delete`);
  assertEquals(again, "# 0 removed, 4 not there\n");
  assertEquals(await tables(node), before);
});

Deno.test("node-setup.ts --keep-source lasts until --delete", async () => {
  await using node = await start();
  await node.sh("sysctl -qw net.ipv4.ip_forward=1");
  const before = await tables(node);
  for (const flags of [PEER, `${PEER} --keep-source`, PEER]) {
    await succeed(node, flags);
  }
  const third = await succeed(node, `${PEER} ${THIRD} --keep-source`);
  assertMatch(third, /^ip route .*\n.*-d 10\.240\.2\.0\/24 -j RETURN\n# 2 new/);
  await succeed(node, `${THIRD} --only masquerade --delete --keep-source`);
  assertMatch(await tables(node), /-d 10\.240\.1\.0\/24 -j RETURN/);
  await succeed(node, `${PEER} ${THIRD} --delete`);
  assertEquals(await tables(node), before);
});

Deno.test("node-setup.ts --dry-run prints all commands and changes nothing", async () => {
  await using node = await start();
  const before = await tables(node);
  assertEquals(await succeed(node, `${PEER} --dry-run`), lines(COMMANDS));
  const source = await succeed(
    node,
    `${PEER} ${THIRD} --dry-run --keep-source`,
  );
  assertMatch(source, /-d 10\.240\.1\.0\/24 -j RETURN$/m);
  assertMatch(source, /-d 10\.240\.2\.0\/24 -j RETURN$/m);
  assertEquals(await tables(node), before);
  await succeed(node, PEER);
  const after = await tables(node);
  const back = await succeed(node, `${PEER} --dry-run --delete`);
  assertMatch(back, /^iptables -t nat -D .*MASQUERADE\n/);
  assertMatch(back, /^ip route del 10.240.1.0\/24 via 10.0.2.14 dev enp0s3$/m);
  assertEquals(await tables(node), after);
});

const lines = (list: string[]) => list.join("\n") + "\n";

Deno.test("node-setup.ts --help explains each flag", async () => {
  const { code, stdout } = await run([...NODE_SETUP, "--help"]);
  assertEquals(code, 0);
  for (
    const flag of [
      ...["peer", "nodes", "check", "conf", "keep-source", "only"],
      ...["delete", "dry-run", "help"],
    ]
  ) assertMatch(stdout, new RegExp(`^  --${flag}\\b`, "m"));
});

/** Refused flags, the exit status, and what the error says. */
interface Refused {
  flags: string;
  code: number;
  says: RegExp;
}

const USAGE: Refused[] = [
  { flags: "", code: 2, says: /--peer or --nodes/ },
  {
    flags: "--only masquerade --keep-source",
    code: 2,
    says: /--peer or --nodes/,
  },
  { flags: `${PEER} --what`, code: 2, says: /"--what"/ },
  { flags: `${PEER} what`, code: 2, says: /"what"/ },
  { flags: `${PEER} --podcidr 10.9.0.0/24`, code: 2, says: /"--podcidr"/ },
  { flags: `${PEER} --bridge br1`, code: 2, says: /"--bridge"/ },
  { flags: `${PEER} --dev enp0s8`, code: 2, says: /"--dev"/ },
  { flags: "--peer", code: 2, says: /--peer/ },
  { flags: `${PEER} --conf --delete`, code: 2, says: /--conf/ },
  { flags: `${PEER} --only nothing`, code: 2, says: /"nothing".*forward/s },
];

/** What makes no sense, or what the kernel would accept and should not. */
const SENSELESS: Refused[] = [
  { flags: "--peer 10.0.2.15", code: 1, says: /this node/ },
  { flags: "--peer 127.0.0.1", code: 1, says: /this node/ },
  { flags: "--peer 10.0.2", code: 1, says: /"10\.0\.2"/ },
  { flags: "--peer 10.0.2.014", code: 1, says: /"10\.0\.2\.014"/ },
  { flags: "--peer 10.0.2.14=", code: 1, says: /podcidr ""/ },
  { flags: "--peer 10.0.2.14=10.240.1.0", code: 1, says: /"10\.240\.1\.0"/ },
  {
    flags: "--peer 10.0.2.14=10.240.1.5/24",
    code: 1,
    says: /"10\.240\.1\.5\/24"/,
  },
  {
    flags: "--peer 10.0.2.14=10.240.0.0/16",
    code: 1,
    says: /overlaps 10\.240\.0\.0\/24/,
  },
  {
    flags: "--peer 10.0.2.14=10.0.2.0/24",
    code: 1,
    says: /overlaps 10\.0\.2\.15\/24/,
  },
  { flags: "--peer 10.240.0.7=10.250.0.0/24", code: 1, says: /pod/ },
  {
    flags: `${THIRD} ${PEER} --peer 10.0.2.17=10.240.2.0/24`,
    code: 1,
    says: /overlaps 10\.240\.2/,
  },
  {
    flags: `${PEER} --peer 10.0.2.16`,
    code: 1,
    says: /overlaps 10\.240\.1\.0\/24/,
  },
  {
    flags: `${PEER} --conf /etc/other`,
    code: 1,
    says: /--peer 10\.0\.2\.14=CIDR/,
  },
  { flags: `${PEER} --conf /none.conf`, code: 1, says: /"\/none\.conf"/ },
  { flags: `${PEER} --conf /etc/hostname`, code: 1, says: /"\/etc\/hostname"/ },
  { flags: `${PEER} --conf /etc/empty`, code: 1, says: /podcidr is missing/ },
  { flags: "--nodes /none.json", code: 1, says: /"\/none\.json"/ },
  { flags: "--nodes /etc/empty", code: 1, says: /items/ },
  { flags: "--nodes -", code: 1, says: /"\/dev\/stdin"/ },
];

/** What the kernel refuses. Its own words follow the command. */
const BY_KERNEL: Refused[] = [
  "--peer 10.0.2.255", // the broadcast address
  "--peer 192.0.2.1", // behind a router
  "--peer 198.51.100.1", // unreachable
].map((flags) => ({
  flags,
  code: 1,
  says: /^Error: ip route add 10\.240\.1\.0\/24 via .*: .*(Error|RTNETLINK)/m,
}));

Deno.test("node-setup.ts changes nothing if it refuses", async () => {
  await using node = await start();
  await node.sh(`echo '{}' > /etc/empty
    echo '{ "podcidr": "10.9.0.0/24" }' > /etc/other
    ip link add cni0 up type bridge
    ip addr add 10.240.0.1/24 dev cni0
    ip route add unreachable 198.51.100.0/24`);
  const before = await tables(node);
  for (const { flags, code: status, says } of [...USAGE, ...SENSELESS]) {
    const { code, stdout, stderr } = await setup(node, flags);
    assertEquals([code, stdout], [status, ""], `${flags}: ${stderr}`);
    assertMatch(stderr, /^Error: /, flags);
    assertMatch(stderr, says, flags);
  }
  assertEquals(await tables(node), before);
  for (const { flags, code: status, says } of BY_KERNEL) {
    const { code, stderr } = await setup(node, flags);
    assertEquals(code, status, flags);
    assertMatch(stderr, says, flags);
    assertEquals(await tables(node), before, flags);
  }
});

Deno.test("node-setup.ts says that it needs root, or which program is missing", async () => {
  await using node = await start();
  const before = await tables(node);
  const user = (flags: string) =>
    run(node.enter("unshare", "-U", ...NODE_SETUP, ...flags.split(" ")));
  const { code, stderr } = await user(PEER);
  assertEquals(code, 1);
  assertMatch(stderr, /^Error: Only root .*--dry-run/s);
  assertEquals((await user(`${PEER} --dry-run`)).stdout, lines(COMMANDS));

  const tools = ["bash", "ip", "iptables", "sed", "sysctl"];
  for (const missing of tools) {
    const others = tools.filter((tool) => tool !== missing).join(" ");
    await node.sh(`rm -rf /opt/tools; mkdir /opt/tools
      for t in ${others}; do ln -s $(command -v $t) /opt/tools; done`);
    const words = ["env", "PATH=/opt/tools", ...NODE_SETUP, ...PEER.split(" ")];
    const { code, stderr } = await node.run(...words);
    assertEquals(code, 1);
    assertMatch(stderr, new RegExp(`^Error: .*\\b${missing}\\b.* not `, "s"));
  }
  await shim(node, "iptables", "echo no iptables >&2; exit 4");
  const cannot = await setup(node, PEER);
  assertMatch(cannot.stderr, /^Error: Cannot look .*no iptables\n$/s);
  assertEquals(cannot.stdout, "");
  assertEquals(await tables(node), before);
});

Deno.test("node-setup.ts does not touch others' routes to a peer's pods", async () => {
  await using node = await start();
  for (
    const route of [
      "10.240.1.0/24 via 10.0.2.99 dev enp0s3",
      "blackhole 10.240.1.0/24",
      "10.240.1.0/24 nexthop via 10.0.2.98 nexthop via 10.0.2.99",
    ]
  ) {
    await node.sh(`ip route add ${route}`);
    const before = await tables(node);
    const { code, stderr } = await setup(node, PEER);
    assertEquals(code, 1);
    // The kernel's own words, after the command that it refused.
    const refused = "ip route add 10.240.1.0/24 via 10.0.2.14 dev enp0s3";
    assert(stderr.startsWith(`Error: ${refused}: `), stderr);
    assertMatch(stderr, /File exists/);
    assertEquals(await tables(node), before);
    await succeed(node, `${PEER} --delete`);
    assertEquals(await tables(node), before);
    await node.sh(`ip route del ${route}`);
  }
});

/** Commands that fail, some after their work, and a stand-in's script. */
const FAULTS: [command: string, script: string][] = [
  ["sysctl -w", '[ "$1" != -w ] || { sysctl "$@"; exit 1; }'],
  ["iptables -A FORWARD -d", 'case "$*" in *"-A FORWARD -d"*) exit 4;; esac'],
  ["iptables -t nat -I", 'case "$*" in *"-I POSTROUTING"*) exit 4;; esac'],
  ["iptables -t nat -A", 'case "$*" in *MASQ*) iptables "$@"; exit 4;; esac'],
  [
    "ip route add 10.240.2.0/24",
    '[ "$2" != -batch ] || { sed 2s/enp0s3/none0/ | ip "$@"; exit 1; }',
  ],
  ["ip route add", '[ "$2" != -batch ] || { ip "$@"; exit 1; }'],
];

Deno.test("node-setup.ts undoes everything if a command fails", async () => {
  await using node = await start();
  // The node already had this rule, so it stays.
  await node.sh("iptables -A FORWARD -s 10.240.0.0/24 -j ACCEPT");
  const before = await tables(node);
  for (const [command, script] of FAULTS) {
    await shim(node, command.split(" ")[0], script);
    const flags = `${PEER} ${THIRD} --keep-source`;
    const { code, stdout, stderr } = await setup(node, flags);
    assertEquals(code, 1, script);
    assert(stderr.startsWith(`Error: ${command}`), stderr);
    // It stops at the failed command.
    assertMatch(stdout, /^sysctl.*# Failed/s, script);
    assert(!stdout.includes("MASQ") || script.includes("MASQ"), stdout);
    assertEquals(await tables(node), before, script);
    await node.sh("rm -r /opt/shims");
  }
});

Deno.test("node-setup.ts --delete goes on if a command fails", async () => {
  await using node = await start();
  const before = await tables(node);
  await succeed(node, `${PEER} ${THIRD}`);
  await shim(node, "iptables", 'case "$*" in *"-D FORWARD -d"*) exit 4;; esac');
  const other = '[ "$1" != -force ] || { sed 1s/240/9/ | ip "$@"; exit; }';
  await shim(node, "ip", other);
  const { code, stderr } = await setup(node, `${PEER} ${THIRD} --delete`);
  assertEquals(code, 1);
  assertMatch(stderr, /^Error: ip route del 10\.240\.2\.0\/24 .*\n/);
  assertMatch(stderr, /^iptables -D FORWARD -d 10\.240\.0\.0\/24/m);
  await node.sh(`iptables -D FORWARD -d 10.240.0.0/24 -j ACCEPT
    ip route del 10.240.2.0/24
    sysctl -qw net.ipv4.ip_forward=0`);
  assertEquals(await tables(node), before);
});

Deno.test("node-setup.ts --nodes finds this node in the list", async () => {
  await using node = await start();
  const peer = ["a", "10.0.2.14", "10.240.1.0/24"] as const;
  const before = await tables(node);
  for (
    const [list, says] of [
      [kubectl([...peer]), /must be this node, not none/],
      [kubectl(["c", "10.0.2.15"], ["b", "10.0.2.15"]), /"c" and "b"/],
      [
        kubectl(["b", "10.0.2.15", "10.9.0.0/24"]),
        /10\.240\.0\.0.*10\.9\.0\.0/,
      ],
    ] as const
  ) {
    const { code, stderr } = await setup(node, "--nodes -", list);
    assertEquals(code, 1);
    assertMatch(stderr, says);
  }
  assertEquals(await tables(node), before);
  for (
    const own of [["node2", "10.0.2.9"], ["b", "10.0.2.15"]] as const
  ) {
    const list = kubectl([...own], [...peer], ["new", "10.0.2.77"]);
    const { stdout, stderr } = await setup(node, "--nodes - --dry-run", list);
    assertEquals(stdout, lines(COMMANDS));
    assertMatch(stderr, /^Skipped node "new".*\n$/);
  }
  await node.sh("rm /etc/cni/net.d/*");
  const list = kubectl(["node2", "10.0.2.15", "10.240.0.0/24"], [...peer]);
  await Deno.writeTextFile(node.path("/etc/nodes.json"), list);
  const printed = await succeed(node, "--nodes /etc/nodes.json --dry-run");
  assertEquals(printed, lines(COMMANDS));
});

Deno.test("node-setup.ts --nodes routes to 1,000 nodes by one ip", async () => {
  await using node = await start();
  await node.sh(`sysctl -qw net.ipv4.ip_forward=1
    ip addr add 172.16.0.1/20 dev enp0s3`);
  const before = await tables(node);
  const nodes = Array.from(
    { length: 1000 },
    (_, i): [string, string, string] => [
      `n${i}`,
      `172.16.${1 + (i >> 8)}.${i & 255}`,
      `10.${100 + (i >> 8)}.${i & 255}.0/24`,
    ],
  );
  const list = kubectl(
    ...nodes,
    ["node2", "10.0.2.15", "10.240.0.0/24"],
  );
  for (const tool of ["ip", "iptables"]) {
    await shim(node, tool, `echo "${tool} $*" >> /opt/calls`);
  }
  const flags = "--nodes - --keep-source";
  assertMatch(await succeed(node, flags, list), /# 2003 new, 3 already/);
  assertEquals(await node.sh("ip route | grep -c via"), "1001");
  const once = await tables(node);
  assertMatch(await succeed(node, flags, list), /# 0 new, 2006 already/);
  assertEquals(await tables(node), once);
  await succeed(node, `${flags} --delete`, list);
  assertEquals(await tables(node), before);
  const calls = (await node.sh("cat /opt/calls")).split("\n");
  // Each run asks for routes. The first one also adds them, the last deletes.
  const batches = calls.filter((call) => /^ip .*-batch/.test(call));
  assertEquals(batches.length, 5);
  // And iptables waits for the lock.
  const iptables = calls.filter((call) => call.startsWith("iptables "));
  assert(iptables.every((call) => call.startsWith("iptables -w -")));
  assert(iptables.length < 20, `${iptables.length} calls`);
});

Deno.test("node-setup.ts --nodes joins the pods of three nodes", async () => {
  await using stack = new AsyncDisposableStack();
  const router = stack.use(await Node.start("router", null));
  await router.sh("ip link add br0 up type bridge");
  const list = kubectl(
    ["n1", "10.0.2.1", "10.240.1.0/24"],
    ["n2", "10.0.2.2", "10.240.2.0/24"],
    ["n3", "10.0.2.3", "10.240.3.0/24"],
  );
  const nodes: Node[] = [];
  for (const n of [1, 2, 3]) {
    const conf = { ...CONF, podcidr: `10.240.${n}.0/24` };
    const node = stack.use(await Node.start(`n${n}`, conf));
    await router.sh(`
      ip link add n${n} type veth peer name enp0s3 netns ${node.pid}
      ip link set n${n} up master br0`);
    await node.sh(`ip link set enp0s3 up
      ip addr add 10.0.2.${n}/24 dev enp0s3
      sysctl -qw net.bridge.bridge-nf-call-iptables=1
      iptables -P FORWARD DROP`);
    nodes.push(node);
  }
  const pods = await Promise.all(nodes.map((node) => node.start("pod")));
  const reach = async (from: number, to: number) => {
    const address = pods[to].json.ips[0].address.split("/")[0];
    const ping = ["ping", "-c1", "-W2", address];
    const { code } = await run(nodes[from].enterPod(pods[from], ...ping));
    return code === 0;
  };
  assert(!await reach(0, 1));
  // Counts n2's requests that have the address of n1's pod as source.
  const rule = "-s 10.240.1.2/32 -p icmp -m icmp --icmp-type 8";
  await nodes[1].sh(`iptables -A FORWARD ${rule}`);
  const seen = () => nodes[1].sh(`iptables -vS FORWARD | grep -e '${rule}'`);
  for (const flags of ["--nodes -", "--nodes - --keep-source"]) {
    for (const node of nodes) await succeed(node, flags, list);
    for (const from of [0, 1, 2]) {
      for (const to of [0, 1, 2].filter((to) => to !== from)) {
        assert(await reach(from, to), `${flags}: n${from + 1} to n${to + 1}`);
      }
    }
    const isKept = flags.includes("--keep-source");
    assertMatch(await seen(), isKept ? /-c [1-9]/ : /-c 0 0/);
  }
});

for (const { name, list, routes, skipped } of SHAPES) {
  Deno.test(`node-setup.ts --nodes reads ${name}`, async () => {
    await using node = await start();
    await node.sh("ip route add 192.0.2.0/24 via 10.0.2.2");
    const input = JSON.stringify(list);
    const { code, stderr } = await setup(node, "--nodes -", input);
    assertEquals(code, 0, stderr);
    const made = await node.sh(
      "ip route | grep '^10[.]240[.]' | sed 's/linkdown //' || true",
    );
    const expected = routes.map((route) => `${route} dev enp0s3 `);
    assertEquals(made, expected.join("\n").trimEnd());
    const named = stderr.split("\n").filter((line) => /^Skipped/.test(line));
    assertEquals(named.length, skipped.length, stderr);
    for (const [who, why] of skipped) {
      const line = named.find((it) => it.startsWith(`Skipped node "${who}"`));
      assert(line?.includes(why), `${who}: ${stderr}`);
    }
  });
}

Deno.test("node-setup.ts accepts a route that networkd keeps", async () => {
  await using node = await start();
  const route = "10.240.1.0/24 via 10.0.2.14 dev enp0s3";
  for (const words of ["proto static metric 9", "src 10.0.2.15"]) {
    await node.sh(`ip route add ${route} ${words}`);
    assert(!(await succeed(node, PEER)).includes("ip route"), words);
    // It is not ours, so --delete leaves it.
    await succeed(node, `${PEER} --delete`);
    await node.sh(`ip route del ${route} ${words}`);
  }
});

Deno.test("node-setup.ts refuses a pod CIDR that differs from the list's", async () => {
  await using node = await start();
  const list = kubectl(["node2", "10.0.2.15", "10.240.0.0/24"]);
  const ours = { ...CONF, podcidr: "10.240.7.0/24" };
  const folder = "/etc/cni/net.d";
  for (
    const [file, conf] of [
      ["1.conf", ours],
      ["1.conflist", { ...CONF, plugins: [{ type: "x" }, ours] }],
    ] as const
  ) {
    await node.sh(`rm ${folder}/*`);
    const path = node.path(`${folder}/${file}`);
    await Deno.writeTextFile(path, JSON.stringify(conf));
    const { code, stderr } = await setup(node, "--nodes - --dry-run", list);
    assertEquals(code, 1);
    assertMatch(stderr, /"10\.240\.7\.0\/24" is not the "10\.240\.0\.0\/24"/);
  }
});

Deno.test("the README's unit restores everything after a reboot", async () => {
  await using node = await start();
  await succeed(node, PEER);
  const before = await tables(node);
  await node.sh(
    `iptables -F FORWARD; iptables -t nat -F; ip route del 10.240.1.0/24
    sysctl -qw net.ipv4.ip_forward=0 net.bridge.bridge-nf-call-iptables=0
    iptables -A FORWARD -s 10.9.0.0/24 -j ACCEPT
    iptables -t nat -A POSTROUTING -s 10.9.0.0/24 -j MASQUERADE
    mkdir -p /opt/custom-cni; mount --bind '${ROOT}' /opt/custom-cni`,
  );
  const readme = await Deno.readTextFile(join(ROOT, "README.md"));
  const [, line] = /^ExecStart=(.*)$/m.exec(readme)!;
  // The README copies deno there. Here it is the tests' own.
  const deno = line.replace("/usr/local/bin/deno", Deno.execPath());
  assert(deno !== line, line);
  await node.sh(deno);
  assertEquals(await tables(node), before);
});

Deno.test("node-setup.ts warns if the kernel lacks br_netfilter, and goes on", async () => {
  await using node = await start();
  await succeed(node, PEER);
  await shim(
    node,
    "modprobe",
    "echo Module br_netfilter not found >&2; exit 1",
  );
  // The key is missing: "sysctl -e" leaves it out, "sysctl -w" fails.
  await shim(
    node,
    "sysctl",
    `[ "$1" != -e ] || exec sysctl "$2"
    case "$*" in *bridge*) echo no such key >&2; exit 1;; esac`,
  );
  const { code, stdout, stderr } = await setup(node, PEER);
  assertEquals(code, 0);
  assertMatch(stdout, /# 2 new, 5 already there\n$/);
  assertMatch(
    stderr,
    /^Warning: modprobe br_netfilter: Module br_netfilter not/,
  );
});

Deno.test("node-setup.ts warns if modprobe is missing, and goes on", async () => {
  await using node = await start();
  const tools = "bash ip iptables sed sysctl";
  await node.sh(`mkdir /opt/tools
    sysctl -qw net.bridge.bridge-nf-call-iptables=1
    for t in ${tools}; do ln -s $(command -v $t) /opt/tools; done
    # The key is missing until somebody loads the module.
    rm /opt/tools/sysctl
    printf '#!/bin/sh\n[ "$1" != -e ] || exec /sbin/sysctl "$2"
case "$*" in *bridge*) echo no such key >&2; exit 1;; esac
exec /sbin/sysctl "$@"\n' > /opt/tools/sysctl
    chmod +x /opt/tools/sysctl`);
  const words = ["env", "PATH=/opt/tools", ...NODE_SETUP, ...PEER.split(" ")];
  const { code, stdout, stderr } = await node.run(...words);
  assertEquals(code, 0, stderr);
  assertMatch(stdout, /^# 7 new, 0 already there$/m);
  assertMatch(stderr, /^Warning: modprobe br_netfilter: modprobe is not on/);
  assertMatch(await tables(node), /-A FORWARD -d 10\.240\.0\.0\/24 -j ACCEPT/);
  assertMatch(await tables(node), /MASQUERADE/);
});

Deno.test("node-setup.ts turns bridge-nf on, and --delete leaves it on", async () => {
  await using node = await start();
  await succeed(node, PEER);
  await node.sh("sysctl -qw net.bridge.bridge-nf-call-iptables=0");
  const stdout = await succeed(node, "--only forward");
  assertMatch(stdout, /^sysctl -w net\.bridge\.bridge-nf-call-iptables=1$/m);
  await succeed(node, `${PEER} --delete`);
  const now = await node.sh("sysctl -n net.bridge.bridge-nf-call-iptables");
  assertEquals(now, "1");
});
