/**
 * node-setup: the commands that the tutorial types once on each node, so that
 * pods reach each other, the pods of other nodes, and the internet. It prints
 * each one, and runs it unless what it makes is there; --check only looks.
 *
 * @module
 */
import { parseArgs } from "@std/cli/parse-args";
import { expandGlobSync } from "@std/fs/expand-glob";
import { isIPv4 } from "node:net";
import * as plugin from "./custom-cni.ts";
import * as ipam from "./ipam.ts";
import { CNIError, fail, type PodCIDR } from "./ipam.ts";

const HELP = `Usage: deno run -A node-setup.ts --peer IP[=CIDR] [options]
The rules and routes that pods need; as root, on each node. Twice is once.

  --peer IP[=CIDR]  each other node; =CIDR is known of the tutorial's two nodes
  --nodes FILE      in place of it: kubectl get nodes -o json; - is stdin
  --check           only say what is wrong here, and the command that mends it
  --podcidr CIDR    the range of this node's pods, else that of the conf
  --conf FILE       the conf, else the first one in /etc/cni/net.d
  --bridge NAME     the bridge of the pods, else cni0
  --dev NAME        the device to the peers, else that of "ip route get"
  --keep-source     peers' pods see a pod's own address, until --delete
  --only STEP       forward, routes or masquerade alone; may be repeated
  --delete          take back what a run with the same flags makes, but sysctl's
  --dry-run         print all commands and run none; needs no root
  --help            print this

Exit status: 0 well, 1 failed with nothing added or not well, 2 wrong usage`;

const CONF_DIR = "/etc/cni/net.d";
const BINARY = "/opt/cni/bin/custom-cni";
const MODPROBE = "modprobe br_netfilter";
const PAIR = ["10.240.0.0/24", "10.240.1.0/24"]; // of the tutorial's two nodes

/** Prints what there is, each as the command that makes it. */
const LOOK = `set -eo pipefail; ip -oneline route show |
  sed -E "s/ (dead|linkdown)\\b//g; s/ *$//; s/^/ip route add /"
sysctl -e net.ipv4.ip_forward net.bridge.bridge-nf-call-iptables |
  sed "s/ = /=/; s/^/sysctl -w /; /bridge-nf/i ${MODPROBE}"
iptables -w -S FORWARD | sed "s/^/iptables /"
iptables -w -t nat -S POSTROUTING | sed "s/^/iptables -t nat /"`;

/** What is the matter where a command of a step has not been run. */
const STEPS: Record<string, string> = {
  ip_forward: "The node forwards no packets: pods reach no other network",
  bridged: "Bridged packets bypass iptables: a Service is dead on its own node",
  forward: "FORWARD lacks a rule for the pods",
  routes: "A peer's pods have no route",
  masquerade: "Out there nobody can answer a pod's address",
};
const CHOICE = ["forward", "routes", "masquerade"];

type Flags = ReturnType<typeof readFlags>;
/** What is wrong, and the command that mends it. */
type Trouble = [what: string, mend: string];
/** Another node, whose pods are reached through its address. */
type Peer = { ip: string; podCIDR: PodCIDR; dev?: string };
type Setup = Awaited<ReturnType<typeof learn>>;

/** The commands to run in the tutorial's order, for --delete in reverse. */
function plan({ own, peers, flags, there }: Setup) {
  const nat = `iptables -t nat -A POSTROUTING -s ${own.text}`;
  const masquerade = `${nat} ! -o ${flags.bridge} -j MASQUERADE`;
  const isTodo = (line: string) =>
    flags["dry-run"] || there.has(line) === flags.delete;
  // At the chain's head, and by one command: iptables rewrites the whole table.
  const ranges = peers.map(({ podCIDR }) => podCIDR.text)
    .filter((range) => isTodo(`${nat} -d ${range} -j RETURN`));
  const keep = `${nat.replace("-A", "-I")} -d ${ranges} -j RETURN`;
  const isKept = ranges.length && (flags["keep-source"] || flags.delete);
  const steps: Record<string, string[]> = {
    ip_forward: ["sysctl -w net.ipv4.ip_forward=1"],
    // Same host: what cni0 bridges is to pass FORWARD, where Docker drops all.
    bridged: [MODPROBE, "sysctl -w net.bridge.bridge-nf-call-iptables=1"],
    forward: ["-s", "-d"].map((way) =>
      `iptables -A FORWARD ${way} ${own.text} -j ACCEPT`
    ),
    // Other hosts: the network between them knows of no pods, the nodes must.
    routes: peers.map(routeTo),
    // Internet: answers find the node, not the pod. On the bridge they find it.
    masquerade: isKept ? [keep, masquerade] : [masquerade],
  };
  const all = flags.only.flatMap((step) =>
    steps[step].map((line): Trouble => [STEPS[step], line])
  );
  const todo = all.filter(([, line]) => line === keep || isTodo(line));
  if (flags.delete) todo.reverse();
  return { todo, rest: all.length - todo.length };
}

