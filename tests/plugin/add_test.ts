/**
 * ADD: the pod's address, route and links, and whom the pod reaches; what ADD
 * refuses; and that a failed ADD leaves nothing. The built binary runs in real
 * namespaces, with real packets. A test named after a symptom is about a bug
 * that users of such plugins reported.
 *
 * @module
 */
import { assert, assertEquals, assertMatch, assertRejects } from "@std/assert";
import {
  addressOf,
  conf,
  CONF_1_1,
  Node,
  SHIM_PATH,
  vethOf,
} from "../lab/node.ts";
import { assertError, cidrOf } from "./answer.ts";

Deno.test("ADD lets pods, gateway and node reach each other", async () => {
  await using node = await Node.start("node1");
  const a = await node.start("alpine1");
  const b = await node.start("nginx1");
  for (const [pod, other] of [[a, b], [b, a]]) {
    await node.ping(addressOf(other), pod);
    await node.ping("10.240.0.1", pod);
    await node.ping(addressOf(pod));
  }
});

/** A folder for the PATH, with only what the plugin needs. */
const MAKE_TOOLS = `mkdir /opt/tools
  ln -s $(command -v ip) $(command -v ln) $(command -v nsenter) /opt/tools`;

Deno.test("ADD needs only the binary, and ip, ln and nsenter on the PATH", async () => {
  await using node = await Node.start("node1");
  await node.sh(MAKE_TOOLS);
  await node.sh("mkdir /opt/alone && cp /opt/cni/bin/custom-cni /opt/alone");
  const pod = await node.start("alpine1", {
    env: { PATH: "/opt/tools" },
    plugin: "/opt/alone/custom-cni",
  });
  await node.ping(addressOf(pod));
});

// The addresses.

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
  Deno.test(`ADD gives the first address of ${podcidr} after the last`, async () => {
    await using node = await Node.start("node1", conf({ podcidr }));
    const a = await node.start("alpine1");
    assertEquals(cidrOf(a), first);
    assertEquals(a.json.ips[0].gateway, gateway);
    await node.setCounter(beforeLast);
    const b = await node.start("nginx1");
    assertEquals(cidrOf(b), last);
    await node.ping(addressOf(a), b);
    await node.ping(gateway, b);
    // After the last one comes the broadcast address.
    assertEquals(cidrOf(await node.start("nginx2")), next);
  });
}

