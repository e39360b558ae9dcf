/**
 * node-setup: the commands that the tutorial types once on each node, so that
 * pods reach each other, the pods of other nodes, and the internet.
 *
 * The plugin wires up one pod at a time. None of this depends on a pod, so an
 * operator runs it by hand: it prints each command, and runs it unless what the
 * command makes is there already.
 *
 * ```sh
 * deno run -A node-setup.ts --peer 10.0.2.14
 * ```
 *
 * @module
 */
import { parseArgs } from "@std/cli/parse-args";
import { existsSync } from "@std/fs/exists";
import { isIPv4 } from "node:net";
import {
  CNIError,
  fail,
  overlaps,
  parsePodCIDR,
  type PodCIDR,
} from "./ipam.ts";

const HELP = `Usage: deno run -A node-setup.ts --peer IP[=CIDR] [options]
       kubectl get nodes -o json | deno run -A node-setup.ts --nodes -

Accepts the pods' packets in FORWARD, routes to the pods of the other nodes, and
masquerades what leaves the cluster. To be run as root, on each node. A run adds
what is missing; it takes nothing away but with --delete.

  --peer IP[=CIDR]  another node and the range of its pods; once for each. Of
                    10.240.0.0/24 and 10.240.1.0/24 each knows the other
  --nodes FILE      all nodes, as kubectl prints them; - is stdin. This one is
                    found by its name or address
  --podcidr CIDR    the range of this node's pods, else that of the conf
  --conf FILE       the conf, else /etc/cni/net.d/10-custom-cni.conf
  --bridge NAME     the bridge of the pods, else cni0
  --dev NAME        the device to the peers, else that of "ip route get"
  --keep-source     pods of the peers see a pod's own address, not the node's
                    as in the tutorial; from then on until --delete
  --only STEP       forward, routes or masquerade alone; may be repeated
  --delete          take back what a run with the same flags makes, and what
                    --keep-source made. net.ipv4.ip_forward stays on, since
                    others on the node may rely on it
  --dry-run         print all commands and run none; needs no root
  --help            print this

Exit status: 0 done, 1 failed with nothing added, 2 wrong usage`;

/** The ranges of the tutorial's two nodes. */
const PAIR = ["10.240.0.0/24", "10.240.1.0/24"];

/** What lists the rules of the node, and makes of a line its command. */
const LISTINGS: [command: string, prefix: string][] = [
  ["ip -oneline route show", "ip route add "],
  ["sysctl net.ipv4.ip_forward", "sysctl -w "],
  ["iptables -S FORWARD", "iptables "],
  ["iptables -t nat -S POSTROUTING", "iptables -t nat "],
];

/** The words that make a command take back what it did. */
const OPPOSITE: Record<string, string> = {
  "-A": "-D",
  "-I": "-D",
  "add": "del",
  "net.ipv4.ip_forward=1": "net.ipv4.ip_forward=0",
};

const STEPS = ["forward", "routes", "masquerade"];

/** Another node, whose pods are reached through its address. */
export interface Peer {
  ip: string;
  podCIDR: PodCIDR;
  dev?: string;
}

/** A node as kubectl prints it, as far as it matters here. */
export interface KubeNode {
  metadata?: { name?: string };
  spec?: { podCIDR?: string };
  status?: { addresses?: { type: string; address: string }[] };
}

type Flags = ReturnType<typeof readFlags>;

