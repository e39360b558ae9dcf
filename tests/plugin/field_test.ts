/**
 * What users of such plugins ran into: each test is named after the symptom, as
 * it was reported. The built binary is on real namespaces, and what a pod sends
 * to harm others is sent, as frames that are made here byte for byte.
 *
 * @module
 */
import { assert, assertEquals, assertMatch, assertRejects } from "@std/assert";
import {
  addressOf,
  type Answer,
  conf,
  Node,
  type Pod,
  vethOf,
} from "../lab/node.ts";

type Added = Pod & Answer;

const CONF_1_1 = conf({ cniVersion: "1.1.0" });

const macOf = ({ json }: Answer): string => json.interfaces[0].mac;

const log = (node: Node) => node.sh("cat /var/log/cni.log");

/** The bytes of a MAC. */
const mac = (text: string) => text.split(":").map((byte) => parseInt(byte, 16));

/** The bytes of "fe80::1": what is before the "::", and what is behind it. */
function ipv6(text: string): number[] {
  const [head, tail] = text.split("::").map((part) =>
    part.split(":").filter(Boolean).flatMap((word) => bytes(2, `0x${word}`))
  );
  return [...head, ...Array(16 - head.length - tail.length).fill(0), ...tail];
}

/** A number in so many bytes, the highest first. */
const bytes = (size: number, value: string | number) =>
  Array.from({ length: size }, (_, i) => Number(value) >>> 8 * (size - 1 - i))
    .map((it) => it & 255);

/** The Internet checksum (RFC 1071). */
function checksum(data: number[]): number[] {
  let sum = 0;
  for (let i = 0; i < data.length; i += 2) sum += data[i] << 8 | data[i + 1];
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  return bytes(2, ~sum & 0xffff);
}

/**
 * A frame with a router advertisement (RFC 4861, section 4.2), to all nodes:
 * "I am your default router, and 2001:db8:bad::/64 is on your link".
 */
function advertisement(from: string, to: string): number[] {
  const prefix = ipv6("2001:db8:bad::");
  const lifetime = bytes(4, 1800);
  const message = [
    ...[134, 0, 0, 0, 64, 0, ...lifetime.slice(2), ...Array(8).fill(0)],
    ...[3, 4, 64, 0xc0, ...lifetime, ...lifetime, 0, 0, 0, 0, ...prefix],
  ];
  const ends = [...ipv6("fe80::bad"), ...ipv6("ff02::1")];
  const length = bytes(4, message.length);
  message.splice(
    2,
    2,
    ...checksum([...ends, ...length, 0, 0, 0, 58, ...message]),
  );
  const header = [0x60, 0, 0, 0, ...length.slice(2), 58, 255, ...ends];
  return [...mac(to), ...mac(from), 0x86, 0xdd, ...header, ...message];
}

const ALL_NODES = "33:33:00:00:00:01";

/** Perl, which is on each Debian: sends a frame by a socket of packet(7). */
const SEND = `my ($times, $pause, $eth0, $hex) = @ARGV;
socket(my $socket, 17, 3, 0) or die $!;
for (1 .. $times) {
  send($socket, pack("H*", $hex), 0, pack("SnlSCCa8", 17, 0, $eth0)) or die $!;
  select(undef, undef, undef, $pause);
}`;

/** Lets a pod send a frame by its eth0, some times, with a pause in seconds. */
async function send(
  node: Node,
  pod: Pod,
  frame: number[],
  { times = 1, pause = 0, end = "" } = {},
): Promise<void> {
  const hex = Uint8Array.from(frame).toHex();
  await Deno.writeTextFile(node.path("/opt/send"), SEND);
  const eth0 = "$(cat /sys/class/net/eth0/ifindex)";
  const line = `perl /opt/send ${times} ${pause} ${eth0} ${hex}`;
  await node.in(pod, `sh -c '${line} > /dev/null ${end}'`);
}

/** The routes that a router advertised, of the node or of a pod. */
const advertised = (node: Node, pod?: Pod) => {
  const line = "ip -6 route show default";
  return pod ? node.in(pod, line) : node.sh(line);
};

