/**
 * The CNI specification as a table: what is sent, and what must come back. It
 * is data, so that another plugin can be measured with the same rows: whether
 * the table itself is right, Debian's `bridge` tells.
 *
 * @see {@link https://www.cni.dev/docs/spec/}
 * @module
 */
// deno-lint-ignore-file no-explicit-any -- an answer may hold any JSON
import type { Pod } from "../lab/node.ts";

/** The versions that the rows are about. */
export const VERSIONS = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/** What can be seen after a row's call. */
export interface Seen {
  /** What the plugin says that it knows. */
  known: string[];
  version?: string;
  pod: Pod;
  /** What the ADD before answered, and what the row's own call did. */
  added?: any;
  answer: any;
  /** From the kernel: the node's links, the pod's but lo, and its routes. */
  host: any[];
  links: any[];
  routes: any[];
}

type Shows = Record<string, (seen: Seen) => [is: unknown, mustBe: unknown]>;

/** What must come back. */
export interface Want {
  /** The error's code; without one the call succeeds. */
  code?: number;
  /** The pod's interfaces afterwards; without this it has none. */
  pod?: string[];
  /** The bridge's ports afterwards, if not one for each of those. */
  ports?: number;
  /** What else must be so; a success without this answers nothing. */
  shows?: Shows;
}

/** A call by the line "VERB if what is special in it". */
export interface Row extends Want {
  /** A test for each; without this one for 1.0.0, or 0.4.0 with an old peer. */
  versions?: (string | undefined)[];
  /** What happens before: verbs, and lines for the node's shell. */
  after?: string[];
  env?: Record<string, string | undefined>;
  /** What is added to the configuration, or all of stdin. */
  conf?: string | object | ((seen: Pick<Seen, "pod" | "added">) => object);
  /** What is otherwise with the peer. */
  peer?: Difference | Difference[];
}

/** Where the peer may differ, and why. */
export interface Difference extends Want {
  after?: string[];
  why: string;
  /** Only a peer that does not know this version differs so. */
  before?: string;
}

/** What section 5 asks of the answer to ADD, compared with the kernel. */
const RESULT: Shows = {
  cniVersion: ({ answer, version }) => [answer.cniVersion, version],
  "one interface with CNI_NETNS to the letter": ({ answer, links, pod }) => [
    answer.interfaces.filter((link: any) => link.sandbox),
    links.map(({ ifname, address }) => (
      { name: ifname, mac: address, sandbox: pod.netns }
    )),
  ],
  "the bridge and its port": ({ answer: { interfaces }, host }) => [
    byName(interfaces.filter((link: any) => !link.sandbox)),
    byName(
      host.filter((link) => [link.ifname, link.master].includes("cni0"))
        .map(({ ifname, address }) => ({ name: ifname, mac: address })),
    ),
  ],
  "ips, with a version below 1.0.0 only": ({ answer, links, version }) => [
    answer.ips,
    links.map((link) => ({
      ...(version! < "1.0.0" && { version: "4" }),
      address: addressOf(link),
      gateway: "10.240.0.1",
      interface: answer.interfaces.findIndex((link: any) => link.sandbox),
    })),
  ],
  "the route": ({ answer, routes }) => [
    [answer.routes, routes.find(({ dst }) => dst === "default")?.gateway],
    [[{ dst: "0.0.0.0/0", gw: "10.240.0.1" }], "10.240.0.1"],
  ],
};

/** What section 5 asks of the answer to VERSION. */
const SUPPORTED: Shows = {
  cniVersion: ({ answer, version = "0.1.0" }) => [answer.cniVersion, version],
  supportedVersions: ({ answer, known }) => [answer.supportedVersions, known],
};

function byName(links: { name: string }[]) {
  return links.toSorted((a, b) => a.name.localeCompare(b.name));
}

/** The address of a link, as `ip` shows it. */
function addressOf({ addr_info: [{ local, prefixlen }] }: any): string {
  return `${local}/${prefixlen}`;
}

// What rows have in common.
const ADDED = { pod: ["eth0"], shows: RESULT };
const STAYS = { after: ["ADD"], pod: ["eth0"] };
const NO_PREVIOUS = { conf: { prevResult: undefined } };
const NO_ROUTE = ["ADD", "ip -n $NS route del default"];
const GONE = ["ADD", "ip netns del $NS"];
/** For at most half a minute until the kernel has ended the namespace. */
const ENDED = `for i in $(seq 300); do
  [ "$(ip link show master cni0)" ] || break
  sleep 0.1
done`;
const NEW = { versions: ["1.1.0"] };
const DNS = { nameservers: ["10.96.0.10"], search: ["cluster.local"] };
/** What a plugin before ours in a chain answered. */
const PREVIOUS = {
  interfaces: [{ name: "dummy0" }],
  ips: [{ address: "192.0.2.9/24", interface: 0 }],
  routes: [{ dst: "192.0.2.0/24" }],
};