/** The commands of the tutorial in its order, for --delete in reverse. */
function plan(
  own: string,
  peers: Peer[],
  flags: Flags,
  there: Set<string>,
) {
  const commands = (...lines: string[]) =>
    lines.map((line) => ({ line, isThere: there.has(line) }));

  // Without it the kernel drops what is not for the node itself. In the
  // tutorial Docker has turned it on.
  const ip_forward = commands("sysctl -w net.ipv4.ip_forward=1");

  // Same host: br_netfilter leads even what cni0 only bridges through FORWARD,
  // and Docker lets that drop everything.
  const forward = commands(
    `iptables -A FORWARD -s ${own} -j ACCEPT`,
    `iptables -A FORWARD -d ${own} -j ACCEPT`,
  );

  // Other hosts: the network between them knows of no pods, so the nodes must.
  const routes = commands(...peers.map(routeTo));

  // Internet: answers find the way to the node, not to the pod. What stays on
  // the bridge needs no other source.
  const nat = `POSTROUTING -s ${own}`;
  const masquerade = commands(
    `iptables -t nat -A ${nat} ! -o ${flags.bridge} -j MASQUERADE`,
  );

  // What is to keep its source leaves the chain at its head, whatever comes
  // behind. One command for all: iptables rewrites the whole table each time.
  const ranges = peers.map(({ podCIDR }) => podCIDR.text).filter((range) => {
    const rule = `iptables -t nat -A ${nat} -d ${range} -j RETURN`;
    return flags["dry-run"] || there.has(rule) === flags.delete;
  });
  if (ranges.length && (flags["keep-source"] || flags.delete)) {
    const line = `iptables -t nat -I ${nat} -d ${ranges} -j RETURN`;
    masquerade.unshift({ line, isThere: flags.delete });
  }

  const steps = { ip_forward, forward, routes, masquerade };
  const all = Object.entries(steps).flatMap(([step, commands]) =>
    flags.only.includes(step) ? commands : []
  );
  return flags.delete ? all.reverse() : all;
}

/** The command for the route to a peer's pods. */
function routeTo({ ip, podCIDR, dev }: Peer): string {
  return `ip route add ${podCIDR.text} via ${ip}${dev ? ` dev ${dev}` : ""}`;
}

/** The command that takes back what a command did. */
function opposite(command: string): string {
  return command.split(" ").map((word) => OPPOSITE[word] ?? word).join(" ");
}

/** Learns all there is to know, checks it, and only then changes the node. */
async function main(args: string[]): Promise<void> {
  const flags = readFlags(args);
  if (flags.help) return console.log(HELP);
  if (!flags["dry-run"] && Deno.uid() !== 0) {
    fail(1, "Only root may change rules and routes", "use sudo, or --dry-run");
  }
  const addresses = Deno.networkInterfaces()
    .filter(({ family }) => family === "IPv4");
  const names = [Deno.hostname(), ...addresses.map(({ address }) => address)];
  const nodes = flags.nodes
    ? readNodes(await readJSON(flags.nodes, "kubectl prints it"), names)
    : undefined;
  for (const name of nodes?.skipped ?? []) {
    console.error(`Skipped node "${name}": no podCIDR or no IPv4 InternalIP`);
  }
  const own = await ownPodCIDR(flags, nodes?.own.podCIDR);
  const given = flags.peer.map((text) => parsePeer(text, own));
  const peers = [...nodes?.peers ?? [], ...given];

  const routes = await list(...LISTINGS[0]);
  if (flags.delete) {
    for (const peer of peers) {
      const route = routes.find((it) => it.startsWith(`${routeTo(peer)} dev `));
      peer.dev = flags.dev ?? route?.split(" ")[7];
    }
  } else if (peers.length) {
    await checkPeers(own, peers, addresses, routes, flags.dev);
  }
  const there = flags["dry-run"] ? new Set<string>() : await look();
  const { errors, changed, rest } = await apply(own.text, peers, flags, there);
  if (flags["dry-run"]) return;
  if (errors.length && !flags.delete) {
    console.log("# Failed; what was added is taken back");
    const added = (await look()).difference(there);
    const back = await apply(
      own.text,
      peers,
      { ...flags, delete: true },
      added,
    );
    errors.push(...back.errors);
  }
  if (errors.length) fail(1, errors.join("\n"));
  if (flags.delete) {
    return console.log(`# ${changed} taken back, ${rest} not there`);
  }
  console.log(`# ${changed} new, ${rest} there already`);
  warnOfDrop(await list("iptables -S"), own, flags.bridge);
}