for (
  const [which, before] of [
    ["a new cni0", ":"],
    [
      "a cni0 that was there before",
      "ip link add cni0 up type bridge && sysctl -qw net.ipv6.conf.cni0.accept_ra=1",
    ],
  ]
) {
  Deno.test(`the node takes no IPv6 route from a pod, by ${which}`, async () => {
    await using node = await Node.start("node1");
    await node.sh(before);
    const pod = await node.start("alpine1");
    const cni0 = pod.json.interfaces[2].mac;
    for (const to of [ALL_NODES, cni0]) {
      await send(node, pod, advertisement(macOf(pod), to));
      await node.in(pod, "ping -c1 -W5 10.240.0.1"); // it has arrived before
      assertEquals(await advertised(node), "", to);
      assertEquals(await node.sh("ip -6 addr show scope global"), "", to);
    }
    // And it is the plugin's doing.
    await node.sh("sysctl -qw net.ipv6.conf.cni0.accept_ra=1");
    await send(node, pod, advertisement(macOf(pod), cni0));
    await node.in(pod, "ping -c1 -W5 10.240.0.1");
    assertMatch(await advertised(node), /via fe80::bad dev cni0/);
  });
}

Deno.test("a pod takes an IPv6 route from another", async () => {
  await using node = await Node.start("node1");
  const router = await node.start("alpine1");
  // It never stops: whoever is up for a moment before it is deaf, hears it.
  const flood = {
    times: 20_000,
    pause: 0.001,
    end: "2>&1 & echo $! >> /run/background",
  };
  const frame = advertisement(macOf(router), ALL_NODES);
  await send(node, router, frame, flood);
  const pod = await node.start("nginx1");
  const straight = advertisement(macOf(router), macOf(pod));
  await send(node, router, straight);
  await node.in(router, `ping -c1 -W5 ${addressOf(pod)}`);
  assertEquals(await advertised(node, pod), "");
  assertEquals(await advertised(node), "");
  // And that is what does it.
  await node.in(pod, "sysctl -qw net.ipv6.conf.eth0.accept_ra=1");
  await send(node, router, straight);
  await node.in(router, `ping -c1 -W5 ${addressOf(pod)}`);
  assertMatch(await advertised(node, pod), /via fe80::bad dev eth0/);
});

for (
  const [kernel, path, harm, says] of [
    ["without IPv6", "", "mount -t tmpfs tmpfs /proc/sys/net/ipv6", /^$/],
    [
      "without second names of links", // before Linux 5.5
      "/opt/shims:",
      `printf '#!/bin/sh\nsed "s/^link property.*/link show dev none/" |' \
        > /opt/shims/ip; echo "$(command -v ip)" '"$@"' >> /opt/shims/ip`,
      /^$/,
    ],
    [
      "whose ip ends at a name of more than 15 bytes", // before 5.4
      "/opt/shims:",
      `cat > /opt/shims/ip << END
#!/bin/sh
sed -E '/(dev|del|altname) [^ ]{16}/ { s/.*/link show dev/; q }' |
  $(command -v ip) "\\$@"
END`,
      /^$/,
    ],
    [
      "that keeps its settings",
      "/opt/shims:",
      `printf '#!/bin/sh\\necho read-only >&2; exit 1' > /opt/shims/sysctl`,
      /cni0 takes IPv6 routes from pods: read-only/,
    ],
    [
      "whose sysctl is not on the PATH",
      "/opt/tools",
      "ln -s $(command -v ip) $(command -v ln) /opt/tools",
      /cni0 takes IPv6 routes from pods: .*sysctl/,
    ],
  ] as const
) {
  Deno.test(`a kernel ${kernel} fails no pod`, async () => {
    await using node = await Node.start("node1");
    await node.sh(`mkdir /opt/shims /opt/tools; ${harm}
      chmod +x /opt/shims/* 2> /dev/null || :`);
    const PATH = path.endsWith("tools") ? path : path + Deno.env.get("PATH");
    const pod = await node.start("alpine1", { env: { PATH } });
    await node.in(pod, "ping -c1 -W5 10.240.0.1");
    assertEquals((await node.cni("DEL", pod, { env: { PATH } })).code, 0);
    assertEquals(await node.sh("ip -br link show type veth"), "");
    const warnings = (await log(node)).split("\n")
      .filter((line) => line.includes("IPv6"));
    assertMatch(warnings.join("\n"), says);
  });
}

