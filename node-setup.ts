/**
 * node-setup: the commands that you type once on each node in the tutorial, so
 * that pods reach each other, the pods of other nodes, and the internet. It
 * prints and runs those that are missing. --check reports what is wrong.
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
    // Same host: bridged packets pass FORWARD, where Docker drops everything.
    command("bridged", "modprobe br_netfilter"),
    command("bridged", "sysctl -w net.bridge.bridge-nf-call-iptables=1"),
    command("forward", `iptables -A FORWARD -s ${own} -j ACCEPT`),
    command("forward", `iptables -A FORWARD -d ${own} -j ACCEPT`),
    // Other hosts: the network between the nodes does not know the pods.
    ...peers.map(({ podCIDR, hop }) =>
      command("routes", `ip route add ${podCIDR.text} via ${hop}`)
    ),
    // Internet: only the node's address gets answers. On cni0 a pod's does too.
    ...kept.map(({ podCIDR }) =>
      command("kept", `${nat("-I")} -d ${podCIDR.text} -j RETURN`)
    ),
    command("masquerade", `${nat("-A")} ! -o cni0 -j MASQUERADE`),
  ];
}

/** What is wrong if a step's commands are missing. */
const WITHOUT = {
  always: "The node forwards no packets: pods reach no other network",
  bridged: "Bridged packets bypass iptables: a Service is dead on its own node",
  forward: "FORWARD lacks a rule for the pods",
  routes: "A peer's pods have no route",
  kept: "A peer's pods see the node's address instead of a pod's",
  masquerade: "Nobody on the internet can answer a pod's address",
};

/** A command of the tutorial, and what is wrong without it. */
interface Command {
  step: keyof typeof WITHOUT;
  line: string;
  without: string;
}

function command(step: keyof typeof WITHOUT, line: string): Command {
  return { step, line, without: WITHOUT[step] };
}

/** Another node. Its pods are behind its address. */
interface Peer {
  ip: string;
  /** The next hop of the route: "10.0.2.14 dev enp0s3". */
  hop: string;
  dev?: string;
  podCIDR: PodCIDR;
}

const HELP = `Usage: deno run -A node-setup.ts --peer IP[=CIDR] [options]
Adds the rules and routes that pods need. Run it as root on each node. A second
run adds only what is missing.

  --peer IP[=CIDR]  another node; the tutorial's two nodes need no =CIDR
  --nodes FILE      all nodes instead: kubectl get nodes -o json; - is stdin
  --check           start two pods for a moment, and report what is wrong
  --conf FILE       the conf; default: the first one in /etc/cni/net.d
  --keep-source     let peers' pods see a pod's own address, until --delete
  --only STEP       only forward, routes or masquerade; may be repeated
  --delete          remove what the same flags add, except sysctl settings
  --dry-run         print all commands and run none; with --check start no pods
  --help            print this

Exit status: 0 fine, 1 failed with nothing added, or problems, 2 wrong usage`;

/** The steps that each --only stands for. */
const STEPS: Record<string, string[]> = {
  forward: ["bridged", "forward"],
  routes: ["routes"],
  masquerade: ["kept", "masquerade"],
};

/** The commands of some steps. All steps need forwarding. */
function commandsOf(setup: Setup, only: string[]): Command[] {
  const steps = ["always", ...only.flatMap((name) => STEPS[name])];
  return commandsFor(setup).filter(({ step }) => steps.includes(step));
}

type Flags = ReturnType<typeof readFlags>;

/** Reads the flags and does what they ask. */
async function main(args: string[]): Promise<void> {
  const flags = readFlags(args);
  if (flags.help) return console.log(HELP);
  const isDry = flags["dry-run"];
  if (Deno.uid() !== 0 && (flags.check || !isDry)) {
    fail(1, "Only root may look at or change a node", "sudo, or --dry-run");
  }
  if (flags.check) return await check(flags);
  const setup = await learn(flags);
  const lines = commandsOf(setup, flags.only).map(({ line }) => line);
  if (flags.delete) return await undo(lines, isDry);
  if (isDry) return print(lines);
  await runMissing(lines);
}