/** Reads the flags; throws with 2 what can't be meant. */
function readFlags(args: string[]) {
  // parseArgs takes a lone - for a flag, not for the value of --nodes.
  const at = args.indexOf("-");
  const words = at > 0 ? args.toSpliced(at - 1, 2, `${args[at - 1]}=-`) : args;
  const flags = parseArgs(words, {
    string: ["peer", "nodes", "podcidr", "conf", "bridge", "dev", "only"],
    boolean: ["keep-source", "delete", "dry-run", "help"],
    collect: ["peer", "only"],
    default: { conf: "/etc/cni/net.d/10-custom-cni.conf", bridge: "cni0" },
    unknown: (arg) => fail(2, `Unknown argument "${arg}"`, "see --help"),
  });
  for (const [name, value] of Object.entries(flags)) {
    if ([value].flat().includes("")) fail(2, `--${name} needs a value`);
  }
  const bad = flags.only.find((step) => !STEPS.includes(step));
  if (bad) fail(2, `--only "${bad}" is no step`, `use ${STEPS.join(", ")}`);
  const only = flags.only.length ? flags.only : [...STEPS];
  if (!flags.delete) only.push("ip_forward"); // others may have come to need it
  const peer = [...new Set(flags.peer)];
  const needsPeer = only.includes("routes") || flags["keep-source"];
  if (needsPeer && !peer.length && !flags.nodes && !flags.help) {
    fail(2, "No other node is named", "use --peer or --nodes, see --help");
  }
  if (!/^[^-\s][^\s/]{0,14}$/.test(flags.bridge)) {
    fail(1, `--bridge "${flags.bridge}" is no name of a device`);
  }
  return { ...flags, peer, only };
}

/** Finds this node, its peers and the useless in the output of kubectl. */
export function readNodes(
  list: { items?: KubeNode[] } | null,
  ownNames: string[],
) {
  if (!Array.isArray(list?.items)) {
    fail(1, "--nodes has no items", "kubectl get nodes -o json prints them");
  }
  const own: { name: string; podCIDR?: string }[] = [];
  const peers: Peer[] = [];
  const skipped: string[] = [];
  for (const { metadata, spec, status } of list.items) {
    const { name = "" } = metadata ?? {};
    const { podCIDR } = spec ?? {};
    const { addresses = [] } = status ?? {};
    const names = [name, ...addresses.map(({ address }) => address)];
    const ip = addresses.find(({ type, address }) =>
      type === "InternalIP" && isIPv4(address)
    )?.address;
    if (names.some((name) => ownNames.includes(name))) {
      own.push({ name, podCIDR });
    } else if (ip && podCIDR) {
      peers.push({ ip, podCIDR: parsePodCIDR(podCIDR) });
    } else skipped.push(name);
  }
  if (own.length !== 1) {
    const found = own.map(({ name }) => `"${name}"`).join(" and ") || "none";
    const mend = `its names are ${ownNames.join(", ")}`;
    fail(1, `Just one of --nodes must be this node, not ${found}`, mend);
  }
  return { own: own[0], peers, skipped };
}

/** The range of this node's pods: of the flag or the conf, and of kubectl. */
async function ownPodCIDR(flags: Flags, listed?: string): Promise<PodCIDR> {
  const isEnough = flags.podcidr || listed && !existsSync(flags.conf);
  const mend = "write it, or use --podcidr";
  const conf = isEnough ? flags : await readJSON(flags.conf, mend);
  const podcidr = conf?.podcidr ?? listed;
  if (listed && podcidr !== listed) {
    const message = `podcidr "${podcidr}" is not the "${listed}" of --nodes`;
    fail(1, message, `the other nodes send here what is for ${listed}`);
  }
  return parsePodCIDR(podcidr);
}