/** The command for the route to a range; to the node's own it has no hop. */
function routeTo({ ip, podCIDR, dev }: Peer): string {
  const via = ip && ` via ${ip}`;
  return `ip route add ${podCIDR.text}${via}${dev ? ` dev ${dev}` : ""}`;
}

/** The command that takes back what a command did. */
function opposite(command: string): string {
  return command.replace(/ -[AI] /, " -D ").replace(" add ", " del ")
    .replace(/=1$/, "=0");
}

/** Learns all there is to know, checks it, and only then changes the node. */
async function main(args: string[]): Promise<void> {
  const flags = readFlags(args);
  if (flags.help) return console.log(HELP);
  const mayRun = flags["dry-run"] || Deno.uid() === 0;
  if (!mayRun) fail(1, "Only root may change the node", "sudo, or --dry-run");
  if (flags.check) return await check(flags);
  const setup = await learn(flags);
  const { errors, changed, rest } = await apply(setup);
  if (flags["dry-run"]) return;
  if (errors.length && !flags.delete) {
    console.log("# Failed; what was added is taken back");
    const there = (await look(flags)).difference(setup.there);
    const back = { ...setup, there, flags: { ...flags, delete: true } };
    errors.push(...(await apply(back)).errors);
  }
  if (errors.length) fail(1, errors.join("\n"));
  if (flags.delete) {
    return console.log(`# ${changed} taken back, ${rest} not there`);
  }
  console.log(`# ${changed} new, ${rest} there already`);
  const now = { ...setup, there: await look(flags) };
  const troubles = [...await drops(now), ...await strays(now)];
  for (const it of troubles) console.error(`Warning: ${it.join("\n  ")}`);
}

/** Changes nothing, and says what is wrong on this node and what mends it. */
async function check(flags: Flags): Promise<void> {
  const tell = (ok: string, troubles: Trouble[] = []) => {
    if (!troubles.length) return console.log(`ok   ${ok}`);
    for (const it of troubles) console.log(`BAD  ${it.join("\n     ")}`);
    Deno.exitCode = 1;
  };
  const orTell = (it: CNIError) => tell("", [[it.message, it.details]]);
  const conf = findConf(flags.conf);
  await conf.then((it) => plugin.lookAtNode(ipam.parsePodCIDR(it.podcidr)))
    .then(() => tell("The conf and cni0 are well"), orTell);
  const mend = `install -D dist/custom-cni ${BINARY}`;
  const starts = await plugin.run([BINARY]).then(() => true, () => false);
  tell(`${BINARY} starts`, starts ? [] : [[`${BINARY} does not start`, mend]]);
  const setup = await learn(flags).catch(orTell);
  if (!setup) return;
  const { size } = await plugin.usedNumbers(setup.own);
  const counts = `${size} of ${setup.own.room} addresses are used`;
  tell(counts, size < setup.own.room ? [] : [[counts, "kubectl delete pod"]]);
  tell("All rules and routes are there", plan(setup).todo);
  tell("No rule drops pods' packets", await drops(setup));
  tell("No route leads pods' packets astray", await strays(setup));
  const { mtu: sent = 1500 } = await conf.catch(() => ({}));
  const links = await plugin.ip("link show");
  const routes = await plugin.ip("route show default");
  const nics = [...setup.peers, ...routes].map(({ dev }) => dev);
  const what = `The conf lets pods send ${sent} bytes at once, too many for`;
  const narrow = links.filter((it) => nics.includes(it.ifname) && it.mtu < sent)
    .map(({ ifname, mtu }): Trouble => [`${what} ${ifname}`, `"mtu": ${mtu}`]);
  tell("Pods' packets fit through the NIC", narrow);
}

