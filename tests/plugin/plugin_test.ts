/**
 * What the plugin does to the kernel: the built binary on real namespaces,
 * with real packets. Each test has a node of its own (see lab/node.ts).
 *
 * @module
 */
import {
  assert,
  assertEquals,
  assertMatch,
  assertNotEquals,
  assertRejects,
} from "@std/assert";
import {
  addressOf,
  type Answer,
  conf,
  Node,
  type Pod,
  vethOf,
} from "../lab/node.ts";

/** The address that ADD answered, with its prefix. */
const cidrOf = ({ json }: Answer): string => json.ips[0].address;

/** A packet there and back, from a pod or from the node; throws if it's lost. */
function ping(node: Node, to: string, from?: Pod, wait = 5): Promise<string> {
  const line = `ping -c1 -W${wait} ${to}`;
  return from ? node.in(from, line) : node.sh(line);
}

/** Makes n the number that was given last. */
const setCounter = (node: Node, n: number) =>
  node.sh(`echo ${n} > /tmp/last_allocated_ip`);

/** Asserts that a call failed with this code, and said this. */
function assertError({ code, json }: Answer, cniCode: number, text: RegExp) {
  assertNotEquals(code, 0);
  assertEquals(json.code, cniCode);
  assertMatch(`${json.msg}; ${json.details}`, text);
}

Deno.test("ADD lets pods, gateway and node reach each other", async () => {
  await using node = await Node.start("node1");
  const a = await node.start("alpine1");
  const b = await node.start("nginx1");
  for (const [pod, other] of [[a, b], [b, a]]) {
    await ping(node, addressOf(other), pod);
    await ping(node, "10.240.0.1", pod);
    await ping(node, addressOf(pod));
  }
});

Deno.test("ADD needs the binary alone, with ip and ln on the PATH", async () => {
  await using node = await Node.start("node1");
  await node.sh(`mkdir /opt/alone /opt/tools
    cp /opt/cni/bin/custom-cni /opt/alone
    ln -s $(command -v ip) $(command -v ln) /opt/tools`);
  const pod = await node.start("alpine1", {
    env: { PATH: "/opt/tools" },
    plugin: "/opt/alone/custom-cni",
  });
  await ping(node, addressOf(pod));
});

for (
  const { podcidr, gateway, first, beforeLast, last, next } of [
    {
      podcidr: "10.240.1.0/24",
      gateway: "10.240.1.1",
      first: "10.240.1.2/24",
      beforeLast: 253,
      last: "10.240.1.254/24",
      next: "10.240.1.3/24",
    },
    {
      podcidr: "10.240.0.0/16",
      gateway: "10.240.0.1",
      first: "10.240.0.2/16",
      beforeLast: 65533,
      last: "10.240.255.254/16",
      next: "10.240.0.3/16",
    },
    {
      podcidr: "10.240.1.16/28",
      gateway: "10.240.1.17",
      first: "10.240.1.18/28",
      beforeLast: 13,
      last: "10.240.1.30/28",
      next: "10.240.1.19/28",
    },
  ]
) {
  Deno.test(`ADD goes round ${podcidr}`, async () => {
    await using node = await Node.start("node1", conf({ podcidr }));
    const a = await node.start("alpine1");
    assertEquals(cidrOf(a), first);
    assertEquals(a.json.ips[0].gateway, gateway);
    await setCounter(node, beforeLast);
    const b = await node.start("nginx1");
    assertEquals(cidrOf(b), last);
    await ping(node, addressOf(a), b);
    await ping(node, gateway, b);
    // Behind the last one is the broadcast address.
    assertEquals(cidrOf(await node.start("nginx2")), next);
  });
}

Deno.test("ADD answers 11 when the range is full, until a DEL", async () => {
  await using node = await Node.start(
    "node1",
    conf({ podcidr: "10.9.9.4/30" }),
  );
  const a = await node.start("alpine1");
  assertEquals(cidrOf(a), "10.9.9.6/30");
  const b = await node.sandbox("nginx1");
  const before = await node.listing(b);
  assertError(await node.cni("ADD", b), 11, /10\.9\.9\.4\/30/);
  assertEquals(await node.listing(b), before);
  // The bridge is made before it turns out that there is no room, and may stay.
  await node.sh("ip link del cni0");
  const bare = await node.listing(b);
  assertError(await node.cni("ADD", b), 11, /10\.9\.9\.4\/30/);
  await node.sh("ip link del cni0");
  assertEquals(await node.listing(b), bare);
  await node.cni("DEL", a);
  assertEquals(cidrOf(await node.cni("ADD", b)), "10.9.9.6/30");
});

