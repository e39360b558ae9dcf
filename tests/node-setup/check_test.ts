/** node-setup.ts --check: what an operator can't see, each by its symptom. */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { CONF, Node, NODE_SETUP } from "../lab/node.ts";
import { ROOT } from "../setup/root.ts";

const PEER = ["--peer", "10.0.2.14"];
const FOLDER = "/etc/cni/net.d";

/** node2 with its bridge, all commands of the tutorial run. */
async function start(): Promise<Node> {
  const node = await Node.start("node2", CONF);
  await node.sh(`ip link add enp0s3 up type veth peer name unplugged
    ip link set unplugged up
    ip addr add 10.0.2.15/24 dev enp0s3
    ip route add default via 10.0.2.2
    ip link add cni0 up type bridge
    ip addr add 10.240.0.1/24 dev cni0`);
  await node.sh(`${NODE_SETUP.join(" ")} ${PEER.join(" ")}`);
  return node;
}

/** What is wrong, with the command that mends each. */
async function check(node: Node, ...flags: string[]) {
  const { code, stdout, stderr } = await node.run(
    ...NODE_SETUP,
    "--check",
    ...flags,
  );
  assertMatch(stdout, /^((ok {3}.+|BAD {2}.+\n {5}.+)\n)+$/, stdout + stderr);
  const troubles = Array.from(
    stdout.matchAll(/^BAD {2}(.*)\n {5}(.*)$/gm),
    ([, message, mend]) => ({ message, mend }),
  );
  assertEquals(code, troubles.length ? 1 : 0, stdout);
  return troubles;
}

/** The one thing that is wrong. */
async function only(node: Node, ...flags: string[]) {
  const [trouble, ...others] = await check(node, ...flags);
  assertEquals(others, []);
  return trouble;
}

Deno.test("a node that is well has no trouble, and none is made", async () => {
  await using node = await start();
  const before = await node.listing() +
    await node.sh("iptables-save | grep -v ^#");
  assertEquals(await check(node), []);
  assertEquals(await check(node, ...PEER), []);
  const after = await node.listing() +
    await node.sh("iptables-save | grep -v ^#");
  assertEquals(after, before);
});

/** A symptom, what makes it, what is said, and the mend as it is pasted. */
const FAULTS: [symptom: string, fault: string, says: RegExp, mend: RegExp][] = [
  [
    "pods reach no other network: ip_forward is off",
    "sysctl -qw net.ipv4.ip_forward=0",
    /forwards no packets/,
    /^sysctl -w net\.ipv4\.ip_forward=1$/,
  ],
  [
    "a Service is dead on its own node: bridged packets bypass iptables",
    "sysctl -qw net.bridge.bridge-nf-call-iptables=0",
    /a Service is dead on its own node/,
    /^sysctl -w net\.bridge\.bridge-nf-call-iptables=1$/,
  ],
  [
    "a firewall reload took a rule away",
    "iptables -D FORWARD -d 10.240.0.0/24 -j ACCEPT",
    /FORWARD lacks a rule/,
    /^iptables -A FORWARD -d 10\.240\.0\.0\/24 -j ACCEPT$/,
  ],
  [
    "the internet never answers: MASQUERADE is gone",
    "iptables -t nat -F POSTROUTING",
    /nobody can answer/,
    /MASQUERADE$/,
  ],
  [
    "a link down and up took the route to a peer's pods away",
    "ip route del 10.240.1.0/24",
    /have no route/,
    /^ip route add 10\.240\.1\.0\/24 via 10\.0\.2\.14 dev enp0s3$/,
  ],
  [
    "the same where FORWARD drops what no rule accepts",
    "iptables -P FORWARD DROP; iptables -D FORWARD -d 10.240.0.0/24 -j ACCEPT",
    /FORWARD lacks a rule/,
    /^iptables -A FORWARD -d 10\.240\.0\.0\/24 -j ACCEPT$/,
  ],
  [
    "pods reach nobody, though iptables -S shows our rules: a rule before them",
    "iptables -I FORWARD -j DROP",
    /^iptables-nft -A FORWARD -j DROP drops/,
    /^for way in -s -d; do iptables-nft -I FORWARD \$way 10\.240\.0\.0\/24 /,
  ],
];