Deno.test("pods lose their gateway when the one that lent cni0 its MAC ends", async () => {
  await using node = await Node.start("node1");
  // By the shell script: a bridge has the lowest MAC of its ports.
  await node.sh(`ip link add cni0 up type bridge
    ip link add old0 up type veth peer name old1
    ip link set old0 address 02:00:00:00:00:01 master cni0`);
  const pod = await node.start("alpine1");
  const cni0 = pod.json.interfaces[2].mac;
  assertEquals(cni0, "02:00:00:00:00:01");
  await node.in(pod, "ping -c1 -W5 10.240.0.1");
  await node.sh("ip link del old0");
  assertEquals(await node.sh("cat /sys/class/net/cni0/address"), cni0);
  await node.in(pod, "ping -c1 -W1 10.240.0.1");
});

Deno.test("udev gives a link another MAC after ADD told it", async () => {
  await using node = await Node.start("node1");
  const pod = await node.start("alpine1");
  // MACAddressPolicy=persistent spares what has 3, NET_ADDR_SET.
  const look = (link: string) =>
    `sh -c 'cd /sys/class/net/${link} && cat address addr_assign_type'`;
  const looks = [
    node.in(pod, look("eth0")),
    node.sh(look(vethOf(pod))),
    node.sh(look("cni0")),
  ];
  for (const [i, it] of (await Promise.all(looks)).entries()) {
    assertEquals(it, `${pod.json.interfaces[i].mac}\n3`);
  }
});

Deno.test("a foreign link's name or alias fails DEL and STATUS", async () => {
  await using node = await Node.start("node1", CONF_1_1);
  const before = await node.start("alpine1");
  // All that the kernel takes: in a name no blank, in an alias anything.
  const range = (from: number, to: number) =>
    Array.from({ length: to - from + 1 }, (_, i) => from + i)
      .map((byte) => `\\${byte.toString(8).padStart(3, "0")}`);
  const all = [...range(1, 31), '"', "\\134", "'\\''", ...range(127, 255)];
  const names = ["a\\001\\033b", "c\\042d", "e\\377\\134f", "g\\177h"];
  for (const [i, name] of names.entries()) {
    await node.sh(`ip link add "$(printf '${name}')" type veth peer name f${i}
      ip link set f${i} alias "$(printf '${all.slice(i).join("")}x')"`);
  }
  const check = { conf: { ...CONF_1_1, prevResult: before.json } };
  assertEquals((await node.cni("CHECK", before, check)).stdout, "");
  assertEquals((await node.cni("STATUS")).stdout, "");
  const pod = await node.start("nginx1");
  for (const each of [before, pod]) {
    assertEquals((await node.cni("DEL", each)).stdout, "");
    await assertRejects(() => node.sh(`ip link show ${vethOf(each)}`));
  }
  const gc = { conf: { ...CONF_1_1, "cni.dev/valid-attachments": [] } };
  assertEquals((await node.cni("GC", undefined, gc)).stdout, "");
  for (const i of names.keys()) await node.sh(`ip link show f${i}`);
});

Deno.test("a full range turns the whole node NotReady", async () => {
  const full = { ...CONF_1_1, podcidr: "10.9.9.0/29" };
  await using node = await Node.start("node1", full);
  const pods: Added[] = [];
  for (let i = 0; i < 5; i++) pods.push(await node.start(`nginx${i}`));
  assertEquals(
    (await node.cni("ADD", await node.sandbox("more"))).json.code,
    11,
  );
  assertEquals((await node.cni("STATUS")).stdout, "");
  await node.in(pods[0], `ping -c1 -W5 ${addressOf(pods[4])}`);
});

Deno.test("a working directory that is gone looks like a missing ip", async () => {
  await using node = await Node.start("node1");
  // As with a volume that was mounted over the one of a runtime.
  const script = `#!/bin/sh
    mkdir -p /tmp/a/b && cd /tmp/a/b && mount -t tmpfs tmpfs /tmp/a
    exec /opt/cni/bin/custom-cni`;
  await Deno.writeTextFile(node.path("/opt/covered"), script, { mode: 0o755 });
  const pod = await node.start("alpine1", { plugin: "/opt/covered" });
  assertEquals(
    (await node.cni("DEL", pod, { plugin: "/opt/covered" })).code,
    0,
  );
});