Deno.test("ADD answers 11 if the pod CIDR is full, until a DEL", async () => {
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
  await node.sh("ip link del cni0");
  const bare = await node.listing(b);
  assertError(await node.cni("ADD", b), 11, /10\.9\.9\.4\/30/);
  assertEquals(await node.listing(b), bare);
  await node.cni("DEL", a);
  assertEquals(cidrOf(await node.cni("ADD", b)), "10.9.9.6/30");
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

Deno.test("a pod with a reused address can be reached from old ARP caches", async () => {
  await using node = await Node.start("node1");
  const peer = await node.start("nginx1");
  const a = await node.start("alpine1");
  await node.ping(addressOf(a), peer);
  await node.cni("DEL", a);
  await node.setCounter(2);
  const b = await node.start("alpine2");
  assertEquals(addressOf(b), addressOf(a));
  await node.ping(addressOf(b), peer);
});

Deno.test("another link's second name vethN makes an ADD fail", async () => {
  await using node = await Node.start("node1");
  await node.sh(`ip link add other0 type veth peer name other1
    ip link property add dev other0 altname veth2`);
  const pod = await node.start("alpine1");
  assertEquals(addressOf(pod), "10.240.0.3");
  await node.sh("ip link show other0");
});

Deno.test("two pods have one address after a host veth was renamed", async () => {
  const podcidr = "10.9.9.0/29";
  await using node = await Node.start("node1", conf({ podcidr }));
  for (const n of [2, 3, 4, 5, 6]) {
    assertEquals(cidrOf(await node.start("nginx1")), `10.9.9.${n}/29`);
  }
  await node.sh(
    "ip link set veth4 name lan7 || ip link set veth4 down name lan7",
  );
  await node.setCounter(1);
  // veth2 exists, so ADD looks at all links, and finds lan7 by its MAC.
  const pod = await node.sandbox("nginx2");
  assertError(await node.cni("ADD", pod), 11, /all 5 are in use/);
  await node.sh("ip link del veth6");
  assertEquals(cidrOf(await node.cni("ADD", pod)), "10.9.9.6/29");
});

/** A NIC whose network contains the pod CIDR or overlaps it. */
const NEIGHBOURS = [
  { nic: "10.0.2.15/8", podcidr: "10.240.0.0/24" },
  { nic: "10.0.2.15/32", podcidr: "10.240.0.0/24" },
  { nic: "10.0.2.15/8", podcidr: "10.0.2.0/24", taken: /10\.0\.2\.15/ },
  { nic: "10.0.2.15/32", podcidr: "10.0.2.0/24", taken: /10\.0\.2\.15/ },
];

for (const { nic, podcidr, taken } of NEIGHBOURS) {
  const verb = taken ? "refuses" : "takes";
  Deno.test(`ADD ${verb} ${podcidr} on a node with ${nic}`, async () => {
    await using node = await Node.start("node1", conf({ podcidr }));
    await node.sh(`ip link add enp0s3 up type veth peer name unplugged
      ip addr add ${nic} dev enp0s3
      ip route add default via 10.7.7.7 dev enp0s3 onlink`);
    const pod = await node.sandbox("alpine1");
    const before = await node.sh("ip route show table all; ip -br addr");
    const answer = await node.cni("ADD", pod);
    if (taken) {
      assertError(answer, 7, taken);
      const after = await node.sh("ip route show table all; ip -br addr");
      assertEquals(after, before);
    } else {
      await node.ping(addressOf(answer));
    }
  });
}

// The bridge.

Deno.test("ADD repairs a bridge that is down or lacks its address or route", async () => {
  await using node = await Node.start("node1");
  const a = await node.start("alpine1");
  for (
    const fault of [
      "ip link set cni0 down",
      "ip addr flush dev cni0",
      "ip route del 10.240.0.0/24 dev cni0",
    ]
  ) {
    await node.sh(fault);
    const b = await node.start("nginx1");
    await node.ping(addressOf(a), b);
    await node.ping(addressOf(a));
  }
});

Deno.test("ADD refuses a bridge if its address overlaps the pod CIDR", async () => {
  await using node = await Node.start("node1");
  await node.setCounter(1);
  await node.sh(`ip link add cni0 up type bridge
    ip addr add 10.240.0.9/16 dev cni0`);
  const pod = await node.sandbox("alpine1");
  const before = await node.listing(pod);
  const answer = await node.cni("ADD", pod);
  assertError(answer, 7, /10\.240\.0\.9\/16.*10\.240\.0\.1\/24/);
  assertEquals(await node.listing(pod), before);
});

for (
  const { what, make, says } of [
    {
      what: "not a bridge",
      make: "ip link add cni0 type veth peer name other0",
      says: /no.* bridge/,
    },
    {
      what: "another pod CIDR's",
      make: `ip link add cni0 up type bridge
        ip addr add 10.240.0.1/16 dev cni0`,
      says: /10\.240\.0\.1\/16/,
    },
    {
      what: "another link's second name",
      make: `ip link add other0 type veth peer name other1
        ip link property add dev other0 altname cni0`,
      says: /cni0/,
    },
  ]
) {
  Deno.test(`a stale cni0 that is ${what} says only "File exists"`, async () => {
    await using node = await Node.start("node1", CONF_1_1);
    await node.setCounter(1);
    await node.sh(make);
    const pod = await node.sandbox("alpine1");
    const before = await node.listing(pod);
    const answer = await node.cni("ADD", pod);
    const status = await node.cni("STATUS");
    assertEquals([answer.json.code, status.json.code], [7, 50]);
    for (const { json } of [answer, status]) {
      const text = `${json.msg}; ${json.details}`;
      assertMatch(text, says);
      // It names the fix, which the test applies below.
      assertMatch(text, /ip link del cni0/);
    }
    assertEquals(await node.listing(pod), before);
    await node.sh("ip link del cni0");
    const again = await node.cni("ADD", pod);
    assertEquals(again.code, 0, again.stdout);
  });
}

// The pod.

Deno.test("ADD refuses a pod that already has the interface, and changes nothing", async () => {
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

Deno.test("ADD refuses the node's own namespace, and changes nothing", async () => {
  await using node = await Node.start("node1");
  await node.setCounter(1);
  await node.sh("mkdir -p /run/netns");
  const pod = { name: "", containerID: "node1", netns: "/proc/self/ns/net" };
  const before = await node.listing();
  assertError(await node.cni("ADD", pod), 4, /own namespace/);
  await node.sh("ip link del cni0");
  assertEquals(await node.listing(), before);
});

Deno.test("ADD says that eth0 exists if no namespace has a name", async () => {
  await using node = await Node.start("node1");
  const holder = "unshare -n sleep 60 > /dev/null 2>&1 & echo $!";
  const pid = await node.sh(`${holder} | tee -a /run/background; sleep 0.2`);
  const netns = `/proc/${pid}/ns/net`;
  await node.sh(`nsenter --net=${netns} ip link add eth0 type bridge
    ls -d /run/netns && exit 1 || exit 0`);
  const pod = { name: "", containerID: "box1", netns };
  assertError(await node.cni("ADD", pod), 100, /eth0 already exists/);
});

Deno.test("a second ADD that fails removes the first one's network", async () => {
  await using node = await Node.start("node1");
  const first = await node.start("alpine1");
  const { containerID } = first;
  const second = { ...await node.sandbox("alpine1"), containerID };
  const before = await node.listing(first);
  // It fails in the pod, after the name points to the second namespace.
  await node.shim(
    "ip",
    '[ /proc/$$/ns/net -ef /proc/$PPID/ns/net ] || exit 1; exec ip "$@"',
  );
  const env = { PATH: SHIM_PATH };
  for (const pod of [second, { ...second, netns: "/run/netns/none" }]) {
    assertEquals((await node.cni("ADD", pod, { env })).code, 1);
    await node.ping(addressOf(first));
  }
  await node.sh("rm -r /opt/shims");
  assertEquals(await node.listing(first), before);
});

Deno.test("ADD answers 11 if another ADD took the same number", async () => {
  await using node = await Node.start("node1");
  const pod = await node.sandbox("nginx1");
  // Between the look and the veth pair, as if somebody deleted the counter.
  await node.shim(
    "ip",
    `lines=$(cat)
    case $lines in
    "link add veth"*) ip link add veth2 alias other type veth peer name v ;;
    esac
    echo "$lines" | ip "$@"`,
  );
  const env = { PATH: SHIM_PATH };
  assertError(
    await node.cni("ADD", pod, { env }),
    11,
    /veth2 belongs to another pod/,
  );
  await node.sh("ip link show veth2");
  assertEquals(await node.in(pod, "ls /sys/class/net"), "lo");
});

Deno.test("ADD answers 11 if the bridge has no port left", async () => {
  const podcidr = "10.0.0.0/8";
  await using node = await Node.start("node1", conf({ podcidr }));
  const first = await node.start("alpine1");
  const pair = "link add d& master cni0 type veth peer name e&";
  await node.sh(`seq 511 | sed 's/.*/${pair}\\nlink set e& master cni0/' |
    ip -batch -`);
  const pod = await node.sandbox("nginx1");
  const before = await node.listing(pod);
  assertError(await node.cni("ADD", pod), 11, /1023 ports/);
  assertEquals(await node.listing(pod), before);
  await node.cni("DEL", first);
  await node.ping(addressOf(await node.cni("ADD", pod)));
});

Deno.test("ADD gives an interface its name, even if a shell would run it", async () => {
  await using node = await Node.start("node1");
  for (
    const ifname of ["$(id)`id`;&|*", ";reboot", "a>b<c", "~!{x}[y]?", "&"]
  ) {
    const pod = await node.sandbox("alpine1");
    const env = { CNI_IFNAME: ifname };
    const answer = await node.cni("ADD", pod, { env });
    assertEquals(answer.code, 0, answer.stdout);
    const look = "cd /proc/sys/net/ipv6/conf; ls; cat -- */accept_ra";
    const seen = await node.in(pod, `sh -c '${look}'`);
    const names = seen.split("\n").filter((line) => /\D/.test(line));
    assertEquals(names.sort(), ["all", "default", "lo", ifname].sort());
    // Of these four, only the new interface refuses IPv6 routes from routers.
    const count = "grep -l 0 /proc/sys/net/ipv6/conf/*/accept_ra | wc -l";
    assertEquals(await node.in(pod, `sh -c '${count}'`), "1", ifname);
    await node.ping("10.240.0.1", pod);
    assertEquals((await node.cni("DEL", pod, { env })).code, 0);
  }
});

Deno.test("ADD of only net1 gives a pod its network", async () => {
  await using node = await Node.start("node1");
  const pod = await node.start("alpine1", { env: { CNI_IFNAME: "net1" } });
  assertMatch(await node.in(pod, "ip route show default"), /dev net1/);
  await node.ping("10.240.0.1", pod);
});

Deno.test("udev gives a link another MAC after ADD reported it", async () => {
  await using node = await Node.start("node1");
  const pod = await node.start("alpine1");
  // MACAddressPolicy=persistent leaves links with 3, NET_ADDR_SET, alone.
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

for (
  const { mtu, isThrough } of [
    { mtu: 1400, isThrough: true },
    { mtu: undefined, isThrough: false },
  ]
) {
  const how = mtu ? `by "mtu": ${mtu}` : "without it";
  Deno.test(`a tunnel swallows a pod's long packets: ${how}`, async () => {
    await using node = await Node.start("node1", conf({ mtu }));
    // The NIC takes 1400 bytes, and no sender hears that a packet was too long.
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
    // If nothing of the two megabytes comes in two seconds, nothing will.
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

Deno.test("ADD lets a pod reach itself through its Service", async () => {
  await using node = await Node.start("node1");
  const pod = await node.start("nginx1");
  // The rules that kube-proxy writes. With bridge-nf-call-iptables the packet
  // turns round in the bridge, and leaves by the port that it came from.
  await node.sh(`sysctl -qw net.ipv4.ip_forward=1
    sysctl -qw net.bridge.bridge-nf-call-iptables=1
    iptables -t nat -A PREROUTING -d 10.96.0.10 -j DNAT --to ${addressOf(pod)}
    iptables -t nat -A POSTROUTING -s 10.240.0.0/24 -j MASQUERADE`);
  await node.ping("10.96.0.10", pod);
  // And hairpin is the reason.
  await node.sh(`ip link set ${vethOf(pod)} type bridge_slave hairpin off`);
  await assertRejects(() => node.ping("10.96.0.10", pod, 1));
});

// The caller's surroundings.

Deno.test("ADD and DEL work with the variables of containerd", async () => {
  await using node = await Node.start("node1");
  // Debian's containerd sets a library path, and its plugins inherit it.
  const env = { LD_LIBRARY_PATH: "/var/lib/containerd/opt/lib", LANG: "de_DE" };
  const pod = await node.start("alpine1", { env });
  await node.ping(addressOf(pod));
  assertEquals((await node.cni("DEL", pod, { env })).code, 0);
});

Deno.test("a working directory that is gone looks like a missing ip", async () => {
  await using node = await Node.start("node1");
  // As if a volume were mounted over the working directory of a runtime.
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

Deno.test("a chroot to a plain folder: mount --make-rslave / failed", async () => {
  await using node = await Node.start("node1");
  const pod = await node.sandbox("alpine1");
  await node.sh(`mkdir /opt/root
    for folder in bin dev etc lib lib64 opt proc run sbin sys tmp usr var; do
      mkdir /opt/root/$folder
      mount --rbind /$folder /opt/root/$folder
    done`);
  const script = "#!/bin/sh\nexec chroot /opt/root /opt/cni/bin/custom-cni\n";
  await Deno.writeTextFile(node.path("/opt/rooted"), script, { mode: 0o755 });
  const plugin = "/opt/rooted";
  await node.ping(addressOf(await node.cni("ADD", pod, { plugin })));
  assertEquals((await node.cni("DEL", pod, { plugin })).code, 0);
});

Deno.test("an ip that can't be started looks like a missing one", async () => {
  await using node = await Node.start("node1");
  const script = "#!/bin/sh\nulimit -n 18\nexec /opt/cni/bin/custom-cni\n";
  await Deno.writeTextFile(node.path("/opt/few"), script, { mode: 0o755 });
  const pod = await node.sandbox("alpine1");
  const answer = await node.cni("ADD", pod, { plugin: "/opt/few" });
  assertError(answer, 100, /Cannot start \w+;.*Too many open files/);
  assertEquals(/not on the PATH|apt-get/.test(answer.stdout), false);
});

Deno.test("an ip that answers nothing is an error", async () => {
  await using node = await Node.start("node1", CONF_1_1);
  await node.shim("ip", "exit 0");
  const env = { PATH: SHIM_PATH };
  const pod = await node.sandbox("alpine1");
  assertError(await node.cni("ADD", pod, { env }), 100, /answers nothing/);
  assertError(await node.cni("DEL", pod, { env }), 100, /answers nothing/);
  assertError(await node.cni("STATUS", undefined, { env }), 50, /nothing/);
});

/** A kernel that lacks something, and how a node simulates it. */
interface Kernel {
  kernel: string;
  /** A shell line, and stand-ins for programs, that simulate it. */
  line?: string;
  shims?: Record<string, string>;
  PATH?: string;
  /** What the log says about IPv6. */
  says: RegExp;
}

const KERNELS: Kernel[] = [
  {
    kernel: "without IPv6",
    line: "mount -t tmpfs tmpfs /proc/sys/net/ipv6",
    says: /^$/,
  },
  {
    kernel: "with read-only settings",
    shims: { sysctl: "echo read-only >&2; exit 1" },
    says: /cni0 accepts IPv6 routes from pods: read-only/,
  },
  {
    kernel: "whose sysctl is not on the PATH",
    line: MAKE_TOOLS,
    PATH: "/opt/tools",
    says: /cni0 accepts IPv6 routes from pods: .*sysctl/,
  },
];
for (const { kernel, line, shims = {}, PATH = SHIM_PATH, says } of KERNELS) {
  Deno.test(`a kernel ${kernel} fails no pod`, async () => {
    await using node = await Node.start("node1");
    if (line) await node.sh(line);
    for (const [name, script] of Object.entries(shims)) {
      await node.shim(name, script);
    }
    const pod = await node.start("alpine1", { env: { PATH } });
    await node.ping("10.240.0.1", pod);
    assertEquals((await node.cni("DEL", pod, { env: { PATH } })).code, 0);
    assertEquals(await node.sh("ip -br link show type veth"), "");
    const warnings = (await node.sh("cat /var/log/cni.log")).split("\n")
      .filter((line) => line.includes("IPv6"));
    assertMatch(warnings.join("\n"), says);
  });
}

// A step that fails. The stand-in's script holds what it must do, since the
// plugin passes no variables on. The file of steps has one step a line.
const STEPS = "/opt/shims/steps";

/** A program that fails at its nth call. */
const failingCall = (program: string, n: number) => `
  echo "${program} $*" >> ${STEPS}
  [ $(wc -l < ${STEPS}) != ${n} ] || exit 1
  exec ${program} "$@"`;

/** An ip that gets a bad line instead of the nth one of all its calls. */
const failingLine = (n: number) => `
  lines=$(cat)
  touch ${STEPS}
  nth=$((${n} - $(wc -l < ${STEPS})))
  printf '%s\\n' "$lines" >> ${STEPS}
  printf '%s\\n' "$lines" |
    awk -v nth=$nth 'NR == nth { $0 = "link show dev none" } 1' | ip "$@"`;

/**
 * Makes a program fail at each of its steps, with a new ADD for each, until an
 * ADD has no such step. Returns the number of steps, and how many of them
 * failed the ADD: some failed looks do not.
 */
async function failEach(program: string, failing: (n: number) => string) {
  await using node = await Node.start("node1");
  await node.setCounter(1);
  for (let n = 1, failed = 0;; n++) {
    const pod = await node.sandbox("nginx1");
    await node.sh("ip link del cni0 || true");
    const before = await node.listing(pod);
    await node.shim(program, failing(n));
    const env = { PATH: SHIM_PATH };
    const answer = await node.cni("ADD", pod, { env });
    const { stdout: step } = await node.run("sed", "-n", `${n}p`, STEPS);
    await node.sh("rm -r /opt/shims");
    const what = `${program}, step ${n}: ${step}${answer.stdout}`;
    if (answer.code === 0) {
      await node.ping("10.240.0.1", pod);
      assertEquals((await node.cni("DEL", pod)).code, 0, what);
    } else {
      assert(step, what); // nothing else failed
      failed++;
      assert(answer.json.code >= 4, what);
      await node.sh("ip link del cni0 || true"); // it may stay
      assertEquals(await node.listing(pod), before, what);
      assertEquals((await node.cni("ADD", pod)).code, 0, what);
    }
    if (!step) return { steps: n - 1, failed };
  }
}

Deno.test("ADD leaves nothing whichever step fails", async () => {
  const calls = (program: string) =>
    failEach(program, (n) => failingCall(program, n));
  const [lines, ip, ln, ...others] = await Promise.all([
    failEach("ip", failingLine),
    ...["ip", "ln", "nsenter", "sysctl"].map(calls),
  ]);
  const found = Deno.inspect({ lines, ip, ln, others });
  assert(lines.failed > 5 && ip.failed > 1 && ln.failed > 0, found);
});