/** What drops packets besides the tutorial's rules, and what is said of it. */
const RULES: [symptom: string, fault: string, says: string][] = [
  [
    "a policy of iptables-legacy",
    "iptables-legacy -P FORWARD DROP",
    "iptables-legacy :FORWARD DROP drops",
  ],
  [
    "a rule of iptables-legacy, for one way",
    "iptables-legacy -A FORWARD -o cni0 -p tcp -j REJECT",
    "iptables-legacy -A FORWARD -o cni0 -p tcp -j REJECT .* drops",
  ],
  [
    "a chain of iptables, for new calls to pods",
    `iptables -N FW
      iptables -I FORWARD -m comment --comment "a b" -j FW
      iptables -A FW -i enp0s3 -m conntrack --ctstate NEW -j DROP`,
    "iptables-nft -A FW -i enp0s3 -m conntrack .* -j DROP drops",
  ],
  [
    "a rule of iptables before the routing",
    "iptables -t raw -A PREROUTING -s 10.240.0.0/24 -j DROP",
    "iptables-nft has a rule that drops",
  ],
  [
    "a set of addresses that a rule of iptables names",
    `ipset create bad hash:net; ipset add bad 10.240.0.0/16
      iptables -I FORWARD -m set --match-set bad src -j REJECT`,
    "iptables-nft -A FORWARD -m set --match-set bad src -j REJECT .* drops",
  ],
  [
    "a rule for a peer's pods",
    "iptables -I FORWARD -d 10.240.1.0/24 -j REJECT",
    "iptables-nft -A FORWARD -d 10.240.1.0/24 -j REJECT .* drops",
  ],
  [
    "a rule of another table",
    "iptables -t mangle -A FORWARD -i cni0 -j DROP; iptables -P OUTPUT DROP",
    "iptables-nft has a rule that drops",
  ],
  [
    "a policy of nftables",
    nft("type filter hook forward priority 9; policy drop;"),
    "table inet other has a rule that drops",
  ],
  [
    "nftables' own table, by the name of one of iptables'",
    nft("type filter hook forward priority 9; policy drop;", "ip filter"),
    "table ip filter has a rule that drops",
  ],
  [
    "a set, in a chain before the routing",
    nft(`type filter hook prerouting priority -300;
    ip saddr { 10.9.0.0/16, 10.240.0.0/16 } counter drop`),
    "table inet other has a rule that drops",
  ],
  [
    "a map of devices",
    nft(`type filter hook forward priority 0;
    iifname vmap { "eth1" : accept, "cni0" : drop }`),
    "table inet other has a rule that drops",
  ],
  [
    "a firewall that knows the pods not, as firewalld's",
    nft(`type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    ct state invalid drop
    iif "lo" accept
    ip protocol icmp accept
    iifname "eth1" goto trusted
    reject with icmpx admin-prohibited comment "end"`),
    "table inet other has a rule that drops",
  ],
];

/** The commands that make a table of nftables besides iptables'. */
function nft(chain: string, table = "inet other"): string {
  return `nft -f - <<END
table ${table} {
  chain trusted {
    accept
  }
  chain passing {
    ${chain}
  }
}
END`;
}