Deno.test("ADD and DEL do not mind the variables of containerd", async () => {
  await using node = await Node.start("node1");
  // Debian's containerd has a path for libraries, and its plugins inherit it.
  const env = { LD_LIBRARY_PATH: "/var/lib/containerd/opt/lib", LANG: "de_DE" };
  const pod = await node.start("alpine1", { env });
  await ping(node, addressOf(pod));
  assertEquals((await node.cni("DEL", pod, { env })).code, 0);
});

Deno.test("ADD gives a released address only after all others", async () => {
  await using node = await Node.start(
    "node1",
    conf({ podcidr: "10.9.9.0/29" }),
  );
  const a = await node.start("alpine1");
  await node.start("nginx1");
  await node.cni("DEL", a);
  for (const n of [4, 5, 6, 2]) {
    assertEquals(cidrOf(await node.start("nginx2")), `10.9.9.${n}/29`);
  }
});

Deno.test("ADD gives a reused address to who has it in an ARP cache", async () => {
  await using node = await Node.start("node1");
  const peer = await node.start("nginx1");
  const a = await node.start("alpine1");
  await ping(node, addressOf(a), peer);
  await node.cni("DEL", a);
  await setCounter(node, 2);
  const b = await node.start("alpine2");
  assertEquals(addressOf(b), addressOf(a));
  await ping(node, addressOf(b), peer);
});

Deno.test("ADD and DEL leave the bridge its MAC", async () => {
  await using node = await Node.start("node1");
  const mac = () => node.sh("ip -o link show cni0 | grep -o 'ether [^ ]*'");
  const a = await node.start("alpine1");
  const before = await mac();
  assertEquals(before, `ether ${a.json.interfaces[2].mac}`);
  // A bridge without a MAC of its own takes the lowest one of its ports.
  const b = await node.start("nginx1");
  for (const pod of [a, b]) await node.cni("DEL", pod);
  assertEquals(await mac(), before);
});

Deno.test("ADD mends a bridge that is down or has no address", async () => {
  await using node = await Node.start("node1");
  const a = await node.start("alpine1");
  for (const fault of ["ip link set cni0 down", "ip addr flush dev cni0"]) {
    await node.sh(fault);
    const b = await node.start("nginx1");
    await ping(node, addressOf(a), b);
    await ping(node, addressOf(a));
  }
});

Deno.test("ADD refuses a bridge with an address that overlaps", async () => {
  await using node = await Node.start("node1");
  await setCounter(node, 1);
  await node.sh(`ip link add cni0 up type bridge
    ip addr add 10.240.0.9/16 dev cni0`);
  const pod = await node.sandbox("alpine1");
  const before = await node.listing(pod);
  const answer = await node.cni("ADD", pod);
  assertError(answer, 7, /10\.240\.0\.9\/16.*10\.240\.0\.1\/24/);
  assertEquals(await node.listing(pod), before);
});

Deno.test("ADD refuses a pod that has the interface, and leaves it", async () => {
  await using node = await Node.start("node1");
  const ours = await node.start("alpine1");
  const foreign = await node.sandbox("nginx1");
  await node.in(foreign, "ip link add eth0 up type bridge");
  await node.in(foreign, "ip addr add 192.0.2.7/24 dev eth0");
  for (const pod of [ours, foreign]) {
    const before = await node.listing(pod);
    assertError(await node.cni("ADD", pod), 100, /eth0.*exists/);
    assertEquals(await node.listing(pod), before);
  }
});

Deno.test("ADD refuses the node's own namespace, and leaves it", async () => {
  await using node = await Node.start("node1");
  await setCounter(node, 1);
  await node.sh("mkdir -p /run/netns");
  const pod = { name: "", containerID: "node1", netns: "/proc/self/ns/net" };
  const before = await node.listing();
  assertError(await node.cni("ADD", pod), 4, /own namespace/);
  await node.sh("ip link del cni0");
  assertEquals(await node.listing(), before);
});

