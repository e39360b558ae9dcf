/**
 * The CNI specification as a table: what is sent, and what must come back. As
 * it is data, the same rows test another plugin: Debian's `bridge` shows that
 * the table is right.
 *
 * @see {@link https://www.cni.dev/docs/spec/}
 * @module
 */
// deno-lint-ignore-file no-explicit-any -- an answer may hold any JSON
import type { Pod } from "../lab/node.ts";

/** The versions that the rows are about. */
export const VERSIONS = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/** What a test sees after a row's call. */
export interface Seen {
  /** The versions that the plugin claims. */
  known: string[];
  version?: string;
  pod: Pod;
  /** The result of the earlier ADD, and the answer to the row's own call. */
  added?: any;
  answer: any;
  /** The node's links, and the pod's links (without lo) and routes. */
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
  /** The bridge's ports afterwards; by default one for each of those. */
  ports?: number;
  /** What else must hold; a success without this has an empty answer. */
  shows?: Shows;
}

/** A call. Its key is "VERB if CONDITION". */
export interface Row extends Want {
  /** One test each; by default only 1.0.0, or 0.4.0 for an old peer. */
  versions?: (string | undefined)[];
  /** What happens before: verbs, and lines for the node's shell. */
  after?: string[];
  env?: Record<string, string | undefined>;
  /** Changes to the conf, or all of stdin as a string. */
  conf?: string | object | ((seen: Pick<Seen, "pod" | "added">) => object);
  /** How the peer differs. */
  peer?: Difference | Difference[];
}

/** How a peer differs, and why it may. */
export interface Difference extends Want {
  after?: string[];
  why: string;
  /** Only for a peer without this version. */
  before?: string;
}