/** Reads the "10.0.2.14" or "10.0.2.14=10.240.1.0/24" of --peer. */
export function parsePeer(text: string, own: PodCIDR): Peer {
  const [ip, ...rest] = text.split("=");
  if (!isIPv4(ip)) fail(1, `--peer "${text}" is no IPv4 address`, "IP[=CIDR]");
  const other = PAIR.includes(own.text)
    ? PAIR.find((range) => range !== own.text)
    : undefined;
  const range = rest.length ? rest.join("=") : other;
  if (range === undefined) {
    const message = `--peer "${text}" names no CIDR`;
    const mend = `only ${PAIR.join(" and ")} know each other`;
    fail(1, message, `write --peer ${text}=CIDR; ${mend}`);
  }
  return { ip, podCIDR: parsePodCIDR(range) };
}

/** Refuses peers that can't be, and learns the device to each of the others. */
async function checkPeers(
  own: PodCIDR,
  peers: Peer[],
  addresses: Deno.NetworkInterfaceInfo[],
  routes: string[],
  dev?: string,
): Promise<void> {
  // In this order a range that reaches into others reaches into the next one.
  peers.sort((a, b) => a.podCIDR.network - b.podCIDR.network);
  const via = dev ? ` oif ${dev}` : "";
  const lines = peers.map(({ ip }) => `route get ${ip}${via}`).join("\n");
  const { stdout, stderr } = await run("ip -json -batch -", lines);
  const ways = stdout.split("\n");
  for (const [i, peer] of peers.entries()) {
    const { ip, podCIDR: { text } } = peer;
    const refuse = (message: string, mend: string) =>
      fail(1, `Peer "${ip}" ${message}`, mend);
    if (!ways[i]) refuse("can't be reached", stderr);
    const [{ type, gateway, dev }] = JSON.parse(ways[i]);
    if (type === "local") refuse("is this node", "name the other ones");
    if (type) refuse(`is a ${type} address`, "name a node");
    // The kernel takes only a neighbour for the next hop of a route.
    if (gateway) refuse("is no neighbour", `${gateway} is on the way to it`);
    if (overlaps(own, `${ip}/32`)) refuse("is a pod", "name its node");
    const ranges = addresses.map(({ cidr }) => cidr);
    ranges.push(own.text, peers[i - 1]?.podCIDR.text ?? own.text);
    const taken = ranges.find((range) => overlaps(peer.podCIDR, range));
    if (taken) refuse(`can't have "${text}"`, `that overlaps ${taken}`);
    peer.dev = dev;
    const other = routes.find((route) =>
      route.includes(` ${text}`) && route !== routeTo(peer)
    );
    if (other) {
      refuse(`can't have "${text}"`, `there is a route: ${opposite(other)}`);
    }
  }
}

/** Runs what is missing, or with --delete takes back what is there. */
async function apply(
  own: string,
  peers: Peer[],
  flags: Flags,
  there: Set<string>,
) {
  const commands = plan(own, peers, flags, there);
  const todo = commands
    .filter(({ isThere }) => flags["dry-run"] || isThere === flags.delete)
    .map(({ line }) => flags.delete ? opposite(line) : line);
  // The routes to a thousand nodes are one process.
  const ip = flags.delete ? "ip -force -batch -" : "ip -batch -";
  const batches = Map.groupBy(todo, (it) => it.startsWith("ip ") ? ip : it);
  const errors: string[] = [];
  for (const [command, lines] of batches) {
    for (const line of lines) console.log(line);
    if (flags["dry-run"]) continue;
    const input = lines.map((line) => line.replace("ip ", "")).join("\n");
    const { code, stderr } = await run(command, input);
    const failed = Number(/failed -:(\d+)/.exec(stderr)?.[1] ?? 1);
    if (code) errors.push(`${lines[failed - 1]}: ${stderr}`);
    if (code && !flags.delete) break;
  }
  return { errors, changed: todo.length, rest: commands.length - todo.length };
}

