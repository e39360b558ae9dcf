/**
 * node-setup: the commands that the tutorial types once on each node, so that
 * pods reach each other, the pods of other nodes, and the internet. A run
 * prints and does those that are missing; --check tells what is wrong.
 *
 * @module
 */
import { parseArgs } from "@std/cli/parse-args";
import { expandGlobSync } from "@std/fs/expand-glob";
import { isIPv4 } from "node:net";
import * as plugin from "./custom-cni.ts";
import * as ipam from "./ipam.ts";
import { CNIError, fail, type PodCIDR } from "./ipam.ts";

/** The tutorial's commands, in its order. */
function commandsFor({ podCIDR, peers, keepsSource }: Setup): Command[] {
  const own = podCIDR.text;
  const nat = (how: string) => `iptables -t nat ${how} POSTROUTING -s ${own}`;
  const kept = keepsSource ? peers : [];
  return [
    command("always", "sysctl -w net.ipv4.ip_forward=1"),
    // Same host: what cni0 bridges has to pass FORWARD, and Docker drops all.
    command("bridged", "modprobe br_netfilter"),
    command("bridged", "sysctl -w net.bridge.bridge-nf-call-iptables=1"),
    command("forward", `iptables -A FORWARD -s ${own} -j ACCEPT`),
    command("forward", `iptables -A FORWARD -d ${own} -j ACCEPT`),
    // Other hosts: the network between the nodes knows of no pods.
    ...peers.map(({ podCIDR, hop }) =>
      command("routes", `ip route add ${podCIDR.text} via ${hop}`)
    ),
    // Internet: answers find the node, not the pod. On cni0 they find the pod.
    ...kept.map(({ podCIDR }) =>
      command("kept", `${nat("-I")} -d ${podCIDR.text} -j RETURN`)
    ),
    command("masquerade", `${nat("-A")} ! -o cni0 -j MASQUERADE`),
  ];
}

/** What is the matter where a step's commands were not run. */
const WITHOUT = {
  always: "The node forwards no packets: pods reach no other network",
  bridged: "Bridged packets bypass iptables: a Service is dead on its own node",
  forward: "FORWARD lacks a rule for the pods",
  routes: "A peer's pods have no route",
  kept: "A peer's pods see the node's address in place of a pod's",
  masquerade: "Out there nobody can answer a pod's address",
};

/** A command of the tutorial, and what is the matter without it. */
interface Command {
  step: keyof typeof WITHOUT;
  line: string;
  without: string;
}

function command(step: keyof typeof WITHOUT, line: string): Command {
  return { step, line, without: WITHOUT[step] };
}

/** Another node, whose pods are reached through its address. */
interface Peer {
  ip: string;
  /** The next hop of the route: "10.0.2.14 dev enp0s3". */
  hop: string;
  dev?: string;
  podCIDR: PodCIDR;
}

const HELP = `Usage: deno run -A node-setup.ts --peer IP[=CIDR] [options]
The rules and routes that pods need; as root, on each node. Twice is once.

  --peer IP[=CIDR]  each other node; =CIDR is known of the tutorial's two nodes
  --nodes FILE      in place of it: kubectl get nodes -o json; - is stdin
  --check           start two pods for a moment, and tell what is wrong
  --conf FILE       the conf, else the first one in /etc/cni/net.d
  --keep-source     peers' pods see a pod's own address, until --delete
  --only STEP       forward, routes or masquerade alone; may be repeated
  --delete          take back what a run with the same flags makes, but sysctl's
  --dry-run         print all commands and run none; with --check start no pods
  --help            print this

Exit status: 0 well, 1 failed with nothing added or not well, 2 wrong usage`;

/** The steps that each --only stands for. */
const STEPS: Record<string, string[]> = {
  forward: ["bridged", "forward"],
  routes: ["routes"],
  masquerade: ["kept", "masquerade"],
};

/** Those of some steps; packets are forwarded for each. */
function commandsOf(setup: Setup, only: string[]): Command[] {
  const steps = ["always", ...only.flatMap((name) => STEPS[name])];
  return commandsFor(setup).filter(({ step }) => steps.includes(step));
}