/** Reads the flags; throws with 2 what can't be meant. */
function readFlags(args: string[]) {
  // parseArgs takes a lone - for a flag, not for the value of --nodes.
  const words = args.map((arg) => arg.replace(/(^|=)-$/, "$1/dev/stdin"));
  const flags = parseArgs(words, {
    string: ["peer", "nodes", "podcidr", "conf", "bridge", "dev", "only"],
    boolean: ["keep-source", "check", "delete", "dry-run", "help"],
    collect: ["peer", "only"],
    default: { bridge: plugin.BRIDGE },
    unknown: (arg) => fail(2, `Unknown argument "${arg}"`, "see --help"),
  });
  const none = Object.entries(flags).find(([, v]) => [v].flat().includes(""));
  if (none) fail(2, `--${none[0]} needs a value`);
  const bad = flags.only.find((step) => !CHOICE.includes(step));
  if (bad) fail(2, `--only "${bad}" is no step`, `use ${CHOICE.join(", ")}`);
  const isName = /^[^-\s][^\s/]{0,14}$/.test(flags.bridge);
  if (!isName) fail(1, `--bridge "${flags.bridge}" is no name of a device`);
  const only = flags.only.length ? flags.only : [...CHOICE];
  const needsPeer = only.includes("routes") || flags["keep-source"];
  const hasPeer = flags.peer.length || flags.nodes || flags.help || flags.check;
  if (needsPeer && !hasPeer) fail(2, "No peer is named", "--peer or --nodes");
  // These come first, and are not taken back: others may have come to need it.
  const others = only.includes("forward") ? ["bridged"] : [];
  if (!flags.delete) only.unshift("ip_forward", ...others);
  return { ...flags, only, peer: [...new Set(flags.peer)] };
}

/** The range of this node, and the peers that can be used. */
async function learn(flags: Flags) {
  const there = await look(flags);
  const links = Deno.networkInterfaces().filter((it) => it.family === "IPv4");
  const names = [Deno.hostname(), ...links.map(({ address }) => address)];
  const list = flags.nodes && await readJSON(flags.nodes, "kubectl prints it");
  const { range, nodes = [] } = list ? readNodes(list, names) : {};
  const conf = flags.podcidr ? flags : await findConf(flags.conf, range);
  const what = `podcidr "${conf.podcidr}" is not the "${range}" of --nodes`;
  if (range && conf.podcidr !== range) fail(1, what, "mend one of the two");
  const own = ipam.parsePodCIDR(conf.podcidr);
  const named = [...nodes, ...flags.peer.map((text) => parsePeer(text, own))];
  const oif = flags.dev ? ` oif ${flags.dev}` : "";
  const ways = await waysTo(named.flatMap(({ ips }) => ips), oif);
  const ranges = [...links.map(({ cidr }) => cidr), own.text];
  const routes = Map.groupBy(there, (it) => / add \D*([\d./]+)/.exec(it)?.[1]);
  const peers: Peer[] = [];
  const refuse = ({ ip, podCIDR, dev }: Peer): Trouble[] => {
    const { type, gateway } = ways.get(ip) ?? {};
    const taken = ranges.find((range) => ipam.overlaps(podCIDR, range));
    const isThere = there.has(routeTo({ ip, podCIDR, dev }));
    const [other = ""] = isThere ? [] : routes.get(podCIDR.text) ?? [];
    const reasons: [isSo: unknown, what: string, mend: string][] = [
      [!ways.has(ip), "can't be reached", `see: ip route get ${ip}${oif}`],
      [type === "local", "is this node", "name the other ones"],
      [type, `is a ${type} address`, "name a node"],
      // The kernel takes only a neighbour for the next hop of a route.
      [gateway, "is no neighbour", `${gateway} is on the way to it`],
      [ipam.overlaps(own, `${ip}/32`), "is a pod", "name its node"],
      [peers.some((it) => it.ip === ip), "is another node's too", "mend that"],
      [taken, `can't have "${podCIDR.text}"`, `that overlaps ${taken}`],
      [other, "has another route", opposite(other)],
    ];
    return reasons.filter(([isSo]) => isSo && !flags.delete)
      .map(([, what, mend]) => [`Peer "${ip}" ${what}`, mend]);
  };
  for (const { name, ips, range } of named) {
    try {
      const podCIDR = ipam.parsePodCIDR(range ?? fail(1, "No IPv4 podCIDR"));
      const hops = ips.map((ip) => ({ ip, podCIDR, dev: ways.get(ip)?.dev }));
      const [first = fail(1, "No IPv4 InternalIP")] = hops;
      const hop = hops.find((it) => !refuse(it).length);
      peers.push(hop ?? fail(1, ...refuse(first)[0]));
      ranges.push(podCIDR.text);
    } catch (error) {
      // What can't be used of a list stops nobody else; what was named, does.
      if (!name || !(error instanceof CNIError)) throw error;
      console.error(`Skipped node "${name}": ${error.message};`, error.details);
    }
  }
  return { own, peers, flags, there };
}