/** What there is, each as the command that makes it. */
async function look(): Promise<Set<string>> {
  const lists = [];
  for (const [command, prefix] of LISTINGS) {
    lists.push(...await list(command, prefix));
  }
  return new Set(lists);
}

/** What a command lists, each line as the command that makes it. */
async function list(command: string, prefix = ""): Promise<string[]> {
  const { code, stdout, stderr } = await run(command);
  if (code) fail(1, `Cannot look at the node with "${command}"`, stderr);
  // A route tells the state of its link too, and sysctl wants no blanks.
  return stdout.split("\n").map((line) =>
    prefix + line.replace(/( dead| linkdown)+/, "").replace(" = ", "=").trim()
  );
}

/** Says which rule drops the pods' packets, if one in front of ours does. */
function warnOfDrop(rules: string[], own: PodCIDR, bridge: string): void {
  const chain = { "-A": "FORWARD" };
  const leaving = verdict(rules, { ...chain, "-s": own, "-i": bridge });
  const coming = verdict(rules, { ...chain, "-d": own, "-o": bridge });
  for (const rule of new Set([leaving, coming])) {
    if (rule && !/ -j ACCEPT/.test(rule)) {
      console.error(`Warning: this rule drops pods' packets: iptables ${rule}`);
    }
  }
}

/**
 * The rule that decides on a packet, which is given as the options that match
 * it. Rules that ask for more (-p, -m) are for a part of the packets only.
 */
export function verdict(
  rules: string[],
  packet: Record<string, string | PodCIDR>,
): string | undefined {
  const fits = ([, not, option, value]: string[]) => {
    const ours = packet[option];
    const same = typeof ours === "object"
      ? overlaps(ours, value)
      : ours === value;
    return ours && same !== Boolean(not);
  };
  for (const rule of rules) {
    const bare = rule.replace(/ -m comment --comment ("(\\.|[^"])*"|\S+)/, "");
    const [match, target] = bare.split(/ -[jg] (\S+)/);
    const options = match.matchAll(/(! )?(-\S+) (\S+)/g);
    if (!target || !options.every(fits)) continue;
    if (/^(ACCEPT|DROP|REJECT)$/.test(target)) return rule;
    if (target === "RETURN") return;
    const found = verdict(rules, { ...packet, "-A": target });
    if (found) return found;
  }
}

// deno-lint-ignore no-explicit-any -- whoever asks for it knows its keys
async function readJSON(path: string, mend: string): Promise<any> {
  try {
    const { readable } = path === "-" ? Deno.stdin : await Deno.open(path);
    return await new Response(readable).json();
  } catch (error) {
    return fail(1, `Cannot read "${path}"`, `${mend}; ${error}`);
  }
}

/** Runs a command, and tells how it ended and what it wrote. */
async function run(command: string, input = "") {
  const [program, ...args] = command.split(" ");
  // kube-proxy and Docker write to the tables too: wait for their lock.
  if (program === "iptables") args.unshift("-w");
  const piped = { stdin: "piped", stdout: "piped", stderr: "piped" } as const;
  let child: Deno.ChildProcess;
  try {
    child = new Deno.Command(program, { args, ...piped }).spawn();
  } catch {
    return fail(1, `"${program}" is not on the PATH`, "install it first");
  }
  const sent = new Blob([input]).stream().pipeTo(child.stdin).catch(() => {});
  const { code, stdout, stderr } = await child.output();
  await sent;
  const [out, err] = [stdout, stderr].map((it) => new TextDecoder().decode(it));
  return { code, stdout: out.trim(), stderr: err.trim() };
}

if (import.meta.main) {
  try {
    await main(Deno.args);
  } catch (error) {
    if (!(error instanceof CNIError)) throw error;
    const { code, message, details } = error;
    console.error(`Error: ${message}${details && `\n  ${details}`}`);
    Deno.exit(code === 2 ? 2 : 1);
  }
}