type Flags = ReturnType<typeof readFlags>;

/** Reads the flags, learns what they stand for, and does it. */
async function main(args: string[]): Promise<void> {
  const flags = readFlags(args);
  if (flags.help) return console.log(HELP);
  const isDry = flags["dry-run"];
  if (Deno.uid() !== 0 && (flags.check || !isDry)) {
    fail(1, "Only root may look at a node and change it", "sudo, or --dry-run");
  }
  if (flags.check) return await check(flags);
  const setup = await learn(flags);
  const lines = commandsOf(setup, flags.only).map(({ line }) => line);
  if (flags.delete) return await takeBack(lines, isDry);
  if (isDry) return print(lines);
  await runMissing(lines);
}

/** Runs the commands that are missing. If one fails, nothing was added. */
async function runMissing(lines: string[]): Promise<void> {
  const there = await whatIsThere();
  const missing = lines.filter((line) => !isThere(line, there));
  const errors = await runAll(missing);
  if (errors.length > 0) {
    console.log("# Failed; what was added is taken back");
    const now = await whatIsThere();
    const added = missing.filter((line) => now.includes(line));
    const back = added.reverse().map(opposite);
    errors.push(...await runAll(back, { goesOn: true }));
    fail(1, errors.join("\n"));
  }
  console.log(
    `# ${missing.length} new, ${lines.length - missing.length} there already`,
  );
}

/** Takes back what is there, but sysctl's: others may need it by now. */
async function takeBack(lines: string[], isDry: boolean): Promise<void> {
  const ours = lines.filter((line) => !/^(sysctl|modprobe)/.test(line));
  const there = isDry ? ours : await whatIsThere();
  const found = ours.filter((line) => there.includes(line));
  const back = found.reverse().map(opposite);
  if (isDry) return print(back);
  const errors = await runAll(back, { goesOn: true });
  if (errors.length > 0) fail(1, errors.join("\n"));
  // What --keep-source made is taken back also where nobody asked for it.
  const missing = ours.filter((line) => !there.includes(line) && !isKept(line));
  console.log(`# ${back.length} taken back, ${missing.length} not there`);
}

/** Others may keep the same route, with words of their own behind it. */
function isThere(line: string, there: string[]): boolean {
  return there.some((it) => it === line || it.startsWith(`${line} `));
}

/** The command that takes back what a command did. */
function opposite(line: string): string {
  return line.replace(/ -[AI] /, " -D ").replace(" add ", " del ")
    .replace(/=1$/, "=0");
}

/** What there is on the node, each as the command that makes it. */
async function whatIsThere(): Promise<string[]> {
  const look = `set -eo pipefail
    ip -oneline route show |
      sed -E "s/ (dead|linkdown)\\b//g; s/ *$//; s/^/ip route add /"
    sysctl -e net.ipv4.ip_forward net.bridge.bridge-nf-call-iptables |
      sed "s/ = /=/; s/^/sysctl -w /; /bridge-nf/i modprobe br_netfilter"
    iptables -w -S FORWARD |
      sed "s/^/iptables /"
    iptables -w -t nat -S POSTROUTING |
      sed "s/^/iptables -t nat /; / -j RETURN$/s/ -A / -I /"`;
  const { code, stdout, stderr } = await run(["bash", "-c", look]);
  if (code !== 0) fail(1, "Cannot look at the node", stderr);
  if (stderr) console.error(stderr);
  return stdout.split("\n");
}

/** Prints and runs commands, and returns what failed. It stops at that. */
async function runAll(
  lines: string[],
  { goesOn = false } = {},
): Promise<string[]> {
  const routes = lines.filter((line) => line.startsWith("ip "));
  const errors: string[] = [];
  for (const line of joinKept(lines)) {
    if (errors.length > 0 && !goesOn) break;
    if (line === routes[0]) {
      errors.push(...await runRoutes(routes));
    } else if (!routes.includes(line)) {
      errors.push(...await runOne(line));
    }
  }
  return errors;
}

