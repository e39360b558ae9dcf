/**
 * What one pod may do to its neighbours, the node and the other pods: pretend
 * to be their IPv6 router, or change the bridge's MAC when it starts or ends.
 * Pods send real frames, which are made here byte by byte.
 *
 * @module
 */
import { assertEquals, assertMatch } from "@std/assert";
import { addressOf, type Answer, Node, type Pod } from "../lab/node.ts";

const macOf = ({ json }: Answer): string => json.interfaces[0].mac;

/** The bytes of a MAC. */
const mac = (text: string) => text.split(":").map((byte) => parseInt(byte, 16));

/** The bytes of an IPv6 address with "::", such as "fe80::1". */
function ipv6(text: string): number[] {
  const [head, tail] = text.split("::").map((part) =>
    part.split(":").filter(Boolean).flatMap((word) => bytes(2, `0x${word}`))
  );
  return [...head, ...Array(16 - head.length - tail.length).fill(0), ...tail];
}

/** A number as so many bytes, the highest first. */
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

/** Sends a frame through a packet(7) socket. Every Debian has Perl. */
const SEND = `my ($times, $pause, $eth0, $hex) = @ARGV;
socket(my $socket, 17, 3, 0) or die $!;
for (1 .. $times) {
  send($socket, pack("H*", $hex), 0, pack("SnlSCCa8", 17, 0, $eth0)) or die $!;
  select(undef, undef, undef, $pause);
}`;

/** Sends a frame from a pod's eth0, some times, with a pause in seconds. */
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

/** The advertised routes that the node or a pod has accepted. */
const advertised = (node: Node, pod?: Pod) => {
  const line = "ip -6 route show default";
  return pod ? node.in(pod, line) : node.sh(line);
};

for (
  const { which, before } of [
    { which: "a new cni0", before: ":" },
    {
      which: "an existing cni0",
      before: `ip link add cni0 up type bridge
        sysctl -qw net.ipv6.conf.cni0.accept_ra=1`,
    },
    {
      which: "the cni0 of the shell script",
      before: `ip link add cni0 up type bridge
        ip addr add 10.240.0.1/24 dev cni0
        sysctl -qw net.ipv6.conf.cni0.accept_ra=1`,
    },
  ]
) {
  Deno.test(`the node accepts no IPv6 route from a pod through ${which}`, async () => {
    await using node = await Node.start("node1");
    await node.sh(before);
    const pod = await node.start("alpine1");
    const cni0 = pod.json.interfaces[2].mac;
    for (const to of [ALL_NODES, cni0]) {
      await send(node, pod, advertisement(macOf(pod), to));
      await node.ping("10.240.0.1", pod); // the frame has arrived before this
      assertEquals(await advertised(node), "", to);
      assertEquals(await node.sh("ip -6 addr show scope global"), "", to);
    }
    // And the plugin's setting is the reason.
    await node.sh("sysctl -qw net.ipv6.conf.cni0.accept_ra=1");
    await send(node, pod, advertisement(macOf(pod), cni0));
    await node.ping("10.240.0.1", pod);
    assertMatch(await advertised(node), /via fe80::bad dev cni0/);
  });
}

Deno.test("a pod accepts an IPv6 route from another", async () => {
  await using node = await Node.start("node1");
  const router = await node.start("alpine1");
  // It never stops, so a pod that is up before it is deaf would hear it.
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
  await node.ping(addressOf(pod), router);
  assertEquals(await advertised(node, pod), "");
  assertEquals(await advertised(node), "");
  // And the setting is the reason.
  await node.in(pod, "sysctl -qw net.ipv6.conf.eth0.accept_ra=1");
  await send(node, router, straight);
  await node.ping(addressOf(pod), router);
  assertMatch(await advertised(node, pod), /via fe80::bad dev eth0/);
});

Deno.test("ADD and DEL do not change the bridge's MAC", async () => {
  await using node = await Node.start("node1");
  const mac = () => node.sh("ip -o link show cni0 | grep -o 'ether [^ ]*'");
  const a = await node.start("alpine1");
  const before = await mac();
  assertEquals(before, `ether ${a.json.interfaces[2].mac}`);
  // A bridge without a fixed MAC takes the lowest one of its ports.
  const b = await node.start("nginx1");
  for (const pod of [a, b]) await node.cni("DEL", pod);
  assertEquals(await mac(), before);
});

Deno.test("pods lose their gateway when the pod whose MAC cni0 has ends", async () => {
  await using node = await Node.start("node1");
  // As the shell script leaves it: the bridge has the lowest MAC of its ports.
  await node.sh(`ip link add cni0 up type bridge
    ip addr add 10.240.0.1/24 dev cni0
    ip link add old0 up type veth peer name old1
    ip link set old0 address 02:00:00:00:00:01 master cni0`);
  const pod = await node.start("alpine1");
  const cni0 = pod.json.interfaces[2].mac;
  assertEquals(cni0, "02:00:00:00:00:01");
  await node.ping("10.240.0.1", pod);
  await node.sh("ip link del old0");
  assertEquals(await node.sh("cat /sys/class/net/cni0/address"), cni0);
  await node.ping("10.240.0.1", pod, 1);
});