/** Finds this node's range and the other nodes in the output of kubectl. */
function readNodes(list: plugin.Any, mine: string[]) {
  const items: plugin.Any[] = list.kind === "Node" ? [list] : list.items;
  if (!Array.isArray(items)) fail(1, "--nodes has no items", "see --help");
  const nodes = items.filter(({ kind = "Node" }) => kind === "Node")
    .map(({ metadata = {}, spec = {}, status = {} }) => {
      const { addresses = [] }: { addresses?: plugin.Any[] } = status;
      const ranges: plugin.Any[] = [...spec.podCIDRs ?? [], spec.podCIDR];
      return {
        name: `${metadata.name}`,
        known: addresses.map(({ address }) => address),
        ips: addresses.filter(({ type }) => type === "InternalIP")
          .map(({ address }) => address).filter(isIPv4),
        range: ranges.find((range) => range && !range.includes(":")),
      };
    });
  // The name is one node's only, an address may be on every machine.
  const named = nodes.filter(({ name }) => name === mine[0].toLowerCase());
  const known = nodes.filter((it) => it.known.some((at) => mine.includes(at)));
  const found = named.length ? named : known;
  const which = found.map(({ name }) => `"${name}"`).join(" and ") || "none";
  const what = `Just one of --nodes must be this node, not ${which}`;
  if (found.length !== 1) fail(1, what, `its names are ${mine.join(", ")}`);
  const [own] = found;
  return { range: own.range, nodes: nodes.filter((it) => it !== own) };
}

/** Reads the "10.0.2.14" or "10.0.2.14=10.240.1.0/24" of --peer. */
function parsePeer(text: string, own: PodCIDR) {
  const [ip, ...rest] = text.split("=");
  if (!isIPv4(ip)) fail(1, `--peer "${text}" is no IPv4 address`, "IP[=CIDR]");
  const other = PAIR.includes(own.text) && PAIR.find((it) => it !== own.text);
  const mend = `write --peer ${text}=CIDR; only ${PAIR} know each other`;
  if (!rest.length && !other) fail(1, `--peer "${text}" names no CIDR`, mend);
  return { name: "", ips: [ip], range: rest.length ? rest.join("=") : other };
}

/** What a conf says to custom-cni: the given one, or as libcni reads it. */
async function findConf(given?: string, range?: string): Promise<plugin.Any> {
  const filesOf = (glob: string) =>
    Array.from(expandGlobSync(`${CONF_DIR}/${glob}`), (it) => it.path).sort();
  const [first] = filesOf("*.{conf,conflist,json}"); // as libcni does
  if (!given && !first && range) return { podcidr: range };
  const none = `${CONF_DIR} has no conf ("cni plugin not initialized")`;
  const copy = `cp 10-custom-cni.conf ${CONF_DIR} # and set its podcidr`;
  const file = given ?? first ?? fail(1, none, copy);
  const conf = await readJSON(file, `vi ${file} # or use --podcidr`);
  const { name = "", cniVersion, plugins = [], delegates = [conf] } = conf;
  // From libcni 1.3 on a list's plugins may be in a folder of its name as well.
  const isList = file.endsWith(".conflist");
  const hasFolder = isList && !conf.loadOnlyInlinedPlugins;
  const folder = hasFolder ? filesOf(`${name}/*.conf`) : [];
  const more = await Array.fromAsync(folder, (it) => readJSON(it, `vi ${it}`));
  const listed: plugin.Any[] = [plugins, more].flat();
  const all = listed.length ? listed : [delegates].flat();
  const ours = all.find((it) => it?.type === "custom-cni");
  if (given) return ours ?? conf;
  const [is, end] = isList ? ["single conf", "conf"] : ["list", "conflist"];
  const mend = `mv ${file} ${file.replace(/[^.]*$/, end)}`;
  if (isList !== listed.length > 0) fail(1, `${file} is a ${is} inside`, mend);
  if (!ours) fail(1, `${file} comes first, for others`, `mv ${file} /root/`);
  try {
    // A list's name and version are its plugins', those of Multus a fallback.
    plugin.checkConf({ ...ours, name, cniVersion, ...isList ? {} : ours });
    return ipam.parsePodCIDR(ours.podcidr) && ours;
  } catch ({ message, details }: plugin.Any) {
    return fail(1, `${file}: ${message}`, `vi ${file} # ${details}`);
  }
}