/** All routes by one `ip`, for there may be a thousand. */
async function runRoutes(routes: string[]): Promise<string[]> {
  print(routes);
  const input = routes.map((line) => line.replace(/^ip /, "")).join("\n");
  const ip = ["ip", "-force", "-batch", "-"];
  const { code, stderr } = await run(ip, input);
  if (code === 0) return [];
  const [, number = "1"] = /failed -:(\d+)/.exec(stderr) ?? [];
  return [`${routes[Number(number) - 1]}: ${stderr}`];
}

async function runOne(line: string): Promise<string[]> {
  print([line]);
  const [program, ...args] = line.split(" ");
  // kube-proxy and Docker write to the tables too: wait for their lock.
  if (program === "iptables") args.unshift("-w");
  const { code, stderr } = await run([program, ...args])
    .catch(({ message }) => ({ code: 1, stderr: message }));
  if (code === 0 && !stderr) return [];
  const complaint = `${line}: ${stderr}`;
  // The rest works without bridged packets, and not every kernel has them.
  const isNeeded = !/br_netfilter|bridge-nf/.test(line);
  if (code !== 0 && isNeeded) return [complaint];
  console.error(`Warning: ${complaint}`);
  return [];
}

const isKept = (line: string) => line.endsWith("-j RETURN");

/** One iptables for all peers, since each one writes the whole table anew. */
function joinKept(lines: string[]): string[] {
  const [first, ...others] = lines.filter(isKept);
  const ranges = lines.filter(isKept).map((line) => / -d (\S+)/.exec(line)![1]);
  const joined = first?.replace(/ -d \S+/, ` -d ${ranges}`);
  return lines.filter((line) => !others.includes(line))
    .map((line) => line === first ? joined : line);
}

function print(lines: string[]): void {
  for (const line of lines) console.log(line);
}

/** What is known before anything is done. */
interface Setup {
  /** The range of this node's pods, and the conf that says so. */
  podCIDR: PodCIDR;
  conf: plugin.Conf;
  peers: Peer[];
  keepsSource: boolean;
}

/** A node that is to be a peer, if it can: by --peer, or by --nodes. */
interface Candidate {
  /** Its name in the list of --nodes. */
  name?: string;
  ips: string[];
  range?: string;
}

/** Learns the range of this node's pods, and its peers. */
async function learn(flags: Flags): Promise<Setup> {
  const list = flags.nodes ? await readNodes(flags.nodes) : undefined;
  const conf = await readConf(flags.conf, list?.range);
  const podCIDR = ipam.parsePodCIDR(conf.podcidr);
  if (list?.range && list.range !== podCIDR.text) {
    const what =
      `podcidr "${podCIDR.text}" is not the "${list.range}" of --nodes`;
    fail(1, what, "mend one of the two");
  }
  const candidates = [
    ...list?.others ?? [],
    ...flags.peer.map((text) => parsePeer(text, podCIDR)),
  ];
  const ways = await waysTo(candidates.flatMap(({ ips }) => ips));
  const peers: Peer[] = [];
  for (const candidate of candidates) {
    try {
      const peer = choosePeer(candidate, ways);
      if (!flags.delete) checkPeer(peer, podCIDR, peers);
      peers.push(peer);
    } catch (error) {
      // What can't be used of a list stops nobody else; what was named, does.
      if (!candidate.name || !(error instanceof CNIError)) throw error;
      const why = `${error.message}; ${error.details}`;
      console.error(`Skipped node "${candidate.name}": ${why}`);
    }
  }
  const keepsSource = flags["keep-source"] || flags.delete;
  return { podCIDR, conf, peers, keepsSource };
}

/** Runs a program, for half a minute at most. */
function run(command: string[], input?: string) {
  return plugin.run(command, input, AbortSignal.timeout(30_000));
}

/** How the kernel reaches an address; see `ip route get`. */
interface Reach {
  dst: string;
  dev: string;
  /** "local", "broadcast" and the like, if it is no host's. */
  type?: string;
  /** The next hop, if it is no neighbour. */
  gateway?: string;
}

