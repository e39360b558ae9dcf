/**
 * Bad input: the plugin answers with the right error and changes nothing, on a
 * node that has a pod and a network to lose.
 */
import { assertEquals, assertStringIncludes } from "@std/assert";
import { CONF, Node, type Pod } from "../lab/node.ts";

/** A part of a call, and how it can be bad. */
interface Input {
  /** A variable, a key of the conf, "stdin", or the lab's "plugin". */
  at: string;
  /** The error's code for all bad values. */
  code: number;
  /** Verbs that must refuse it; by default only ADD. */
  verbs?: string[];
  /** Values by what is bad about them. */
  bad: Record<string, unknown[]>;
  /** Only the kernel finds it, after ADD has taken a number. */
  isLate?: boolean;
}

const DEEP = "[".repeat(100_000) + "]".repeat(100_000);

const INPUTS: Input[] = [
  {
    at: "CNI_COMMAND",
    code: 4,
    bad: {
      "is not a verb": [
        ...["FOO", "add", "ADD ", "constructor", "toString", "__proto__"],
      ],
    },
  },
  {
    at: "CNI_CONTAINERID",
    code: 4,
    verbs: ["ADD", "DEL"],
    bad: {
      "is missing": [undefined, ""],
      "is not a plain name": [
        ...["a/b", "..", ".a", "../../../tmp/x", "a b", "a\nb", "-h", "é"],
        "a".repeat(300),
      ],
    },
  },
  {
    at: "CNI_IFNAME",
    code: 4,
    verbs: ["ADD", "DEL"],
    bad: {
      "is missing": [undefined, ""],
      "is not an interface name": [
        ...[".", "..", "a/b", "a:b", "a b", "a\nb", "eth%d", "all", "default"],
        ...["é", "a".repeat(16)],
      ],
    },
  },
  {
    at: "CNI_NETNS",
    code: 4,
    bad: {
      "is missing": [undefined, ""],
      "is relative": ["netns", "./netns"],
      "would confuse ip": ["/run/a\nb", '/run/"a"', "/run/#a", "/run/a\\b"],
    },
  },
  {
    at: "CNI_NETNS",
    code: 4,
    bad: {
      "is not a network namespace": [
        ...["/run/netns/none", "/tmp/file", "/tmp", "/proc/self/ns/mnt"],
      ],
      "is the node's own": ["/proc/self/ns/net", "/tmp/link", "/tmp/own"],
    },
    isLate: true,
  },
  {
    at: "CNI_NETNS",
    code: 100,
    bad: { "is a pipe, which blocks on opening": ["/tmp/fifo"] },
    isLate: true,
  },
  {
    at: "CNI_CONTAINERID",
    code: 4,
    bad: { "is the name of another namespace": ["taken"] },
  },
  {
    at: "stdin",
    code: 6,
    bad: {
      "is not JSON": ["", " ", "{", "{}}", "\0", '{"a":\0}', `{"a":${DEEP}}`],
      "is not an object": ["[]", '"x"', "null", "5"],
    },
  },
  {
    at: "plugin",
    code: 6,
    bad: { "gets a conf that is not UTF-8": ["/opt/latin1"] },
  },
  {
    at: "cniVersion",
    code: 1,
    bad: {
      "is missing": [undefined, null],
      "is unknown": ["", "9.9.9", "0.2.0", "1.0", "1.0.0 "],
    },
  },
  {
    at: "cniVersion",
    code: 7,
    bad: { "is not a string": [5, true, {}, ["1.0.0"]] },
  },
  {
    at: "name",
    code: 7,
    bad: {
      "is missing": [undefined, null, ""],
      "is not a string": [5, true, {}, ["net"]],
      "is not a plain name": ["a/b", "-a", "a\nb"],
    },
  },
  {
    at: "dns",
    code: 7,
    bad: { "is not an object": ["x", 5, true, []] },
  },
  {
    at: "mtu",
    code: 7,
    bad: {
      "is not a whole number": ["1400", 1400.5, true, {}, [1400]],
      "is out of range": [0, -1, 67, 65536, 1e99],
    },
  },
  {
    at: "logLevel",
    code: 7,
    bad: { "is not a level": ["", "debug", "TRACE", 10, {}, ["DEBUG"]] },
  },
  {
    at: "runtimeConfig",
    code: 7,
    bad: {
      "asks for an address or a MAC": [
        ...[{ ips: ["10.240.0.9/24"] }, { mac: "02:00:00:00:00:01" }],
      ],
    },
  },
  {
    at: "prevResult",
    code: 7,
    bad: {
      "is not an object": ["x", 5, true, []],
      "is not a result": [{ interfaces: {} }, { ips: "x" }, { routes: [5] }],
      "has null in its lists": [{ interfaces: [null] }, { ips: [{}, null] }],
    },
  },
  {
    at: "prevResult",
    code: 7,
    verbs: ["CHECK"],
    bad: { "is missing": [undefined, null] },
  },
  {
    at: "cni.dev/valid-attachments",
    code: 7,
    verbs: ["GC"],
    bad: {
      "is not a list": ["x", 5, true, {}],
      "has a bad entry": [
        ...[["x"], [[]], [{}], [{ containerID: "x" }], [null]],
      ],
    },
  },
  {
    at: "podcidr",
    code: 7,
    bad: {
      "is not a string": [undefined, null, 5, true, {}, ["10.240.1.0/24"]],
      "is not an IPv4 range": [
        ...["", "10.240.1.0", "10.240.1.0/", "10.240.1/24", "10.240.1.0.0/24"],
        ...["fd00::/64", "256.0.0.0/8", "10.240.1.0/33", "10.240.1.0/+24"],
      ],
      "is written differently": [
        ...["010.240.1.0/24", "10.240.1.0/024", "0xa.0.0.0/8"],
        ...[" 10.240.1.0/24", "10.240.1.0/24 ", "10.240.1.0/24\n"],
      ],
      "is not from /8 to /30": ["10.0.0.0/7", "10.240.1.0/31", "10.240.1.0/32"],
      "has host bits set": ["10.240.1.5/24", "10.240.1.0/23"],
      "is not for hosts": [
        ...["224.0.0.0/24", "240.0.0.0/8", "127.0.0.0/8", "0.0.0.0/8"],
      ],
    },
  },
  {
    at: "podcidr",
    code: 7,
    bad: {
      "overlaps an address of lan0 or cni0": [
        ...["10.99.0.0/24", "10.99.0.0/16", "10.99.0.0/30", "10.240.0.0/16"],
      ],
    },
    isLate: true,
  },
];