/** The way that the kernel takes to each address, but where it refuses. */
async function waysTo(ips: string[], oif = "") {
  const lines = Array.from(new Set(ips), (ip) => `route get ${ip}${oif}`);
  const answers = await plugin.ip(lines.join("\n"), "-force").catch(() => []);
  return new Map(answers.map((way) => [way.dst, way]));
}

/** Runs what is missing, or with --delete takes back what is there. */
async function apply(setup: Setup) {
  const { flags, todo, rest } = { ...setup, ...plan(setup) };
  const all = todo.map(([, line]) => flags.delete ? opposite(line) : line);
  // The routes to a thousand nodes are one process.
  const ip = "ip -force -batch -";
  const batches = Map.groupBy(all, (it) => it.startsWith("ip ") ? ip : it);
  const errors: string[] = [];
  let changed = 0;
  for (const [command, lines] of batches) {
    console.log(lines.join("\n"));
    if (flags["dry-run"]) continue;
    const [program, ...args] = command.split(" ");
    // kube-proxy and Docker write to the tables too: wait for their lock.
    if (program === "iptables") args.unshift("-w");
    const input = lines.map((line) => line.replace("ip ", "")).join("\n");
    const { code, stderr } = await plugin.run([program, ...args], input);
    changed += code ? 0 : lines.length;
    const failed = Number(/failed -:(\d+)/.exec(stderr)?.[1] ?? 1);
    const error = `${lines[failed - 1]}: ${stderr}`;
    // The rest works without bridged packets, and not every kernel has them.
    const isNeeded = !/br_netfilter|bridge-nf/.test(command);
    if (code && isNeeded) errors.push(error);
    else if (code || stderr) console.error(`Warning: ${error}`);
    if (errors.length && !flags.delete) break;
  }
  return { errors, changed, rest };
}

/** Learns what there is; only root may look at more than the routes. */
async function look(flags: Flags): Promise<Set<string>> {
  const script = flags["dry-run"] ? LOOK.split("\nsysctl")[0] : LOOK;
  const { code, stdout, stderr } = await plugin.run(["bash", "-c", script]);
  if (code) fail(1, "Cannot look at the node", stderr);
  if (stderr) console.error(stderr);
  const there = stdout.split("\n");
  // Others may keep the same route, with words of their own behind it.
  const bare = there.map((line) => line.replace(/( dev \S+) .*/, "$1"));
  return new Set(flags.delete ? there : [...there, ...bare]);
}

/** A copy of the node with one set of its rules, through which two call. */
const COPY = `timeout 25 unshare -m sh -ec 'mount -t tmpfs tmpfs /var/run
$0 > /var/run/rules && [ -s /var/run/rules ] || exit 0
at() { nsenter --net=/var/run/netns/"$@"; }
join() {
  ip netns add $1; ip -n node link add $2 up type veth peer name eth0 netns $1
  ip -n node addr add $3 peer $4 dev $2
  ip -n $1 addr add $4 peer $3 dev eth0
  ip -n $1 link set eth0 up; ip -n $1 route add default via $3
}
ip netns add node; join pod $2 $3 $4; join host $5 $6 $7
ip -n host addr add $8 dev eth0; ip -n node route replace $8 via $7
# Rules name devices and sets. Counters and owners of tables are left out.
ls /sys/class/net | grep -owFf - /var/run/rules | sort -u |
  sed "s/.*/link add & type bridge/" | ip -n node -force -batch - 2>&- || :
ipset save 2>&- | at node ipset restore 2>&- || :
at node sysctl -qw net.ipv4.ip_forward=1
sed "/^\\tflags owner/d; s/-m nfacct [^ ]* *[^ ]*//" /var/run/rules | at node $1
for way in -s -d; do at node iptables -w -A FORWARD $way $9 -j ACCEPT; done
at pod timeout 2 bash -c "echo > /dev/tcp/$8/9" &
at host timeout 2 bash -c "echo > /dev/tcp/$4/9" &
# Nobody listens: a call that gets through is refused.
wait; shift 9; for it; do at $it nstat -asz TcpOutRsts | grep -q " [1-9]" ||
  at node $0 | sed "/^\\*[^f]/,/^COMMIT/d"; done' "$0" "$@"`;