/** Asks the kernel for the way to each address; some it may refuse. */
async function waysTo(ips: string[]): Promise<Map<string, Reach>> {
  if (ips.length === 0) return new Map();
  const lines = ips.map((ip) => `route get ${ip}`);
  const ways: Reach[] = await plugin.ip(lines.join("\n"), "-force");
  return new Map(ways.map((way) => [way.dst, way]));
}

/** The address of a candidate that can be the next hop of a route. */
function choosePeer(candidate: Candidate, ways: Map<string, Reach>): Peer {
  const { name, ips, range } = candidate;
  const podCIDR = ipam.parsePodCIDR(range ?? fail(1, "No IPv4 podCIDR"));
  const [first = fail(1, "No IPv4 InternalIP")] = ips;
  // What --peer names, the kernel takes or refuses. Of a list's node it can be
  // one address of several, and the kernel wants a neighbour.
  const whyNot = (ip: string) => {
    const way = ways.get(ip);
    if (!way) return "can't be reached";
    if (way.type === "local") return "is this node";
    if (way.type) return `is a ${way.type} address`;
    if (way.gateway) return `is no neighbour, ${way.gateway} is on the way`;
  };
  const neighbour = ips.find((ip) => !whyNot(ip));
  if (name && !neighbour) {
    fail(1, `Address ${first} ${whyNot(first)}`, `see: ip route get ${first}`);
  }
  const ip = neighbour ?? first;
  const dev = ways.get(ip)?.dev;
  return { ip, hop: dev ? `${ip} dev ${dev}` : ip, dev, podCIDR };
}

/** Refuses what the kernel would take: a range that is somebody's already. */
function checkPeer(
  { ip, dev, podCIDR }: Peer,
  own: PodCIDR,
  others: Peer[],
): void {
  if (dev === "lo") {
    fail(1, `Peer "${ip}" is this node`, "name the other ones");
  }
  if (ipam.overlaps(own, `${ip}/32`)) {
    fail(1, `Peer "${ip}" is a pod`, "name its node");
  }
  if (others.some((other) => other.ip === ip)) {
    fail(1, `Peer "${ip}" is another node's too`, "mend one of the two");
  }
  // What cni0 has beside this range, --check and ADD tell.
  const links = Deno.networkInterfaces()
    .filter(({ family, name }) => family === "IPv4" && name !== "cni0");
  const taken = [
    own.text,
    ...others.map((other) => other.podCIDR.text),
    ...links.map((link) => link.cidr),
  ].find((range) => ipam.overlaps(podCIDR, range));
  if (taken) {
    const what = `Peer "${ip}" can't have "${podCIDR.text}"`;
    fail(1, what, `that overlaps ${taken}`);
  }
}

/** Reads the "10.0.2.14" or "10.0.2.14=10.240.1.0/24" of --peer. */
function parsePeer(text: string, own: PodCIDR): Candidate {
  const [ip, range] = text.split("=");
  if (!isIPv4(ip)) fail(1, `--peer "${text}" is no IPv4 address`, "IP[=CIDR]");
  if (range !== undefined) return { ips: [ip], range };
  // The tutorial's two nodes.
  const pair = ["10.240.0.0/24", "10.240.1.0/24"];
  if (!pair.includes(own.text)) {
    const mend = `write --peer ${text}=CIDR; only ${pair} know each other`;
    fail(1, `--peer "${text}" names no CIDR`, mend);
  }
  return { ips: [ip], range: pair.find((it) => it !== own.text) };
}