for (const [mtu, isThrough] of [[1400, true], [undefined, false]] as const) {
  const how = mtu ? `by "mtu": ${mtu}` : "without it";
  Deno.test(`a tunnel swallows a pod's long packets: ${how}`, async () => {
    await using node = await Node.start("node1", conf({ mtu }));
    // The way out has 1400, and nobody hears that a packet was too long.
    await node.sh(`sysctl -qw net.ipv4.ip_forward=1
      ip netns add outside
      ip link add enp0s3 mtu 1400 up type veth peer name eth0 mtu 1500 \
        netns outside
      ip addr add 10.0.2.15/24 dev enp0s3
      ip -n outside addr add 10.0.2.2/24 dev eth0
      ip -n outside link set eth0 up
      ip -n outside route add default via 10.0.2.15
      iptables -A OUTPUT -p icmp --icmp-type fragmentation-needed -j DROP`);
    const pod = await node.start("alpine1");
    const sizes = [
      await node.in(pod, "cat /sys/class/net/eth0/mtu"),
      await node.sh(`cat /sys/class/net/${vethOf(pod)}/mtu`),
    ];
    assertEquals(sizes, Array(2).fill(`${mtu ?? 1500}`));
    await node.serve(pod.netns, "nginx1");
    const files = "echo > short && head -c 2000000 /dev/zero > long";
    await node.sh(`cd /run/www/* && ${files}`);
    // Two megabytes; two seconds are enough to see that none will come.
    const url = `http://${addressOf(pod)}`;
    const wget = "ip netns exec outside timeout 2 busybox wget -qO-";
    const received = await node.sh(`for try in $(seq 50); do
        ${wget} ${url}/short > /dev/null 2>&1 && break
        sleep 0.1
      done
      ${isThrough ? wget.replace("2", "30") : wget} ${url}/long | wc -c`);
    assertEquals(Number(received), isThrough ? 2_000_000 : 0);
  });
}

for (
  const [what, make, says] of [
    ["no bridge", "ip link add cni0 type veth peer name other0", /no.* bridge/],
    [
      "of another range",
      "ip link add cni0 up type bridge; ip addr add 10.240.0.1/16 dev cni0",
      /10\.240\.0\.1\/16/,
    ],
    [
      "another link's second name",
      `ip link add other0 type veth peer name other1
        ip link property add dev other0 altname cni0`,
      /cni0/,
    ],
  ] as const
) {
  Deno.test(`a stale cni0 that is ${what} says only "File exists"`, async () => {
    await using node = await Node.start("node1", CONF_1_1);
    await node.sh(make);
    const pod = await node.sandbox("alpine1");
    const before = await node.listing(pod);
    const answer = await node.cni("ADD", pod);
    const status = await node.cni("STATUS");
    assertEquals([answer.json.code, status.json.code], [7, 50]);
    for (const { json } of [answer, status]) {
      const text = `${json.msg}; ${json.details}`;
      assertMatch(text, says);
      // It has the mend, which is what is done here.
      assertMatch(text, /ip link del cni0/);
    }
    assertEquals(await node.listing(pod), before);
    await node.sh("ip link del cni0");
    const again = await node.cni("ADD", pod);
    assertEquals(again.code, 0, again.stdout);
  });
}

Deno.test("another link's second name vethN makes an ADD fail", async () => {
  await using node = await Node.start("node1");
  await node.sh(`ip link add other0 type veth peer name other1
    ip link property add dev other0 altname veth2`);
  const pod = await node.start("alpine1");
  assertEquals(addressOf(pod), "10.240.0.3");
  await node.sh("ip link show other0");
});

Deno.test("GC removes names in /run/netns that are another's", async () => {
  await using node = await Node.start("node1", CONF_1_1);
  await node.sh(`mkdir -p /run/netns
    ln -s /proc/4194305/ns/net /run/netns/qemu-1
    ln -s /run/netns/gone /run/netns/router`);
  const names = () => node.sh("ls /run/netns");
  const before = await names();
  const pod = await node.start("alpine1");
  const gc = { conf: { ...CONF_1_1, "cni.dev/valid-attachments": [] } };
  assertEquals((await node.cni("GC", undefined, gc)).stdout, "");
  await node.remove(pod);
  assertEquals(await names(), before);
});

for (const folder of ["/run/netns", "/var/run/netns"]) {
  Deno.test(`a namespace by the container's name in ${folder} is lost`, async () => {
    await using node = await Node.start("node1");
    await node.sh("ip netns add box1");
    const pod = { name: "", containerID: "box1", netns: `${folder}/box1` };
    for (let i = 0; i < 2; i++) {
      const answer = await node.cni("ADD", pod);
      await node.in(pod, "ping -c1 -W5 10.240.0.1");
      assertEquals(answer.json.interfaces[0].sandbox, pod.netns);
      assertEquals((await node.cni("DEL", pod)).code, 0);
      assert((await Deno.lstat(node.path("/run/netns/box1"))).isFile);
    }
  });
}