/** Runs the missing commands. If one fails, it removes what others added. */
async function runMissing(lines: string[]): Promise<void> {
  const there = await whatIsThere();
  const missing = lines.filter((line) => !isThere(line, there));
  const errors = await runAll(missing);
  if (errors.length > 0) {
    console.log("# Failed; removing what was added");
    const now = await whatIsThere();
    const added = missing.filter((line) => now.includes(line));
    const back = added.reverse().map(opposite);
    errors.push(...await runAll(back, { goesOn: true }));
    fail(1, errors.join("\n"));
  }
  console.log(
    `# ${missing.length} new, ${lines.length - missing.length} already there`,
  );
}

/** Removes what is there, except settings, which others may need by now. */
async function undo(lines: string[], isDry: boolean): Promise<void> {
  const ours = lines.filter((line) => !/^(sysctl|modprobe)/.test(line));
  const there = isDry ? ours : await whatIsThere();
  const found = ours.filter((line) => there.includes(line));
  const back = found.reverse().map(opposite);
  if (isDry) return print(back);
  const errors = await runAll(back, { goesOn: true });
  if (errors.length > 0) fail(1, errors.join("\n"));
  // Rules of --keep-source are always removed, so a missing one is normal.
  const missing = ours.filter((line) => !there.includes(line) && !isKept(line));
  console.log(`# ${back.length} removed, ${missing.length} not there`);
}

/** Somebody else's route may have further words, such as a metric. */
function isThere(line: string, there: string[]): boolean {
  return there.some((it) => it === line || it.startsWith(`${line} `));
}

/** The command that undoes another one. */
function opposite(line: string): string {
  return line.replace(/ -[AI] /, " -D ").replace(" add ", " del ")
    .replace(/=1$/, "=0");
}

/** What is on the node, written as the commands that add it. */
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

/** Prints and runs commands. Stops at an error, unless told to go on. */
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

/** Runs one `ip` for all routes, since there may be a thousand. */
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
  // Wait for the lock: kube-proxy and Docker write to the tables too.
  if (program === "iptables") args.unshift("-w");
  const { code, stderr } = await run([program, ...args])
    .catch(({ message }) => ({ code: 1, stderr: message }));
  if (code === 0 && !stderr) return [];
  const complaint = `${line}: ${stderr}`;
  // The rest works without br_netfilter, and not every kernel has it.
  const isNeeded = !/br_netfilter|bridge-nf/.test(line);
  if (code !== 0 && isNeeded) return [complaint];
  console.error(`Warning: ${complaint}`);
  return [];
}

const isKept = (line: string) => line.endsWith("-j RETURN");

/** Runs one iptables for all peers, since each call rewrites the table. */
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

/** What the flags and the conf say. */
interface Setup {
  podCIDR: PodCIDR;
  conf: plugin.Conf;
  peers: Peer[];
  keepsSource: boolean;
}

/** A node from --peer or --nodes that may become a peer. */
interface Candidate {
  /** Only from --nodes. */
  name?: string;
  ips: string[];
  range?: string;
}

/** Finds out this node's pod CIDR and its peers. */
async function learn(flags: Flags): Promise<Setup> {
  const list = flags.nodes ? await readNodes(flags.nodes) : undefined;
  const conf = await readConf(flags.conf, list?.range);
  const podCIDR = ipam.parsePodCIDR(conf.podcidr);
  if (list?.range && list.range !== podCIDR.text) {
    const what =
      `podcidr "${podCIDR.text}" is not the "${list.range}" of --nodes`;
    fail(1, what, "correct one of them");
  }
  const candidates = [
    ...list?.others ?? [],
    ...flags.peer.map((text) => parsePeer(text, podCIDR)),
  ];
  const routes = await routesTo(candidates.flatMap(({ ips }) => ips));
  const peers: Peer[] = [];
  for (const candidate of candidates) {
    try {
      const peer = choosePeer(candidate, routes);
      if (!flags.delete) checkPeer(peer, podCIDR, peers);
      peers.push(peer);
    } catch (error) {
      // A bad node of --nodes is skipped. A bad --peer is an error.
      if (!candidate.name || !(error instanceof CNIError)) throw error;
      const why = `${error.message}; ${error.details}`;
      console.error(`Skipped node "${candidate.name}": ${why}`);
    }
  }
  const keepsSource = flags["keep-source"] || flags.delete;
  return { podCIDR, conf, peers, keepsSource };
}