/** Finds this node's range and the other nodes in the output of kubectl. */
async function readNodes(path: string) {
  const list = await readJSON(path, "see: kubectl get nodes -o json");
  const items: plugin.Any[] = list.kind === "Node" ? [list] : list.items;
  if (!Array.isArray(items)) fail(1, "--nodes has no items", "see --help");
  const nodes = items.filter(({ kind = "Node" }) => kind === "Node").map(
    readNode,
  );
  // The name is one node's only. An address may be on every machine.
  const mine = Deno.networkInterfaces().map(({ address }) => address);
  const hostname = Deno.hostname().toLowerCase();
  let found = nodes.filter(({ name }) => name === hostname);
  if (found.length === 0) {
    found = nodes.filter((node) => node.known.some((it) => mine.includes(it)));
  }
  if (found.length !== 1) {
    const which = found.map(({ name }) => `"${name}"`).join(" and ") || "none";
    const names = [hostname, ...mine].join(", ");
    fail(
      1,
      `Just one of --nodes must be this node, not ${which}`,
      `its names are ${names}`,
    );
  }
  const [own] = found;
  return { range: own.range, others: nodes.filter((node) => node !== own) };
}

/** What is of use here in a node, as Kubernetes describes it. */
function readNode(node: plugin.Any) {
  const { metadata = {}, spec = {}, status = {} } = node;
  const addresses: plugin.Any[] = status.addresses ?? [];
  const internal = addresses.filter(({ type }) => type === "InternalIP");
  const ranges: string[] = [...spec.podCIDRs ?? [], spec.podCIDR];
  return {
    name: `${metadata.name}`,
    known: addresses.map(({ address }) => address),
    ips: internal.map(({ address }) => address).filter(isIPv4),
    range: ranges.find((range) => range && !range.includes(":")),
  };
}

/**
 * What the conf says to custom-cni: the given file, or as for a runtime the
 * first one by name.
 */
async function readConf(given?: string, range?: string): Promise<plugin.Conf> {
  const files = expandGlobSync("/etc/cni/net.d/*.{conf,conflist,json}");
  const [first] = Array.from(files, (it) => it.path).sort();
  const path = given ?? first;
  if (!path && range) return { podcidr: range } as plugin.Conf;
  if (!path) {
    const mend = "cp 10-custom-cni.conf /etc/cni/net.d/ # and set its podcidr";
    fail(1, 'No conf in /etc/cni/net.d ("cni plugin not initialized")', mend);
  }
  const file = await readJSON(path, `vi ${path}`);
  // A list's name and version are those of its plugins.
  const { name, cniVersion, plugins } = file;
  const isList = path.endsWith(".conflist");
  const all: plugin.Any[] = isList ? [plugins ?? []].flat() : [file];
  const ours = all.find((it) => it?.type === "custom-cni");
  if (ours) return { ...ours, name, cniVersion };
  if (given) return file;
  return fail(
    1,
    `${path} comes first, and is not for custom-cni`,
    `mv ${path} /root/`,
  );
}

/** Reads a file as a JSON object. */
async function readJSON(path: string, mend: string): Promise<plugin.Any> {
  try {
    return plugin.parseConf(await Deno.readTextFile(path));
  } catch (error) {
    return fail(1, `Cannot read "${path}"`, `${mend}; ${error}`);
  }
}

/** Reads the flags. @throws {CNIError} 2 for what can't be meant. */
function readFlags(args: string[]) {
  // parseArgs takes a lone - for a flag, not for the value of --nodes.
  const words = args.map((arg) => arg.replace(/(^|=)-$/, "$1/dev/stdin"));
  const flags = parseArgs(words, {
    string: ["peer", "nodes", "conf", "only"],
    boolean: ["keep-source", "check", "delete", "dry-run", "help"],
    collect: ["peer", "only"],
    unknown: (arg) => fail(2, `Unknown argument "${arg}"`, "see --help"),
  });
  const { peer, only, nodes, conf } = flags;
  for (const [name, values] of Object.entries({ peer, only, nodes, conf })) {
    if ([values].flat().includes("")) fail(2, `--${name} needs a value`);
  }
  for (const step of only) {
    if (!STEPS[step]) {
      fail(2, `--only "${step}" is no step`, `use ${Object.keys(STEPS)}`);
    }
  }
  const steps = only.length > 0 ? only : Object.keys(STEPS);
  const needsPeer = steps.includes("routes") || flags["keep-source"];
  const hasPeer = peer.length > 0 || nodes || flags.help || flags.check;
  if (needsPeer && !hasPeer) fail(2, "No peer is named", "--peer or --nodes");
  return { ...flags, only: steps, peer: [...new Set(peer)] };
}