Deno.test("ADD and DEL of net1 leave eth0 as it is", async () => {
  await using node = await Node.start("node1");
  const pod = await node.start("alpine1");
  const before = await node.listing(pod);
  const net1 = { env: { CNI_IFNAME: "net1" } };
  const { json } = await node.cni("ADD", pod, net1);
  assertEquals(json.interfaces[0].name, "net1");
  const routes = await node.in(pod, "ip route show default");
  assertMatch(routes, /^default .*dev eth0.*\ndefault .*dev net1/);
  await node.cni("DEL", pod, net1);
  assertEquals(await node.listing(pod), before);
  await ping(node, "10.240.0.1", pod);
  await node.cni("DEL", pod);
  await assertRejects(() => node.sh(`ls /run/netns/${pod.containerID}`));
});

Deno.test("ADD of net1 alone gives a pod its network", async () => {
  await using node = await Node.start("node1");
  const pod = await node.start("alpine1", { env: { CNI_IFNAME: "net1" } });
  assertMatch(await node.in(pod, "ip route show default"), /dev net1/);
  await ping(node, "10.240.0.1", pod);
});

Deno.test("ADD lets a pod reach itself through its Service", async () => {
  await using node = await Node.start("node1");
  const pod = await node.start("nginx1");
  // As kube-proxy writes it. With bridge-nf-call-iptables the packet turns
  // round in the bridge, and goes back to the port that it came from.
  await node.sh(`sysctl -qw net.ipv4.ip_forward=1
    sysctl -qw net.bridge.bridge-nf-call-iptables=1
    iptables -t nat -A PREROUTING -d 10.96.0.10 -j DNAT --to ${addressOf(pod)}
    iptables -t nat -A POSTROUTING -s 10.240.0.0/24 -j MASQUERADE`);
  await ping(node, "10.96.0.10", pod);
  // And hairpin is what does it.
  await node.sh(`ip link set ${vethOf(pod)} type bridge_slave hairpin off`);
  await assertRejects(() => ping(node, "10.96.0.10", pod, 1));
});

// Faults for a PATH: an ip that ends at once as the one of CALL, or with LINE
// finds a bad one there in its batch; and an ln that fails. What they are to do
// is written into them: the plugin hands on no variables.
const SHIMS = {
  ip: `
    case $1 in -n) call=pod;; -force) call=look;; *) call=host;; esac
    [ $call = $CALL ] || exec ip "$@"
    [ $LINE != 0 ] || exit 1
    sed "$LINE s/.*/link show dev none/" | ip "$@"`,
  ln: `
    [ $CALL != ln ] && ln "$@"`,
};

/** Lets ADD fail on a new node, at each line in turn; returns how many. */
async function addFails(call: string): Promise<number> {
  await using node = await Node.start("node1");
  await node.sh("mkdir /opt/shims && echo 1 > /tmp/last_allocated_ip");
  const path = Deno.env.get("PATH");
  const env = { PATH: `/opt/shims:${path}` };
  for (let line = 0;; line++) {
    for (const [name, text] of Object.entries(SHIMS)) {
      const values = `PATH=${path} CALL=${call} LINE=${line}`;
      const file = node.path(`/opt/shims/${name}`);
      const script = `#!/bin/sh\n${values}${text}`;
      await Deno.writeTextFile(file, script, { mode: 0o755 });
    }
    const pod = await node.sandbox("nginx1");
    await node.sh("ip link del cni0 || true");
    const before = await node.listing(pod);
    const answer = await node.cni("ADD", pod, { env });
    // It has no such line any more: all were tried.
    if (answer.code === 0) return line;
    assert(answer.json.code >= 4, answer.stdout);
    await node.sh("ip link del cni0 || true"); // it may stay
    assertEquals(await node.listing(pod), before, `${call}, line ${line}`);
    assertEquals((await node.cni("ADD", pod)).code, 0);
    if (call === "ln") return 1;
  }
}