/** Runs a program, but not for longer than these seconds. */
function run(command: string[], input?: string, seconds = 30) {
  return plugin.run(command, input, AbortSignal.timeout(seconds * 1000));
}

/** The kernel's route to an address, as `ip route get` shows it. */
interface Route {
  dst: string;
  dev: string;
  /** "local", "broadcast" and the like; none for another host. */
  type?: string;
  /** The next hop, unless the address is a neighbour's. */
  gateway?: string;
}

/** Asks the kernel for its route to each address. It may refuse some. */
async function routesTo(ips: string[]): Promise<Map<string, Route>> {
  if (ips.length === 0) return new Map();
  const lines = ips.map((ip) => `route get ${ip}`);
  const routes: Route[] = await plugin.ip(lines.join("\n"), "-force");
  return new Map(routes.map((route) => [route.dst, route]));
}

/** Picks the candidate's address that can be the next hop of a route. */
function choosePeer(candidate: Candidate, routes: Map<string, Route>): Peer {
  const { name, ips, range } = candidate;
  const podCIDR = ipam.parsePodCIDR(range ?? fail(1, "No IPv4 podCIDR"));
  const [first = fail(1, "No IPv4 InternalIP")] = ips;
  // The kernel itself refuses a bad --peer. A node of --nodes may have several
  // addresses, and the next hop must be a neighbour.
  const whyNot = (ip: string) => {
    const route = routes.get(ip);
    if (!route) return "can't be reached";
    if (route.type === "local") return "is this node's own";
    if (route.type) return `is a ${route.type} address`;
    if (route.gateway) return `is not a neighbour, but behind ${route.gateway}`;
  };
  const neighbour = ips.find((ip) => !whyNot(ip));
  if (name && !neighbour) {
    fail(1, `Address ${first} ${whyNot(first)}`, `see: ip route get ${first}`);
  }
  const ip = neighbour ?? first;
  const dev = routes.get(ip)?.dev;
  return { ip, hop: dev ? `${ip} dev ${dev}` : ip, dev, podCIDR };
}

/** Refuses a peer that the kernel would accept but that can't be right. */
function checkPeer(
  { ip, dev, podCIDR }: Peer,
  own: PodCIDR,
  others: Peer[],
): void {
  if (dev === "lo") {
    fail(1, `Peer "${ip}" is this node`, "name the other nodes");
  }
  if (ipam.overlaps(own, `${ip}/32`)) {
    fail(1, `Peer "${ip}" is a pod`, "name its node");
  }
  if (others.some((other) => other.ip === ip)) {
    fail(1, `Two peers have the address "${ip}"`, "correct one of them");
  }
  // ADD and --check look at the addresses of cni0.
  const links = Deno.networkInterfaces()
    .filter(({ family, name }) => family === "IPv4" && name !== "cni0");
  const taken = [
    own.text,
    ...others.map((other) => other.podCIDR.text),
    ...links.map((link) => link.cidr),
  ].find((range) => ipam.overlaps(podCIDR, range));
  if (taken) {
    const what = `Peer "${ip}" can't have "${podCIDR.text}"`;
    fail(1, what, `it overlaps ${taken}`);
  }
}

/** Parses "10.0.2.14" or "10.0.2.14=10.240.1.0/24", as --peer has it. */
function parsePeer(text: string, own: PodCIDR): Candidate {
  const [ip, range] = text.split("=");
  if (!isIPv4(ip)) {
    fail(1, `--peer "${text}" is not an IPv4 address`, "IP[=CIDR]");
  }
  if (range !== undefined) return { ips: [ip], range };
  // The tutorial's two nodes.
  const pair = ["10.240.0.0/24", "10.240.1.0/24"];
  if (!pair.includes(own.text)) {
    const fix = `use --peer ${text}=CIDR; only ${pair} need none`;
    fail(1, `--peer "${text}" lacks a CIDR`, fix);
  }
  return { ips: [ip], range: pair.find((it) => it !== own.text) };
}