/** What is wrong, and the commands that mend it or that show more. */
interface Trouble {
  what: string;
  commands: string[];
}

/** Tells what is well on this node and what is not, and changes nothing. */
async function check(flags: Flags): Promise<void> {
  let setup: Setup;
  try {
    setup = await learn(flags);
  } catch (error) {
    return tell("", [troubleOf(error)]);
  }
  const there = await whatIsThere();
  const missing = commandsOf(setup, flags.only)
    .filter(({ line }) => !isThere(line, there))
    .map(({ without, line }) => ({ what: without, commands: [line] }));
  tell("All rules and routes are there", missing);
  tell("cni0 is well", await lookAtBridge(setup));
  tell("The pods' host veths are well", await lookAtVeths(setup));
  tell("Pods' packets fit through the NIC", await lookAtMTU(setup));
  if (flags["dry-run"]) {
    console.log(
      "     No pod was started to see whether packets pass: --dry-run",
    );
  } else {
    await tryWithPods(setup);
  }
}

/** What a CNIError says; any other is a fault of this program. */
function troubleOf(error: unknown): Trouble {
  if (!(error instanceof CNIError)) throw error;
  return { what: error.message, commands: [error.details] };
}

/** Prints that all is well, or each trouble. */
function tell(ok: string, troubles: Trouble[]): void {
  if (troubles.length === 0) console.log(`ok   ${ok}`);
  for (const { what, commands } of troubles) {
    const lines = [`BAD  ${what}`, ...commands.filter(Boolean)];
    console.log(lines.join("\n     "));
    Deno.exitCode = 1;
  }
}

/** Is cni0 up, with the gateway's address, and do packets to pods go there? */
async function lookAtBridge({ podCIDR }: Setup): Promise<Trouble[]> {
  const gateway = ipam.address(podCIDR, 1);
  const cidr = `${gateway}/${podCIDR.prefix}`;
  try {
    const { bridge, hasRoute } = await plugin.lookAtNode(podCIDR);
    if (!bridge) return []; // the node had no pod yet
    if (!plugin.isUp(bridge)) {
      return [{ what: "cni0 is down", commands: ["ip link set cni0 up"] }];
    }
    if (!plugin.addressesOf(bridge).includes(cidr)) {
      const mend = `ip addr add ${cidr} dev cni0`;
      return [{ what: `cni0 lacks ${cidr}`, commands: [mend] }];
    }
    if (!hasRoute) {
      const mend = `ip route add ${podCIDR.text} dev cni0 src ${gateway}`;
      return [{ what: "The node has no route to its pods", commands: [mend] }];
    }
    if (bridge.linkinfo?.info_data?.stp_state) {
      const mend = "ip link set cni0 type bridge stp_state 0";
      return [{ what: "STP lets new pods wait 30 s", commands: [mend] }];
    }
    return [];
  } catch (error) {
    return [troubleOf(error)];
  }
}

/** Is each host veth on cni0, up, and does its name tell its number? */
async function lookAtVeths({ podCIDR }: Setup): Promise<Trouble[]> {
  const links: plugin.Link[] = await plugin.ip("link show");
  const troubles: Trouble[] = [];
  for (const link of links) {
    const { ifname, master } = link;
    const n = plugin.numberOf(link, podCIDR);
    if (!ipam.isForPod(podCIDR, n)) continue;
    const podIP = ipam.address(podCIDR, n);
    if (master !== "cni0") {
      const what = `${ifname} is not on cni0: the pod ${podIP} is cut off`;
      const onto = `ip link set ${ifname} master cni0 up`;
      const hairpin = `ip link set ${ifname} type bridge_slave hairpin on`;
      troubles.push({ what, commands: [onto, hairpin] });
    } else if (!plugin.isUp(link)) {
      const what = `${ifname} is down: the pod ${podIP} is cut off`;
      troubles.push({ what, commands: [`ip link set ${ifname} up`] });
    }
    if (ifname !== `veth${n}`) {
      const what = `${ifname} was veth${n}: another pod may get ${podIP} too`;
      const rename = `ip link set ${ifname} down name veth${n}`;
      troubles.push({ what, commands: [rename, `ip link set veth${n} up`] });
    }
  }
  return troubles;
}