Deno.test("ADD leaves nothing whichever step fails", async () => {
  const calls = ["look", "host", "pod", "ln"];
  const [look, host, pod, ln] = await Promise.all(calls.map(addFails));
  const tried = `${[look, host, pod, ln]}`;
  assert(look > 1 && host > 5 && pod > 3 && ln > 0, tried);
});

for (
  const { when, isGone, env } of [
    { when: "" },
    { when: " after the namespace is gone", isGone: true },
    { when: " with an empty CNI_NETNS", env: { CNI_NETNS: "" } },
  ]
) {
  Deno.test(`DEL${when} removes what ADD made, and nothing else`, async () => {
    await using node = await Node.start("node1");
    const other = await node.start("nginx1");
    const before = await node.listing();
    const pod = await node.start("alpine1");
    if (isGone) await node.remove(pod);
    assertEquals((await node.cni("DEL", pod, { env })).code, 0);
    if (!isGone) await node.remove(pod);
    assertEquals(await node.listing(), before);
    await ping(node, addressOf(other));
  });
}

Deno.test("DEL removes an attachment whose name is too long for a link", async () => {
  await using node = await Node.start("node1", conf({ name: "n".repeat(118) }));
  await node.start("nginx1");
  const before = await node.listing();
  const pod = { ...await node.sandbox("a"), containerID: "c".repeat(118) };
  await ping(node, addressOf(await node.cni("ADD", pod)));
  assertEquals((await node.cni("DEL", pod)).code, 0);
  await node.remove(pod);
  assertEquals(await node.listing(), before);
});

Deno.test("DEL removes both if ADD was called twice, in two namespaces", async () => {
  await using node = await Node.start("node1");
  await node.start("nginx1");
  const before = await node.listing();
  const first = await node.start("alpine1");
  const { containerID } = first;
  const second = { ...await node.sandbox("alpine1"), containerID };
  const answer = await node.cni("ADD", second);
  for (const pod of [first, answer]) await ping(node, addressOf(pod));
  assertEquals((await node.cni("DEL", second)).code, 0);
  for (const pod of [first, second]) await node.remove(pod);
  assertEquals(await node.listing(), before);
});

Deno.test("ADD and DEL leave a namespace with the container's name", async () => {
  await using node = await Node.start("node1");
  const netns = "/var/run/netns/alpine1";
  const pod = { name: "alpine1", containerID: "alpine1", netns };
  await node.sh("ip netns add alpine1");
  const names = () => node.sh("ls -l /run/netns");
  const before = await names();
  await ping(node, addressOf(await node.cni("ADD", pod)));
  assertEquals(await names(), before);
  assertEquals((await node.cni("DEL", pod)).code, 0);
  assertEquals(await names(), before);
});

const CONF_1_1 = conf({ cniVersion: "1.1.0" });

Deno.test("CHECK finds what is not as ADD left it", async (t) => {
  await using node = await Node.start("node1", CONF_1_1);
  for (
    const [fault, says] of [
      ["ip -n $pod addr flush dev eth0", /eth0 .*10\.240\.0\.\d+\/24/],
      ["ip -n $pod route del default", /no default route/],
      ["ip -n $pod link set eth0 down", /eth0 .*\bup\b/],
      ["ip -n $pod link set eth0 address 2:0:0:0:0:1", /MAC/],
      ["ip link del $veth", /no veth/],
      ["ip link set $veth nomaster", /veth.* on cni0/],
      ["ip link set $veth down", /veth.*\bup\b/],
      ["rm /run/netns/$id", /no name/],
      ["ip netns del $pod", /netns/],
      ["ip link set cni0 down", /cni0 .*\bup\b/],
      ["ip addr flush dev cni0", /cni0 .*10\.240\.0\.1$/],
    ] as const
  ) {
    await t.step(fault, async () => {
      const pod = await node.start("alpine1");
      const netns = pod.netns.split("/").pop();
      const names = `id=${pod.containerID} pod=${netns} veth=${vethOf(pod)}`;
      await node.sh(`${names}; ${fault}`);
      const check = { conf: { ...CONF_1_1, prevResult: pod.json } };
      assertError(await node.cni("CHECK", pod, check), 101, says);
    });
  }
});