/** Reads this node's pod CIDR and the other nodes from kubectl's output. */
async function readNodes(path: string) {
  const list = await readJSON(path, "see: kubectl get nodes -o json");
  const items: plugin.Any[] = list.kind === "Node" ? [list] : list.items;
  if (!Array.isArray(items)) fail(1, "--nodes has no items", "see --help");
  const nodes = items.filter(({ kind = "Node" }) => kind === "Node").map(
    readNode,
  );
  // Names are unique. An address may be on every machine.
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
      `Exactly one of --nodes must be this node, not ${which}`,
      `this node is ${names}`,
    );
  }
  const [own] = found;
  return { range: own.range, others: nodes.filter((node) => node !== own) };
}

/** Reads the useful parts of a Node of Kubernetes. */
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
 * Reads custom-cni's conf from the given file. By default it takes the first
 * file by name, as a runtime does.
 */
async function readConf(given?: string, range?: string): Promise<plugin.Conf> {
  const files = expandGlobSync("/etc/cni/net.d/*.{conf,conflist,json}");
  const [first] = Array.from(files, (it) => it.path).sort();
  const path = given ?? first;
  if (!path && range) return { podcidr: range } as plugin.Conf;
  if (!path) {
    const fix = "cp 10-custom-cni.conf /etc/cni/net.d/ # and set its podcidr";
    fail(1, 'No conf in /etc/cni/net.d ("cni plugin not initialized")', fix);
  }
  const file = await readJSON(path, `vi ${path}`);
  // The plugins of a list have the list's name and version.
  const { name, cniVersion, plugins } = file;
  const isList = path.endsWith(".conflist");
  const all: plugin.Any[] = isList ? [plugins ?? []].flat() : [file];
  const ours = all.find((it) => it?.type === "custom-cni");
  if (ours) return { ...ours, name, cniVersion };
  if (given) return file;
  return fail(
    1,
    `${path} comes first, but is not for custom-cni`,
    `mv ${path} /root/`,
  );
}

/** Reads a JSON object from a file. */
async function readJSON(path: string, fix: string): Promise<plugin.Any> {
  try {
    return plugin.parseConf(await Deno.readTextFile(path));
  } catch (error) {
    return fail(1, `Cannot read "${path}"`, `${fix}; ${error}`);
  }
}

/** Reads the flags. @throws {CNIError} 2 for wrong usage. */
function readFlags(args: string[]) {
  // parseArgs would read a lone - as a flag, not as the value of --nodes.
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
      fail(2, `--only "${step}" is not a step`, `use ${Object.keys(STEPS)}`);
    }
  }
  const steps = only.length > 0 ? only : Object.keys(STEPS);
  const needsPeer = steps.includes("routes") || flags["keep-source"];
  const hasPeer = peer.length > 0 || nodes || flags.help || flags.check;
  if (needsPeer && !hasPeer) fail(2, "No peer", "use --peer or --nodes");
  return { ...flags, only: steps, peer: [...new Set(peer)] };
}

/** What is wrong, and the commands that fix it or show more. */
interface Problem {
  what: string;
  commands: string[];
}

/** Reports what is well on this node and what is not. Changes nothing. */
async function check(flags: Flags): Promise<void> {
  let setup: Setup;
  try {
    setup = await learn(flags);
  } catch (error) {
    return report("", [problemOf(error)]);
  }
  const there = await whatIsThere();
  const missing = commandsOf(setup, flags.only)
    .filter(({ line }) => !isThere(line, there))
    .map(({ without, line }) => ({ what: without, commands: [line] }));
  report("All rules and routes are there", missing);
  report("cni0 is well", await lookAtBridge(setup));
  report("The pods' host veths are well", await lookAtVeths(setup));
  report("Pods' packets fit through the NIC", await lookAtMTU(setup));
  if (flags["dry-run"]) {
    console.log(
      "     No pod was started to see if packets pass: --dry-run",
    );
  } else {
    await tryWithPods(setup);
  }
}