/** All that must not change, without the carrier, which changes by itself. */
const LISTING = String.raw`
  look() { printf 'link\naddr\nroute show table all\n' | ip -4 "$@" -batch -; }
  { look; for netns in $(ls /run/netns); do look -n $netns; done; } |
    sed -E 's/NO-CARRIER,|,LOWER_UP| linkdown| (state|qdisc) \w+//g'
  find /tmp /run/netns /etc/cni -xdev ! -path /tmp ! -name last_allocated_ip \
    -printf '%p %y %m %U %s %l\n' | sort
  echo number $(cat /tmp/last_allocated_ip)`;

/** A node, and a sandbox without a network. */
interface Place {
  node: Node;
  pod: Pod;
}

async function prepare(name: string): Promise<Place> {
  const node = await Node.start(name);
  await node.sh(`cd /tmp; touch file own; mkfifo fifo
    ln -s /proc/self/ns/net link; mount --bind /proc/self/ns/net own
    ip netns add taken
    ip link add lan0 type bridge; ip addr add 10.99.0.1/24 dev lan0
    ip addr add 10.240.99.1/24 dev lan0`);
  const script = "#!/bin/sh\nprintf '\\377' | /opt/cni/bin/custom-cni\n";
  await Deno.writeTextFile(node.path("/opt/latin1"), script, { mode: 0o755 });
  return { node, pod: await node.sandbox("idle") };
}

let fresh: Place;
let busy: Place;
let running: Pod;
Deno.test.beforeAll(async () => {
  fresh = await prepare("fresh");
  busy = await prepare("busy");
  running = await busy.node.start("running");
});
Deno.test.afterAll(async () => {
  await fresh.node[Symbol.asyncDispose]();
  await busy.node[Symbol.asyncDispose]();
});

/** Sends all values, and checks that nothing has changed. */
async function send(
  { at, code, isLate }: Input,
  values: unknown[],
  verb: string,
  { node, pod }: Place,
) {
  const isVariable = at.startsWith("CNI_");
  const look = async () => {
    // The bridge of a failed ADD may stay, if nobody had one before.
    if (isLate && node === fresh.node) {
      await node.sh("ip link del cni0 || true");
    }
    const listing = await node.sh(LISTING);
    return isLate ? listing.replace(/number.*$/, "") : listing;
  };
  const before = await look();
  const one = async (value: unknown) => {
    const conf = { ...CONF, cniVersion: "1.1.0", [at]: value };
    const { code: status, json, stdout, stderr } = await node.cni(verb, pod, {
      conf: at === "stdin" ? value : conf,
      ...(isVariable && { env: { [at]: value as string } }),
      ...(at === "plugin" && { plugin: value as string }),
    });
    const said = `${JSON.stringify(value)?.slice(0, 80)}: ${stdout}${stderr}`;
    assertEquals([status, json?.code], [1, code], said);
    assertEquals(Object.keys(json).join(), "cniVersion,code,msg,details", said);
    if (code === 4) assertStringIncludes(json.msg, at);
  };
  // Late ones one by one: they would collide in the pod's interface.
  if (!isLate) await Promise.all(values.map(one));
  else for (const value of values) await one(value);
  assertEquals(await look(), before);
}

for (const input of INPUTS) {
  for (const verb of input.verbs ?? ["ADD"]) {
    for (const [what, values] of Object.entries(input.bad)) {
      const name = `${verb} answers error ${input.code} if ${input.at} ${what}`;
      Deno.test(name, async () => {
        const pod = verb === "ADD" ? busy.pod : running;
        // ADD undoes what it began, on a fresh node too.
        await Promise.all(
          [{ ...busy, pod }, ...input.isLate ? [fresh] : []]
            .map((place) => send(input, values, verb, place)),
        );
      });
    }
  }
}