/** The rules that drop a pod's packets, also if ours are (or were) there. */
async function drops({ own, peers, flags }: Setup): Promise<Trouble[]> {
  const [peer] = peers;
  const hop = peer?.ip ?? "1.1.1.1"; // no packet leaves the copy
  const to = peer ? ipam.address(peer.podCIDR, 2) : hop;
  const from = flags["keep-source"] ? to : hop;
  const ways = await waysTo([hop], flags.dev && ` oif ${flags.dev}`);
  const { dev = "eth0", prefsrc: me = "10.0.2.15" } = ways.get(hop) ?? {};
  const pod = [flags.bridge, ipam.address(own, 1), ipam.address(own, 2)];
  const host = [dev, me, from, to, own.text, "host", ...peer ? ["pod"] : []];
  // iptables tells how many packets each rule and policy has had.
  const drop = /(?<=^\[[1-9]\S* ).*-j (DROP|REJ).*|^:FORWARD DROP(?= \[[1-9])/m;
  const accept = `-I FORWARD $way ${own.text} -j ACCEPT`;
  const { stdout } = await plugin.run(["sh", "-c", "nft list tables"]);
  const tables = stdout.match(/^table (ip|inet|netdev) .+/gm) ?? [];
  const found: Trouble[] = [];
  for (const by of ["iptables-nft", "iptables-legacy", ...tables]) {
    const isTable = by.startsWith("table");
    // These are iptables-nft's own; nft lists them, but can't read all again.
    const isTwin = /^table ip (filter|nat|mangle|raw|security)$/.test(by);
    if (isTwin && found.length) continue;
    const list = isTable ? `nft list ${by}` : `${by}-save -c`;
    const load = isTable ? "nft -f -" : `${by}-restore`;
    const args = ["-c", COPY, list, load, ...pod, ...host];
    const { code, stdout, stderr } = await plugin.run(["sh", ...args]);
    const rule = drop.exec(stdout)?.[0];
    const mend = rule ? `for way in -s -d; do ${by} ${accept}; done` : list;
    const what = `${by} ${rule ?? "has a rule that"} drops pods' packets`;
    if (code && !isTwin) found.push([`Cannot try ${by}`, stderr]);
    if (stdout) found.push([what, mend]);
  }
  return found;
}

/** The pods whose packets go elsewhere, though a route of ours is there. */
async function strays({ own, peers, flags, there }: Setup) {
  const ranges = [{ ip: "", podCIDR: own, dev: flags.bridge }, ...peers]
    .filter((range) => there.has(routeTo(range)));
  // The kernel is asked for each address at which a route begins.
  const starts = [...there].map((it) => /add \D*([\d.]+)/.exec(it)?.[1] ?? "");
  const ways = await waysTo(starts);
  return [...new Set(starts)].flatMap((to): Trouble[] => {
    const range = ranges.find((it) => ipam.overlaps(it.podCIDR, `${to}/32`));
    const { gateway, dev = "nobody" } = ways.get(to) ?? {};
    const hop = range?.ip || range?.dev;
    if (!hop || hop === (gateway ?? dev)) return [];
    const what = `Packets to ${to} go to ${gateway ?? dev}, not to ${hop}`;
    return [[what, `ip rule; ip route show table all match ${to}`]];
  });
}

/** Reads a file as a JSON object. */
async function readJSON(path: string, mend: string): Promise<plugin.Any> {
  return await Deno.readTextFile(path).then(plugin.parseConf)
    .catch((it) => fail(1, `Cannot read "${path}"`, `${mend}; ${it}`));
}

if (import.meta.main) {
  await main(Deno.args).catch((error) => {
    if (!(error instanceof CNIError)) throw error;
    console.error(`Error: ${error.message}\n  ${error.details}`.trimEnd());
    Deno.exitCode = error.code === 2 ? 2 : 1;
  });
  Deno.exit(); // else it waits for half a minute: see run() of custom-cni.ts
}