/** What a CNIError says. Any other error is a bug of this program. */
function problemOf(error: unknown): Problem {
  if (!(error instanceof CNIError)) throw error;
  return { what: error.message, commands: [error.details] };
}

/** Prints that all is well, or each problem. */
function report(ok: string, problems: Problem[]): void {
  if (problems.length === 0) console.log(`ok   ${ok}`);
  for (const { what, commands } of problems) {
    const lines = [`BAD  ${what}`, ...commands.filter(Boolean)];
    console.log(lines.join("\n     "));
    Deno.exitCode = 1;
  }
}

/** Is cni0 up, with the gateway's address and the route to the pods? */
async function lookAtBridge({ podCIDR }: Setup): Promise<Problem[]> {
  const gateway = ipam.address(podCIDR, 1);
  const cidr = `${gateway}/${podCIDR.prefix}`;
  try {
    const { bridge, hasRoute } = await plugin.lookAtNode(podCIDR);
    if (!bridge) return []; // the node has had no pod yet
    if (!plugin.isUp(bridge)) {
      return [{ what: "cni0 is down", commands: ["ip link set cni0 up"] }];
    }
    if (!plugin.addressesOf(bridge).includes(cidr)) {
      const fix = `ip addr add ${cidr} dev cni0`;
      return [{ what: `cni0 lacks ${cidr}`, commands: [fix] }];
    }
    if (!hasRoute) {
      const fix = `ip route add ${podCIDR.text} dev cni0 src ${gateway}`;
      return [{ what: "The node has no route to its pods", commands: [fix] }];
    }
    if (bridge.linkinfo?.info_data?.stp_state) {
      const fix = "ip link set cni0 type bridge stp_state 0";
      return [{ what: "STP makes new pods wait 30 s", commands: [fix] }];
    }
    return [];
  } catch (error) {
    return [problemOf(error)];
  }
}

/** Is each host veth on cni0, up, and named after its number? */
async function lookAtVeths({ podCIDR }: Setup): Promise<Problem[]> {
  const links: plugin.Link[] = await plugin.ip("link show");
  const problems: Problem[] = [];
  for (const link of links) {
    const { ifname, master } = link;
    const n = plugin.numberInMAC(link, podCIDR);
    if (!ipam.isForPod(podCIDR, n)) continue;
    const podIP = ipam.address(podCIDR, n);
    if (master !== "cni0") {
      const what = `${ifname} is not on cni0: the pod ${podIP} is cut off`;
      const onto = `ip link set ${ifname} master cni0 up`;
      const hairpin = `ip link set ${ifname} type bridge_slave hairpin on`;
      problems.push({ what, commands: [onto, hairpin] });
    } else if (!plugin.isUp(link)) {
      const what = `${ifname} is down: the pod ${podIP} is cut off`;
      problems.push({ what, commands: [`ip link set ${ifname} up`] });
    }
    if (ifname !== `veth${n}`) {
      const what = `${ifname} was veth${n}: another pod may get ${podIP} too`;
      const rename = `ip link set ${ifname} down name veth${n}`;
      problems.push({ what, commands: [rename, `ip link set veth${n} up`] });
    }
  }
  return problems;
}

/** Do pods send larger packets than the devices to other nodes take? */
async function lookAtMTU({ conf, peers }: Setup): Promise<Problem[]> {
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

/** A pod of --check. */
interface Pod {
  name: string;
  address: string;
}

/** A connection that must work. */
interface Connection {
  from: string;
  /** The words that run a command at the caller. */
  enter: string[];
  to: string;
  address: string;
  /** The words that run a command at the called one, unless it is a peer's. */
  called?: string[];
  /** What to look at if it fails. */
  commands: string[];
}

/** Starts two pods for a moment, as a kubelet would, and tries connections. */
async function tryWithPods(setup: Setup): Promise<void> {
  const names = [`check-${Deno.pid}-a`, `check-${Deno.pid}-b`];
  const begun: string[] = [];
  let isInterrupted = false;
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    // The check first ends its pods, and then itself.
    Deno.addSignalListener(signal, () => isInterrupted = true);
  }
  try {
    const pods: Pod[] = [];
    for (const name of names) {
      begun.push(name);
      pods.push(await startPod(name, setup.conf));
    }
    const connections = connectionsOf(setup, pods);
    // 50 at a time, since there may be a thousand peers.
    while (connections.length > 0 && !isInterrupted) {
      const some = connections.splice(0, 50);
      const works = await Promise.all(some.map(isAnswered));
      if (!isInterrupted) some.forEach((it, i) => reportOn(it, works[i]));
    }
  } catch (error) {
    if (!(error instanceof CNIError)) throw error;
    const what = `A pod gets no network: ${error.message}`;
    if (!isInterrupted) report("", [{ what, commands: [error.details] }]);
  } finally {
    for (const name of begun) await endPod(name, setup.conf);
  }
  if (isInterrupted) Deno.exit(130);
}