/** What section 5 requires of the result of ADD, compared with the kernel. */
const RESULT: Shows = {
  cniVersion: ({ answer, version }) => [answer.cniVersion, version],
  "one interface, with CNI_NETNS unchanged": ({ answer, links, pod }) => [
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
  "ips, with a version only before 1.0.0": ({ answer, links, version }) => [
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

/** What section 5 requires of the answer to VERSION. */
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

// Common parts of rows.
const ADDED = { pod: ["eth0"], shows: RESULT };
const STAYS = { after: ["ADD"], pod: ["eth0"] };
const NO_PREVIOUS = { conf: { prevResult: undefined } };
const NO_ROUTE = ["ADD", "ip -n $NS route del default"];
const GONE = ["ADD", "ip netns del $NS"];
/** Waits at most half a minute for the kernel to end the namespace. */
const ENDED = `for i in $(seq 300); do
  [ "$(ip link show master cni0)" ] || break
  sleep 0.1
done`;
const NEW = { versions: ["1.1.0"] };
const DNS = { nameservers: ["10.96.0.10"], search: ["cluster.local"] };
/** The result of a plugin before ours in a chain. */
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
  why: "requires a container before it reads the verb",
};
const LEAVES = { pod: ["eth0"], why: "leaves it until the namespace ends" };
const NEWEST: Difference = {
  shows: {
    ...SUPPORTED,
    cniVersion: ({ answer, known }) => [answer.cniVersion, known.at(-1)],
  },
  why: "always answers its newest version",
};

/** The rows, by the section of the specification and its rule. */
export const TABLE: Record<string, Record<string, Row>> = {
  "1 Configuration: it needs a name, and may have unknown keys": {
    "ADD if it has no name": { conf: { name: undefined }, code: 7 },
    "ADD if the name is bad": {
      versions: VERSIONS,
      conf: { name: "-net" },
      code: 7,
      shows: { cniVersion: RESULT.cniVersion },
      peer: { shows: {}, why: "has no version in its errors" },
    },
    "ADD if a key is unknown": { conf: { keyA: ["some"] }, ...ADDED },
  },
  "1 Version: a plugin refuses unknown versions": {
    "ADD if the version is unknown": { versions: ["9.9.9"], code: 1 },
    "DEL if the version is unknown, since pods must be able to end": {
      versions: ["9.9.9"],
      peer: { code: 1, why: "checks the version first" },
    },
    "CHECK if the version is unknown": { versions: ["9.9.9"], code: 1 },
    "ADD if the version is old, or missing as it was then": {
      versions: ["0.1.0", "0.2.0", undefined],
      code: 1,
      peer: {
        code: 0,
        pod: ["eth0"],
        shows: { ip4: (it) => [it.answer.ip4.ip, addressOf(it.links[0])] },
        why: "knows these too",
      },
    },
    "CHECK if the version is older than the verb": {
      versions: VERSIONS.slice(0, 2),
      code: 1,
    },
    "GC if the version is older than the verb": {
      versions: VERSIONS.slice(0, 4),
      code: 1,
      peer: NO_VERB,
    },
    "STATUS if the version is older than the verb": {
      versions: VERSIONS.slice(0, 4),
      code: 1,
      peer: NO_VERB,
    },
  },
  "2 Parameters: some are required": {
    ...needs("ADD", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
    ...needs("DEL", ["CNI_CONTAINERID", "CNI_IFNAME"]),
    ...needs("CHECK", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
    "REMOVE if that is not a verb": { code: 4 },
    "GET if the tutorial's runtime calls it": {
      peer: { code: 4, why: "has only the specification's verbs" },
    },
    "ADD if CNI_ARGS has unknown keys": {
      ...ADDED,
      env: { CNI_ARGS: "FOO=BAR;ABC=123" },
      peer: [
        { ...STRICT, code: 999, why: "requires IgnoreUnknown=1" },
        {
          before: "1.0.0",
          pod: ["eth0"],
          why: "requires it after the work is done",
        },
      ],
    },
    "ADD if CNI_PATH is missing": {
      ...ADDED,
      env: { CNI_PATH: undefined },
      peer: { ...STRICT, why: "needs it to find host-local" },
    },
  },
  "2 ADD: creates the interface, and answers with a result": {
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
    "ADD if the pod was added before, and changes nothing": {
      ...STAYS,
      code: 100,
      shows: { ip: (it) => [addressOf(it.links[0]), it.added.ips[0].address] },
      peer: REFUSES,
    },
    "ADD if somebody else created the interface": {
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
      peer: { shows: RESULT, why: "drops it, as it expects to be first" },
    },
  },
  "2 DEL: succeeds, whatever is missing": {
    "DEL if all is well": { versions: VERSIONS, after: ["ADD"] },
    "DEL if it was called before": { after: ["ADD", "DEL"] },
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
          why: "leaves the veth to the kernel, which deletes it later",
        },
        { before: "1.0.0", code: 999, why: "requires the namespace" },
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
    "CHECK if a later plugin removed the route from pod and result": {
      after: NO_ROUTE,
      pod: ["eth0"],
      conf: ({ added }) => added && { prevResult: { ...added, routes: [] } },
    },
  },
  "2 STATUS: fails if ADD would": {
    "STATUS if there is room": NEW,
    "STATUS if all addresses are in use, since pods will end": {
      ...NEW,
      ...STAYS,
      conf: { podcidr: "10.240.0.0/30" },
    },
    "STATUS if the bridge has an address of another pod CIDR": {
      ...NEW,
      after: [
        "ip link add cni0 type bridge",
        "ip addr add 10.240.0.9/16 dev cni0",
      ],
      ports: 0,
      code: 50,
      peer: { code: 0, why: "only asks host-local" },
    },
  },
  "2 VERSION: requires nothing, and answers in the given version": {
    "VERSION if the version is known or unknown": {
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

/** Rows for the variables that a verb requires; the error names them. */
function needs(verb: string, names: string[]): Record<string, Row> {
  return Object.fromEntries(
    names.map((name) => [`${verb} if ${name} is empty`, {
      env: { [name]: "" },
      code: 4,
      shows: { msg: ({ answer }) => [answer.msg.match(name)?.[0], name] },
    }]),
  );
}