/** Is there a device to others that takes less than pods send? */
async function lookAtMTU({ conf, peers }: Setup): Promise<Trouble[]> {
  const sent = conf.mtu ?? 1500;
  const routes = await plugin.ip("route show default");
  const devices = [...peers, ...routes].map(({ dev }) => dev);
  const links = await plugin.ip("link show");
  return links.filter((it) => devices.includes(it.ifname) && it.mtu < sent)
    .map(({ ifname, mtu }) => ({
      what: `Pods send ${sent} bytes at once, too many for ${ifname}`,
      commands: [
        `"mtu": ${mtu} # in the conf, for pods that start from then on`,
      ],
    }));
}

const BINARY = "/opt/cni/bin/custom-cni";

/** A pod of the check. */
interface Pod {
  name: string;
  address: string;
}

/** A way that packets must be able to go. */
interface Way {
  from: string;
  /** The words that run a command there. */
  enter: string[];
  to: string;
  address: string;
  /** The words that enter the one who is called, where that can be done. */
  called?: string[];
  /** What to look at if no answer comes. */
  commands: string[];
}

/** Starts two pods for a moment, as a kubelet would, and lets them call. */
async function tryWithPods(setup: Setup): Promise<void> {
  const names = [`check-${Deno.pid}-a`, `check-${Deno.pid}-b`];
  let isInterrupted = false;
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    // The check ends a moment later, when its pods have ended.
    Deno.addSignalListener(signal, () => isInterrupted = true);
  }
  try {
    const pods: Pod[] = [];
    for (const name of names) {
      pods.push(await startPod(name, setup.conf));
    }
    const ways = waysOf(setup, pods);
    // Some at a time, for there may be a thousand peers.
    while (ways.length > 0 && !isInterrupted) {
      const some = ways.splice(0, 50);
      const alive = await Promise.all(some.map(answers));
      if (!isInterrupted) some.forEach((way, i) => tellWay(way, alive[i]));
    }
  } catch (error) {
    if (!(error instanceof CNIError)) throw error;
    const what = `A pod gets no network: ${error.message}`;
    if (!isInterrupted) tell("", [{ what, commands: [error.details] }]);
  } finally {
    for (const name of names) await endPod(name, setup.conf);
  }
  if (isInterrupted) Deno.exit(130);
}

/** Makes a pod. @throws {CNIError} as ADD answers. */
async function startPod(name: string, conf: plugin.Conf): Promise<Pod> {
  // Not by `ip netns add`: where nobody has called that before, it mounts
  // /run/netns upon itself, and the runtime's namespaces are there twice.
  await Deno.writeTextFile(netnsOf(name), "");
  const made = await run(["unshare", `--net=${netnsOf(name)}`, "true"]);
  if (made.code !== 0) fail(1, "unshare makes no namespace", made.stderr);
  const { stdout, stderr } = await callPlugin("ADD", name, conf);
  if (!stdout.startsWith("{")) {
    const mend = `cp dist/custom-cni ${BINARY}.new; mv ${BINARY}.new ${BINARY}`;
    fail(1, `${BINARY} does not start: ${stderr}`, mend);
  }
  const { code, msg, details, ips } = JSON.parse(stdout);
  if (code) fail(code, msg, details);
  // A rule that rejects sends this, and it would look like an answer.
  const drop = "-p icmp --icmp-type destination-unreachable -j DROP".split(" ");
  await run([...inPod(name), "iptables", "-w", "-A", "INPUT", ...drop]);
  return { name, address: ips[0].address.split("/")[0] };
}

/** Ends a pod, whatever there is of it. */
async function endPod(name: string, conf: plugin.Conf): Promise<void> {
  const ends = [
    () => callPlugin("DEL", name, conf),
    () => run(["umount", netnsOf(name)]),
    () => Deno.remove(netnsOf(name)),
  ];
  for (const end of ends) {
    await end().catch(({ message }) => console.error(`Warning: ${message}`));
  }
}