/** Starts a pod. @throws {CNIError} as ADD answers. */
async function startPod(name: string, conf: plugin.Conf): Promise<Pod> {
  // Not by `ip netns add`. Its first call mounts /run/netns onto itself, and
  // then the runtime's namespaces would be mounted twice.
  await Deno.writeTextFile(netnsOf(name), "");
  const made = await run(["unshare", `--net=${netnsOf(name)}`, "true"]);
  if (made.code !== 0) fail(1, "unshare can't make a namespace", made.stderr);
  const { stdout, stderr } = await callPlugin("ADD", name, conf);
  if (!stdout.startsWith("{")) {
    const fix = `cp dist/custom-cni ${BINARY}.new; mv ${BINARY}.new ${BINARY}`;
    fail(1, `${BINARY} does not start: ${stderr}`, fix);
  }
  const { code, msg, details, ips } = JSON.parse(stdout);
  if (code) fail(code, msg, details);
  // A REJECT rule sends such packets, which would look like an answer.
  const drop = "-p icmp --icmp-type destination-unreachable -j DROP".split(" ");
  await run([...inPod(name), "iptables", "-w", "-A", "INPUT", ...drop]);
  return { name, address: ips[0].address.split("/")[0] };
}

/** Ends a pod, even one that started only in part. */
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
  // ADD waits a minute for a locked counter, and then says so.
  return await run(["env", ...variables, BINARY], stdin, 90);
}

const netnsOf = (name: string) => `/run/${name}`;
const inPod = (name: string) => ["nsenter", `--net=${netnsOf(name)}`];

/** The connections that the tutorial promises. */
function connectionsOf({ podCIDR, peers }: Setup, [a, b]: Pod[]): Connection[] {
  const gateway = ipam.address(podCIDR, 1);
  const fromPod = { from: "A pod", enter: inPod(a.name) };
  const connections: Connection[] = [{
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
    connections.push({
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
      to: `${itsGateway}, which ${peer.ip} gets with its first pod`,
      address: itsGateway,
      commands: [
        ...firewall("FORWARD"),
        "ip rule",
        `ip route get ${itsGateway}`,
        there,
      ],
    });
  }
  return connections;
}

const firewall = (chain: string) => [
  `iptables -nvL ${chain}`,
  "nft list ruleset",
];

/** Calls a port where nobody listens. A refusal is an answer. */
async function isAnswered(
  { enter, address, called }: Connection,
): Promise<boolean> {
  const before = called ? await countRefused(called) : 0;
  const call = `echo > /dev/tcp/${address}/9`;
  const words = [...enter, "timeout", "2", "bash", "-c", call];
  const { code, stderr } = await run(words);
  if (code !== 0 && !stderr.includes("refused")) return false;
  // A REJECT rule on the way can refuse too. Did the called one do it?
  return !called || await countRefused(called) > before;
}

/** How many calls a namespace itself has refused: see nstat(8). */
async function countRefused(enter: string[]): Promise<number> {
  const { stdout } = await run([...enter, "nstat", "-asz", "TcpOutRsts"]);
  return Number(/^TcpOutRsts +(\d+)/m.exec(stdout)?.[1]);
}

function reportOn({ from, to, commands }: Connection, works: boolean): void {
  const problem = { what: `${from} does not reach ${to}`, commands };
  report(`${from} reaches ${to}`, works ? [] : [problem]);
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