for (const [symptom, fault, says] of RULES) {
  Deno.test(`pods reach nobody: ${symptom}`, async () => {
    await using node = await start();
    await node.sh(fault);
    // A run warns of it as well.
    const [{ message, mend }, { code, stderr }] = await Promise.all([
      only(node, ...PEER),
      node.run(...NODE_SETUP, ...PEER),
    ]);
    assertMatch(message, new RegExp(`^${says} pods' packets$`));
    assertEquals(code, 0);
    assert(stderr.includes(`Warning: ${message}\n  ${mend}\n`), stderr);
    // What is to be pasted mends it, or shows rules that others look after.
    const shown = await node.sh(mend);
    if (mend.includes("iptables-nft-save")) {
      assertMatch(shown, /(PREROUTING|FORWARD).* DROP/);
      await node.sh("iptables -t raw -F; iptables -t mangle -F");
    }
    if (mend.startsWith("nft list ")) {
      assertMatch(shown, /drop|reject/);
      const [, chain] = /chain ([a-z]+) \{\n\s+type/.exec(shown)!;
      await node.sh(mend.replace("list table", "delete chain") + ` ${chain}`);
    }
    assertEquals(await check(node, ...PEER), []);
  });
}

/** Rules that let pods' packets pass, also such as a copy can hardly take. */
const HARMLESS = [
  nft(`type filter hook forward priority 0; policy drop;
    ct state { established, related } accept
    iifname { "cni0", "eth9" } accept
    oif "cni0" ip saddr 10.0.2.0/24 goto trusted`),
  nft(`type filter hook forward priority 0; policy accept;
    ip saddr 10.9.0.0/16 drop
    ip daddr != 10.0.0.0/8 ip saddr != 10.0.0.0/8 drop
    iif "unplugged" oif "unplugged" drop
    meta l4proto udp drop`),
  nft(`type filter hook prerouting priority -150;
    fib saddr . iif oif missing drop`),
  nft("type filter hook input priority 0; policy drop;"),
  nft("type filter hook output priority 0; policy drop;"),
  nft(
    'type filter hook ingress device "unplugged" priority 0; policy drop;',
    "netdev other",
  ),
  `iptables -I FORWARD -m physdev --physdev-is-bridged -j ACCEPT
    iptables -t mangle -A PREROUTING -m recent --name x --set
    iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j RETURN
    iptables -t raw -A PREROUTING -m rpfilter --invert -j DROP
    iptables -I FORWARD -p udp -j DROP
    iptables -I FORWARD -m conntrack --ctstate INVALID -j DROP`,
  "iptables-legacy -P INPUT DROP; iptables-legacy -P OUTPUT DROP",
  // As kube-proxy writes it.
  `nfacct add invalid; iptables -N KUBE-FORWARD; iptables -I FORWARD -j KUBE-FORWARD
    iptables -A KUBE-FORWARD -m conntrack --ctstate INVALID \\
      -m nfacct --nfacct-name invalid -j DROP`,
  `iptables -P FORWARD DROP
    iptables -A FORWARD -i enp0s3 ! -s 10.0.2.14 -m conntrack --ctstate NEW -j DROP`,
  `ip6tables -P FORWARD DROP
    ip6tables -A FORWARD -p icmpv6 -m icmp6 --icmpv6-type 133 -m hl --hl-eq 255 -j ACCEPT`,
  "nft add table arp a; nft add chain arp a c '{ type filter hook input priority 0; }'",
];

Deno.test("rules that let pods' packets pass are no trouble", async () => {
  for (const rules of HARMLESS) {
    await using node = await start();
    await node.sh(rules);
    assertEquals(await check(node, ...PEER), [], rules);
  }
});

Deno.test("a firewall that lets in nobody but peers is no trouble", async () => {
  await using node = await start();
  const rule = (from: string) =>
    nft(`type filter hook forward priority 0;
      ip saddr != ${from} iifname "enp0s3" ct state new drop`);
  await node.sh(rule("10.0.2.99"));
  assertEquals(await check(node), []);
  const { message } = await only(node, ...PEER);
  assertEquals(message, "table inet other has a rule that drops pods' packets");
  await node.sh("nft flush chain inet other passing; " + rule("10.0.2.14"));
  assertEquals(await check(node, ...PEER), []);
});

Deno.test("a firewall that does not know a peer's pods, who keep their source", async () => {
  await using node = await start();
  await node.sh(nft(`type filter hook forward priority 0; policy drop;
    ct state established accept
    iifname "cni0" accept
    ip saddr 10.0.2.14 accept`));
  assertEquals(await check(node, ...PEER), []);
  await node.sh(`${NODE_SETUP.join(" ")} ${PEER.join(" ")} --keep-source`);
  const { message } = await only(node, ...PEER, "--keep-source");
  assertEquals(message, "table inet other has a rule that drops pods' packets");
  await node.sh(
    "nft add rule inet other passing ip saddr 10.240.1.0/24 accept",
  );
  assertEquals(await check(node, ...PEER, "--keep-source"), []);
});

Deno.test("a table that ends with its program, as firewalld's, is tried", async () => {
  await using node = await start();
  await node.sh(`(
      echo 'add table inet own { flags owner; }'
      echo 'add chain inet own c { type filter hook forward priority 9; }'
      echo 'add rule inet own c oifname "enp0s3" drop'
      sleep 9
    ) 2>&- | nft -i > /dev/null 2>&1 &
    for i in $(seq 50); do
      nft list chain inet own c 2>&- | grep drop && break; sleep 0.1
    done`);
  const { message, mend } = await only(node, ...PEER);
  assertEquals(message, "table inet own has a rule that drops pods' packets");
  assertEquals(mend, "nft list table inet own");
});

Deno.test("pods do not reach the internet: a rule for what is no peer", async () => {
  await using node = await start();
  await node.sh("iptables -I FORWARD ! -d 10.0.0.0/8 -i cni0 -j DROP");
  assertEquals(await check(node, ...PEER), []);
  const { message, mend } = await only(node);
  assertMatch(message, /^iptables-nft -A FORWARD ! -d 10\.0\.0\.0\/8 .* drops/);
  await node.sh(mend);
  assertEquals(await check(node), []);
});

Deno.test("a run without unshare ends well, and warns", async () => {
  await using node = await start();
  await node.sh(`iptables -D FORWARD -d 10.240.0.0/24 -j ACCEPT
    mkdir /opt/tools; ln -sf $(ls -d /bin/* /sbin/* | grep -v unshare) /opt/tools`);
  const { code, stdout, stderr } = await node.run(
    ...["env", "PATH=/opt/tools", ...NODE_SETUP, ...PEER],
  );
  assertEquals([code, stdout.split("\n").at(-2)], [
    0,
    "# 1 new, 6 there already",
  ]);
  assertMatch(stderr, /^Warning: Cannot try iptables-nft\n {2}.*unshare/);
});

Deno.test("rules that can't be tried are told", async () => {
  await using node = await start();
  await node.sh(`mkdir /opt/shims
    printf '#!/bin/sh\\necho sorry >&2; exit 1\\n' > /opt/shims/iptables-nft-restore
    chmod +x /opt/shims/*`);
  const path = `PATH=/opt/shims:${Deno.env.get("PATH")}`;
  const { code, stdout } = await node.run(
    ...["env", path, ...NODE_SETUP, "--check", ...PEER],
  );
  assertEquals(code, 1);
  assertMatch(stdout, /^BAD {2}Cannot try iptables-nft\n {5}sorry$/m);
});

/** What leads packets astray, what is said, and what takes it away again. */
const SHADOWS: [symptom: string, fault: string, says: RegExp, mend: string][] =
  [
    [
      "the node does not reach its pods: a blackhole in its own range",
      "ip route add blackhole 10.240.0.128/25",
      /^Packets to 10\.240\.0\.128 go to nobody, not to cni0$/,
      "ip route del blackhole 10.240.0.128/25",
    ],
    [
      "the node does not reach one pod: its address is unreachable",
      "ip route add unreachable 10.240.0.7",
      /^Packets to 10\.240\.0\.7 go to nobody, not to cni0$/,
      "ip route del unreachable 10.240.0.7",
    ],
    [
      "some of a peer's pods are lost: a more specific route",
      "ip route add 10.240.1.32/27 via 10.0.2.99",
      /^Packets to 10\.240\.1\.32 go to 10\.0\.2\.99, not to 10\.0\.2\.14$/,
      "ip route del 10.240.1.32/27",
    ],
    [
      "a peer's pods are lost: another table shadows main",
      `ip route add default via 10.0.2.98 table 99
        ip rule add pref 100 to 10.240.1.0/24 lookup 99`,
      /^Packets to 10\.240\.1\.0 go to 10\.0\.2\.98, not to 10\.0\.2\.14$/,
      "ip rule del pref 100",
    ],
    [
      "a peer's pods are lost: a rule refuses them",
      "ip rule add pref 100 to 10.240.1.0/24 unreachable",
      /^Packets to 10\.240\.1\.0 go to nobody, not to 10\.0\.2\.14$/,
      "ip rule del pref 100",
    ],
  ];

for (const [symptom, fault, says, mend] of SHADOWS) {
  Deno.test(symptom, async () => {
    await using node = await start();
    await node.sh(fault);
    const trouble = await only(node, ...PEER);
    assertMatch(trouble.message, says);
    // What is to be pasted shows what it is.
    const shown = await node.sh(trouble.mend);
    const [what] = /blackhole|unreachable|via 10\.0\.2\.9\d/.exec(fault)!;
    assert(shown.includes(what), shown);
    // A run, which finds all its routes there, warns of it.
    const { code, stdout, stderr } = await node.run(...NODE_SETUP, ...PEER);
    assertEquals([code, stdout], [0, "# 0 new, 7 there already\n"]);
    assertEquals(stderr, `Warning: ${trouble.message}\n  ${trouble.mend}\n`);
    await node.sh(mend);
    assertEquals(await check(node, ...PEER), []);
  });
}

Deno.test("before its first pod a node has no cni0, and no trouble", async () => {
  await using node = await start();
  await node.sh("ip link del cni0; ip route add blackhole 10.240.0.128/25");
  assertEquals(await check(node, ...PEER), []);
});

Deno.test("large downloads hang: the NIC takes less than pods send", async () => {
  await using node = await start();
  await node.sh("ip link set enp0s3 mtu 1400");
  for (const flags of [[], PEER]) {
    const trouble = await only(node, ...flags);
    assertMatch(trouble.message, /1500 bytes at once, too many for enp0s3$/);
    assertEquals(trouble.mend, '"mtu": 1400');
  }
  await node.configure({ ...CONF, mtu: 1400 });
  assertEquals(await check(node), []);
  // Only the way to the others counts.
  await node.sh("ip link add thin0 mtu 1300 up type veth");
  assertEquals(await check(node), []);
});

Deno.test("no pod starts: the plugin is missing, or may not run", async () => {
  await using node = await start();
  await node.sh("umount /opt/cni/bin/custom-cni");
  const file = "/opt/cni/bin/custom-cni";
  for (const fault of ["chmod -x", "rm"]) {
    await node.sh(`${fault} ${file}`);
    assertEquals(await check(node), [{
      message: `${file} does not start`,
      mend: `install -D dist/custom-cni ${file}`,
    }]);
  }
  await node.sh(`cd ${ROOT} && install -D dist/custom-cni ${file}`);
  assertEquals(await check(node), []);
});

for (const [symptom, fault, says, mend] of FAULTS) {
  Deno.test(symptom, async () => {
    await using node = await start();
    await node.sh(fault);
    const trouble = await only(node, ...PEER);
    assertMatch(trouble.message, says);
    assertMatch(trouble.mend, mend);
    // What is to be pasted does mend it.
    await node.sh(trouble.mend);
    assertEquals(await check(node, ...PEER), []);
  });
}

Deno.test("a stale cni0 has another prefix, or is no bridge", async () => {
  await using node = await start();
  for (const kind of ["bridge", "veth"]) {
    await node.sh(`ip link del cni0; ip link add cni0 up type ${kind}
      ip addr add 10.240.0.1/16 dev cni0`);
    const troubles = await check(node, ...PEER);
    assert(troubles.some((it) => /ip link del cni0/.test(it.mend)), kind);
  }
});

Deno.test("no pod starts: the node is full", async () => {
  await using node = await start();
  await node.configure({ ...CONF, podcidr: "10.9.0.0/30" });
  await node.sh("ip link add veth2 type veth");
  const full = (await check(node)).map(({ message, mend }) => message + mend);
  assert(
    full.some((it) => /1 of 1 addresses are used.*kubectl/.test(it)),
    `${full}`,
  );
});

const OTHER = { cniVersion: "1.0.0", name: "other", type: "bridge" };
const LIST = { cniVersion: "1.0.0", name: "pods" };
const OURS = { type: "custom-cni", podcidr: "10.240.0.0/24" };

/** What no runtime or ADD takes: files by name, and what is said of it. */
const CONFS: [files: Record<string, unknown>, says: RegExp, mend: RegExp][] = [
  [{}, /no conf \("cni plugin not initialized"\)/, /^cp 10-custom-cni\.conf/],
  [{ "1.conflist": CONF }, /single conf/, /^mv \S+1\.conflist \S+1\.conf$/],
  [
    { "1.conf": { ...LIST, plugins: [OURS] } },
    /is a list/,
    /^mv \S+1\.conf \S+1\.conflist$/,
  ],
  [
    { "1.conf": { ...CONF, name: undefined } },
    /1\.conf: name ""/,
    /^vi \S+1\.conf/,
  ],
  [
    { "1.conflist": { ...LIST, name: undefined, plugins: [OURS] } },
    /1\.conflist: name ""/,
    /^vi \S+1\.conflist/,
  ],
  [
    { "1.conf": { ...CONF, cniVersion: "0.2.0" } },
    /"0\.2\.0"/,
    /^vi .*0\.3\.0/,
  ],
  [
    { "1.conf": { ...CONF, cniVersion: "1.2.0" } },
    /"1\.2\.0"/,
    /^vi .*1\.1\.0/,
  ],
  [
    { "1.conf": { ...CONF, podcidr: "10.0.0.1/24" } },
    /1\.conf: podcidr/,
    /^vi /,
  ],
  [
    { "1.conf": '{ "name": ' },
    /Cannot read "\S+1\.conf"/,
    /^vi \S+1\.conf .*SyntaxError/,
  ],
  [{ "1.conf": "" }, /1\.conf/, /^vi \S+1\.conf /],
  [{ "1.conf": "null" }, /1\.conf/, /^vi \S+1\.conf /],
  [{ "1.conflist": { ...LIST, plugins: {} } }, /for others/, /^mv /],
  [{ "1.conflist": { ...LIST, plugins: [null] } }, /single conf/, /^mv /],
  [
    { "1.conflist": { ...LIST, plugins: [OTHER] }, "pods/1.json": OURS },
    /1\.conflist comes first, for others/,
    /^mv /,
  ],
  [
    {
      "1.conflist": { ...LIST, loadOnlyInlinedPlugins: true, plugins: [OTHER] },
      "pods/1.conf": OURS,
    },
    /1\.conflist comes first, for others/,
    /^mv /,
  ],
  [
    { "1.conflist": LIST, "pods/1.conf": "{" },
    /Cannot read "\S+pods\/1\.conf"/,
    /^vi \S+pods\/1\.conf/,
  ],
  [{ "1.conf": {} }, /1\.conf comes first, for others/, /^mv /],
  [{ "1.json": OTHER, "2.conf": CONF }, /first, for others/, /^mv \S+1\.json/],
];

Deno.test("no pod starts, for a conf that no runtime or ADD takes", async () => {
  await using node = await start();
  for (const [files, says, mend] of CONFS) {
    await node.sh(`rm -rf ${FOLDER}/*`);
    await write(node, files);
    const [trouble] = await check(node, "--podcidr", "10.240.0.0/24");
    assertMatch(trouble?.message, says);
    assertMatch(trouble.mend, mend);
  }
});

/** What is taken, also where the conf is not a file of ours alone. */
const GOOD: Record<string, unknown>[] = [
  { "1.json": CONF },
  { "1.conflist": { ...LIST, plugins: [OURS, { type: "portmap" }] } },
  { "1.conflist": LIST, "pods/1.conf": OURS },
  { "1.conflist": { ...LIST, plugins: [OTHER] }, "pods/9.conf": OURS },
  { "1.conf": { ...OTHER, type: "multus", delegates: [CONF] } },
  { "1.conf": { ...OTHER, type: "multus", delegates: [OURS] } },
];

Deno.test("a single conf, a list, a folder, Multus: each is a conf for us", async () => {
  await using node = await start();
  for (const files of GOOD) {
    await node.sh(`rm -rf ${FOLDER}/*`);
    await write(node, files);
    assertEquals(await check(node), [], JSON.stringify(files));
  }
});

async function write(node: Node, files: Record<string, unknown>) {
  for (const [name, conf] of Object.entries(files)) {
    const text = typeof conf === "string" ? conf : JSON.stringify(conf);
    await node.sh(`mkdir -p $(dirname ${FOLDER}/${name})`);
    await Deno.writeTextFile(node.path(`${FOLDER}/${name}`), text);
  }
}

Deno.test("iptables' own warning of legacy tables is shown", async () => {
  await using node = await start();
  await node.sh("iptables-legacy -P FORWARD DROP");
  const { code, stderr } = await node.run(...NODE_SETUP, ...PEER);
  assertEquals(code, 0);
  assertMatch(stderr, /^# Warning: iptables-legacy tables present/m);
});

Deno.test("a kernel without br_netfilter is a warning, with its reason", async () => {
  await using node = await start();
  await node.sh(`mkdir /opt/shims
    printf '#!/bin/sh\\ncase "$*" in *bridge*) exit 1;; esac
exec /usr/sbin/sysctl "$@"\\n' | sed 's/-e //' > /opt/shims/sysctl
    printf '#!/bin/sh\\necho Module br_netfilter not found >&2; exit 1\\n' \\
      > /opt/shims/modprobe
    printf '#!/bin/sh\\n[ "$1" != -e ] || exec /usr/sbin/sysctl "$2"
case "$*" in *bridge*) echo no such key >&2; exit 1;; esac
exec /usr/sbin/sysctl "$@"\\n' > /opt/shims/sysctl
    chmod +x /opt/shims/*`);
  const path = `PATH=/opt/shims:${Deno.env.get("PATH")}`;
  const { code, stdout, stderr } = await node.run(
    ...["env", path, ...NODE_SETUP, ...PEER],
  );
  assertEquals(code, 0);
  assertMatch(stdout, /# 0 new, 5 there already\n$/);
  assertMatch(
    stderr,
    /^Warning: modprobe br_netfilter: Module br_netfilter not/,
  );
});

Deno.test("--delete leaves br_netfilter on; a run turns it on", async () => {
  await using node = await start();
  await node.sh("sysctl -qw net.bridge.bridge-nf-call-iptables=0");
  const stdout = await node.sh(`${NODE_SETUP.join(" ")} --only forward`);
  assertMatch(stdout, /^sysctl -w net\.bridge\.bridge-nf-call-iptables=1$/m);
  await node.sh(`${NODE_SETUP.join(" ")} ${PEER.join(" ")} --delete`);
  const now = await node.sh("sysctl -n net.bridge.bridge-nf-call-iptables");
  assertEquals(now, "1");
});