// Where the peer differs.
const REFUSES = { code: 999, why: "has this code for most failures" };
const STRICT = { code: 4, pod: [], shows: {} };
const NO_VERB = {
  before: "1.1.0",
  code: 3,
  why: "asks for a container before it knows why",
};
const LEAVES = { pod: ["eth0"], why: "leaves it to the namespace's end" };
const NEWEST: Difference = {
  shows: {
    ...SUPPORTED,
    cniVersion: ({ answer, known }) => [answer.cniVersion, known.at(-1)],
  },
  why: "answers the newest version that it knows, whatever is asked",
};

/** The rows, by the specification's section and what it says there. */
export const TABLE: Record<string, Record<string, Row>> = {
  "1 Configuration: a name is needed, other keys may be there": {
    "ADD if it has no name": { conf: { name: undefined }, code: 7 },
    "ADD if the name is bad": {
      versions: VERSIONS,
      conf: { name: "-net" },
      code: 7,
      shows: { cniVersion: RESULT.cniVersion },
      peer: { shows: {}, why: "does not say it in errors" },
    },
    "ADD if a key is unknown": { conf: { keyA: ["some"] }, ...ADDED },
  },
  "1 Version: a plugin refuses what it does not know": {
    "ADD if the version is unknown": { versions: ["9.9.9"], code: 1 },
    "DEL if the version is unknown, for a pod must be able to end": {
      versions: ["9.9.9"],
      peer: { code: 1, why: "asks first" },
    },
    "CHECK if the version is unknown": { versions: ["9.9.9"], code: 1 },
    "ADD if the version is old or, as it was then, not given": {
      versions: ["0.1.0", "0.2.0", undefined],
      code: 1,
      peer: {
        code: 0,
        pod: ["eth0"],
        shows: { ip4: (it) => [it.answer.ip4.ip, addressOf(it.links[0])] },
        why: "speaks these too",
      },
    },
    "CHECK if it came later": { versions: VERSIONS.slice(0, 2), code: 1 },
    "GC if it came later": {
      versions: VERSIONS.slice(0, 4),
      code: 1,
      peer: NO_VERB,
    },
    "STATUS if it came later": {
      versions: VERSIONS.slice(0, 4),
      code: 1,
      peer: NO_VERB,
    },
  },
  "2 Parameters: some are needed": {
    ...needs("ADD", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
    ...needs("DEL", ["CNI_CONTAINERID", "CNI_IFNAME"]),
    ...needs("CHECK", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
    "REMOVE if that is no verb": { code: 4 },
    "GET if the tutorial's runtime calls it": {
      peer: { code: 4, why: "has only the specification's verbs" },
    },
    "ADD if CNI_ARGS has unknown keys": {
      ...ADDED,
      env: { CNI_ARGS: "FOO=BAR;ABC=123" },
      peer: [
        { ...STRICT, code: 999, why: "wants IgnoreUnknown=1 for that" },
        { before: "1.0.0", pod: ["eth0"], why: "asks after all is done" },
      ],
    },
    "ADD if CNI_PATH is not there": {
      ...ADDED,
      env: { CNI_PATH: undefined },
      peer: { ...STRICT, why: "needs it to find host-local" },
    },
  },
  "2 ADD: creates the interface, and answers what it did": {
    "ADD if all is well": {
      versions: VERSIONS,
      conf: { dns: DNS },
      pod: ["eth0"],
      shows: { ...RESULT, dns: ({ answer }) => [answer.dns, DNS] },
    },
    "ADD if asked for net1": {
      env: { CNI_IFNAME: "net1" },
      pod: ["net1"],
      shows: RESULT,
    },
    "ADD if asked for a second interface": {
      after: ["ADD"],
      env: { CNI_IFNAME: "net1" },
      pod: ["eth0", "net1"],
      shows: { cniVersion: RESULT.cniVersion },
    },
    "ADD if the pod was added, and all stays as it was": {
      ...STAYS,
      code: 100,
      shows: { ip: (it) => [addressOf(it.links[0]), it.added.ips[0].address] },
      peer: REFUSES,
    },
    "ADD if somebody else made the interface": {
      after: ["ip -n $NS link add eth0 type bridge"],
      pod: ["eth0"],
      ports: 0,
      code: 100,
      peer: REFUSES,
    },
    "ADD if there is a prevResult, which it passes on": {
      conf: { prevResult: PREVIOUS },
      pod: ["eth0"],
      shows: {
        previous: ({ answer }) => [
          Object.keys(PREVIOUS).map((key) => answer[key][0]),
          Object.values(PREVIOUS).flat(),
        ],
        own: ({ answer: { interfaces, ips } }) => [
          ips.map((ip: any) => interfaces[ip.interface].name),
          ["dummy0", "eth0"],
        ],
      },
      peer: { shows: RESULT, why: "drops it, as the first of each chain" },
    },
  },
  "2 DEL: succeeds, whatever is missing": {
    "DEL if all is well": { versions: VERSIONS, after: ["ADD"] },
    "DEL if it is the second": { after: ["ADD", "DEL"] },
    "DEL if nothing was added": {},
    "DEL if prevResult is missing": { after: ["ADD"], ...NO_PREVIOUS },
    "DEL if CNI_NETNS is missing": {
      after: ["ADD"],
      env: { CNI_NETNS: undefined },
      peer: LEAVES,
    },
    "DEL if CNI_NETNS is empty": {
      after: ["ADD"],
      env: { CNI_NETNS: "" },
      peer: LEAVES,
    },
    "DEL if the namespace is gone": {
      after: GONE,
      peer: [
        {
          after: [...GONE, ENDED],
          why: "leaves the veth to the kernel, which takes its time",
        },
        { before: "1.0.0", code: 999, why: "looks for the namespace first" },
      ],
    },
  },
  "2 CHECK: compares with prevResult": {
    "CHECK if all is well": { versions: VERSIONS.slice(2), ...STAYS },
    "CHECK if prevResult is missing": {
      ...STAYS,
      ...NO_PREVIOUS,
      code: 7,
      peer: REFUSES,
    },
    "CHECK if the interface is gone": {
      after: ["ADD", "ip -n $NS link del eth0"],
      code: 101,
      peer: REFUSES,
    },
    "CHECK if the address is gone": {
      after: ["ADD", "ip -n $NS addr flush dev eth0"],
      pod: ["eth0"],
      code: 101,
      peer: REFUSES,
    },
    "CHECK if the route is gone": {
      after: NO_ROUTE,
      pod: ["eth0"],
      code: 101,
      peer: REFUSES,
    },
    "CHECK if a later plugin took the route away, and said so": {
      after: NO_ROUTE,
      pod: ["eth0"],
      conf: ({ added }) => added && { prevResult: { ...added, routes: [] } },
    },
  },
  "2 STATUS: fails if ADD would": {
    "STATUS if there is room": NEW,
    "STATUS if all addresses are in use, since pods end": {
      ...NEW,
      ...STAYS,
      conf: { podcidr: "10.240.0.0/30" },
    },
    "STATUS if the bridge has an address of another range": {
      ...NEW,
      after: [
        "ip link add cni0 type bridge",
        "ip addr add 10.240.0.9/16 dev cni0",
      ],
      ports: 0,
      code: 50,
      peer: { code: 0, why: "asks host-local alone" },
    },
  },
  "2 VERSION: needs nothing, and answers as asked": {
    "VERSION if the version is known or not": {
      versions: ["0.1.0", ...VERSIONS, "9.9.9", undefined],
      shows: SUPPORTED,
      peer: NEWEST,
    },
    "VERSION if the variables are rubbish": {
      env: { CNI_CONTAINERID: "../x", CNI_NETNS: "dummy", CNI_IFNAME: "a/b" },
      shows: SUPPORTED,
      peer: NEWEST,
    },
    "VERSION if stdin is empty": {
      versions: [undefined],
      conf: "",
      shows: SUPPORTED,
      peer: NEWEST,
    },
  },
  "2 GC: removes what is not in the list": {
    "GC if there is no list, and removes nothing": { ...NEW, ...STAYS },
    "GC if the pod is in the list": {
      ...NEW,
      ...STAYS,
      conf: ({ pod: { containerID } }) => ({
        "cni.dev/valid-attachments": [{ containerID, ifname: "eth0" }],
      }),
    },
    "GC if the list is empty": {
      ...NEW,
      after: ["ADD"],
      conf: { "cni.dev/valid-attachments": [] },
      peer: LEAVES,
    },
  },
};

/** Rows for the variables that a verb needs; the error names them. */
function needs(verb: string, names: string[]): Record<string, Row> {
  return Object.fromEntries(
    names.map((name) => [`${verb} if ${name} is empty`, {
      env: { [name]: "" },
      code: 4,
      shows: { msg: ({ answer }) => [answer.msg.match(name)?.[0], name] },
    }]),
  );
}