Deno.test("GC removes what is stale in its network, and nothing else", async () => {
  await using node = await Node.start("node1", CONF_1_1);
  const name = "custom-cni2";
  const theirs = { ...CONF_1_1, name, podcidr: "10.9.9.0/24" };
  await node.sh(`ip link add veth200 type veth peer name tap0
    ip netns add foreign && ln -s foreign /run/netns/alias`);
  const kept = await node.start("alpine1");
  const other = await node.start("nginx1", { conf: theirs });
  const before = await node.listing(kept);
  const stale = await node.start("nginx2");
  const gone = await node.start("nginx3");
  await node.remove(gone);
  const { containerID } = kept;
  const valid = [{ containerID, ifname: "eth0" }];
  const gc = { ...CONF_1_1, "cni.dev/valid-attachments": valid };
  assertEquals((await node.cni("GC", undefined, { conf: gc })).code, 0);
  await node.remove(stale);
  assertEquals(await node.listing(kept), before);
  // Two networks with ranges of their own, each at work.
  await ping(node, "10.240.0.1", kept);
  await ping(node, "10.9.9.1", other);
});

Deno.test("the log has one line a call, and not for everybody", async () => {
  await using node = await Node.start("node1");
  const pod = await node.start("alpine1");
  await node.cni("ADD", pod);
  await node.cni("DEL", pod);
  const log = node.path("/var/log/cni.log");
  const lines = (await Deno.readTextFile(log)).trimEnd().split("\n");
  const who = `${pod.containerID} eth0`;
  const ends = [
    `ADD ${who} 10.240.0.2/24`,
    `ADD ${who} error 100`,
    `DEL ${who}`,
  ];
  assertEquals(lines.length, ends.length);
  for (const [i, line] of lines.entries()) {
    assertMatch(line, new RegExp(`^\\d{4}-\\d\\d-\\d\\dT[\\d:.]+Z ${ends[i]}`));
  }
  assertEquals((await Deno.stat(log)).mode! & 0o777, 0o640);
});

Deno.test("the log's steps can be pasted, and do what ADD did", async () => {
  await using node = await Node.start("node1", conf({ logLevel: "DEBUG" }));
  const log = async () =>
    (await Deno.readTextFile(node.path("/var/log/cni.log"))).trimEnd()
      .split("\n").map((line) => line.replace(/^\S+ /, ""));
  const pod = await node.start("alpine1");
  const added = await node.listing(pod);
  const steps = await log();
  assertMatch(steps.pop()!, /^ADD /);
  assert(
    steps.every((line) => /^(ip|ln|nsenter|sysctl) /.test(line)),
    `${steps}`,
  );
  assert(steps.some((line) => /^ip -n .* addr add .*\/24/.test(line)));
  assertEquals((await node.cni("DEL", pod)).code, 0);
  await node.sh("ip link del cni0");
  // The counter is the plugin's own, and stands where it stood.
  await node.sh(steps.map((line) => `${line} > /dev/null`).join("\n"));
  assertEquals(withoutIndexes(await node.listing(pod)), withoutIndexes(added));
  await ping(node, "10.240.0.1", pod);
});

/** A listing without the numbers that the kernel gives to links in turn. */
const withoutIndexes = (listing: string) =>
  listing.replaceAll(/^\d+: |@if\d+/gm, "");

for (const [logLevel, lines] of [["INFO", 2], ["ERROR", 1]] as const) {
  Deno.test(`the log of ${logLevel} has its lines and no others`, async () => {
    await using node = await Node.start("node1", conf({ logLevel }));
    const pod = await node.start("alpine1");
    assertError(await node.cni("ADD", pod), 100, /exists/);
    const log = await Deno.readTextFile(node.path("/var/log/cni.log"));
    assertEquals(log.trimEnd().split("\n").length, lines, log);
  });
}

Deno.test("run by hand it says what it is, and where to look", async () => {
  await using node = await Node.start("node1");
  const { code, stdout, stderr } = await node.run("/opt/cni/bin/custom-cni");
  assertEquals([code, stdout], [0, ""]);
  const [version, look, ...rest] = stderr.trimEnd().split("\n");
  assertMatch(version, /^custom-cni \d+\.\d+\.\d+, .*0\.3\.0.*1\.1\.0$/);
  assertMatch(look, /node-setup\.ts --check/);
  assertEquals(rest, []);
});