/** Calls the plugin, as a container runtime does. */
async function callPlugin(verb: string, name: string, conf: plugin.Conf) {
  const variables = [
    `CNI_COMMAND=${verb}`,
    `CNI_CONTAINERID=${name}`,
    `CNI_NETNS=${netnsOf(name)}`,
    "CNI_IFNAME=eth0",
    "CNI_PATH=/opt/cni/bin",
  ];
  const stdin = JSON.stringify(conf);
  return await run(["env", ...variables, BINARY], stdin);
}

const netnsOf = (name: string) => `/run/${name}`;
const inPod = (name: string) => ["nsenter", `--net=${netnsOf(name)}`];

/** The ways that the tutorial promises, each with what can stand in it. */
function waysOf({ podCIDR, peers }: Setup, [a, b]: Pod[]): Way[] {
  const gateway = ipam.address(podCIDR, 1);
  const fromPod = { from: "A pod", enter: inPod(a.name) };
  const ways: Way[] = [{
    ...fromPod,
    to: `its gateway ${gateway}`,
    address: gateway,
    called: [],
    commands: [...firewall("INPUT"), "iptables -nvL OUTPUT"],
  }, {
    ...fromPod,
    to: "another pod of this node",
    address: b.address,
    called: inPod(b.name),
    commands: [...firewall("FORWARD"), "bridge -d link show"],
  }, {
    from: "The node",
    enter: [],
    to: "a pod",
    address: a.address,
    called: inPod(a.name),
    commands: [...firewall("OUTPUT"), `ip route get ${a.address}`],
  }];
  for (const peer of peers) {
    const itsGateway = ipam.address(peer.podCIDR, 1);
    const there = `on ${peer.ip}: deno run -A node-setup.ts --check`;
    const settings = "sysctl -a | grep -wE 'forwarding|rp_filter'";
    ways.push({
      ...fromPod,
      to: `the node ${peer.ip}`,
      address: peer.ip,
      commands: [
        ...firewall("FORWARD"),
        settings,
        `ip route get ${peer.ip}`,
        there,
      ],
    }, {
      ...fromPod,
      to: `${itsGateway}, which ${peer.ip} has from its first pod on`,
      address: itsGateway,
      commands: [
        ...firewall("FORWARD"),
        "ip rule",
        `ip route get ${itsGateway}`,
        there,
      ],
    });
  }
  return ways;
}

const firewall = (chain: string) => [
  `iptables -nvL ${chain}`,
  "nft list ruleset",
];

/** Calls a port where nobody listens: who gets the call refuses it. */
async function answers({ enter, address, called }: Way): Promise<boolean> {
  const before = called ? await countRefused(called) : 0;
  const call = `echo > /dev/tcp/${address}/9`;
  const words = [...enter, "timeout", "2", "bash", "-c", call];
  const { code, stderr } = await run(words);
  if (code !== 0 && !stderr.includes("refused")) return false;
  // A rule that rejects can refuse it as well, on the way there.
  return !called || await countRefused(called) > before;
}

/** How many calls a namespace has refused itself: see nstat(8). */
async function countRefused(enter: string[]): Promise<number> {
  const { stdout } = await run([...enter, "nstat", "-asz", "TcpOutRsts"]);
  return Number(/^TcpOutRsts +(\d+)/m.exec(stdout)?.[1]);
}

function tellWay({ from, to, commands }: Way, isAlive: boolean): void {
  const troubles = [{ what: `${from} does not reach ${to}`, commands }];
  tell(`${from} reaches ${to}`, isAlive ? [] : troubles);
}

if (import.meta.main) {
  try {
    await main(Deno.args);
  } catch (error) {
    if (!(error instanceof CNIError)) throw error;
    console.error(`Error: ${error.message}\n  ${error.details}`.trimEnd());
    Deno.exitCode = error.code === 2 ? 2 : 1;
  }
  Deno.exit(); // else it waits for half a minute: see run() of custom-cni.ts
}
