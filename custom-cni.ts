/**
 * custom-cni: the CNI plugin that a container runtime runs for every pod.
 *
 * The shell script of the tutorial, step by step in TypeScript: a bridge cni0,
 * a veth pair for each pod, an address from the node's pod CIDR, a default
 * route. The runtime gives the verb and the container in CNI_* variables and
 * the network's configuration on stdin; the answer is JSON on stdout
 * (https://www.cni.dev/docs/spec/).
 *
 * The kernel is the only database: each host veth carries its owner in its
 * alias (see `ip link`), so that DEL, CHECK and GC find it whatever was lost.
 *
 * @module
 */
import { ensureDirSync } from "@std/fs/ensure-dir";
import { existsSync } from "@std/fs/exists";
import { FileHandler } from "@std/log/file-handler";
import { type LevelName, LogLevelNames, LogLevels } from "@std/log/levels";
import { join } from "@std/path/posix/join";
import deno from "./deno.json" with { type: "json" };
import * as ipam from "./ipam.ts";
import { CNIError, fail, type PodCIDR } from "./ipam.ts";

export const BRIDGE = "cni0";
const LOG = "/var/log/cni.log";
const NETNS_DIR = "/var/run/netns"; // where `ip netns` looks
const VERSIONS = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const VALID = "cni.dev/valid-attachments";
// Two of them and an interface's fit into an alias, which has 255 bytes.
const NAME = /^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,118}$/;

/** The verbs about a network: the version that brought it, what it needs. */
const VERBS = new Map<string, Verb>([
  ["ADD", ["0.3.0", "CONTAINERID NETNS IFNAME", add]],
  ["DEL", ["0.3.0", "CONTAINERID IFNAME", del]],
  ["CHECK", ["0.4.0", "CONTAINERID NETNS IFNAME", check]],
  ["GC", ["1.1.0", "", gc]],
  ["STATUS", ["1.1.0", "", status]],
]);

/**
 * What CNI_CONTAINERID and the like may be. Beyond the spec: nothing that the
 * kernel (eth%d) or `ip -batch` would take for something else.
 */
const VARIABLES = {
  CONTAINERID: NAME,
  NETNS: /^\/[ !$-[\]-~\xa0-\uffff]*$/,
  IFNAME: /^(?!(\.\.?|all|default)$)(?!.*[/:%#'"\\])[!-~]{1,15}$/,
};

/** What the configuration's keys must be; podcidr is `parsePodCIDR()`'s. */
const KEYS: Record<string, [must: string, isSo: (it: Any) => boolean]> = {
  cniVersion: ["a string", like("")],
  name: [`like ${NAME}`, (it) => NAME.test(it) && like("")(it)],
  mtu: ["68 to 65535", (it) => Number.isInteger(it) && it > 67 && it < 65536],
  dns: ["an object", like({})],
  logLevel: [`one of ${LogLevelNames}`, (it) => LogLevelNames.includes(it)],
  prevResult: ["a result", like({ interfaces: [{}], ips: [{}], routes: [{}] })],
  runtimeConfig: ["without ips and mac", (it) => !it.ips && !it.mac],
  [VALID]: ["attachments", like([{ containerID: "", ifname: "" }])],
};

// deno-lint-ignore no-explicit-any -- JSON: of a runtime (see KEYS), or of `ip`
export type Any = any;
type Verb = [since: string, needs: string, run: (_: Call) => Promise<Answer>];

/** What a verb says: to the operator in the log, and to the runtime. */
type Answer = [note: string, result?: object];

/** One call of the runtime: for whom, and the network's configuration. */
interface Call {
  netns: string;
  ifname: string;
  conf: Any;
  name: string; // the path for `ip netns` to find it by; "" if that is netns
  /** NAME/CONTAINERID/IFNAME: marks the host veth as this attachment's. */
  alias: string;
}

/** ADD: gives the pod its interface, address and route, or leaves nothing. */
async function add(call: Call): Promise<Answer> {
  const { name, netns, ifname, conf } = call;
  // podcidr, and its first address for the gateway.
  const podCIDR = ipam.parsePodCIDR(conf.podcidr);
  const gateway = ipam.address(podCIDR, 1);
  const taken = name && existsSync(name) && !linkTarget(name);
  if (taken) fail(4, "CNI_CONTAINERID is the name of another namespace", name);

  // The bridge. Where there is no counter, this is the node's first pod.
  if (!ipam.checkCounter()) await makeBridge(podCIDR);

  // The number n, and the veth pair, with the host veth vethN on the bridge.
  const { bridge, hostVeth, address } = await makeVeth(call, podCIDR);

  // A name for the namespace, so that `ip netns exec CONTAINERID` works. And in
  // the pod: up, address, default route, and its MAC is read. The route is
  // appended, so that the one of another network stays the first.
  ensureDirSync(NETNS_DIR);
  const deaf = deafen(ifname, "nsenter", `--net=${netns}`);
  // By a process: Deno.symlink asks for the right to write everywhere.
  const naming = name && run("ln", ["-sfT", netns, name])
    .then(({ code, stderr }) => code && fail(100, `ln to ${name}`, stderr));
  const lines = `
    link set dev ${ifname} up
    addr add ${address} dev ${ifname}
    route append default via ${gateway} dev ${ifname}
    link show dev ${ifname}`;
  const inside = deaf.then(() => inPod(netns, lines));
  await Promise.allSettled([naming, inside]); // none goes on while it is undone
  const [[[podVeth]]] = await Promise.all([inside, naming])
    .catch((error) => takeBack(call, error));

  // The result: the pod's interface is the first, as in the tutorial, but for
  // those that plugins before this one have answered.
  const { cniVersion, prevResult } = conf;
  const none = { cniVersion, interfaces: [], ips: [], routes: [] };
  const previous = { ...none, ...prevResult, cniVersion };
  const result = {
    ...previous,
    interfaces: [
      ...previous.interfaces,
      { name: ifname, mac: podVeth.address, sandbox: netns },
      { name: hostVeth.ifname, mac: hostVeth.address },
      { name: BRIDGE, mac: bridge.address },
    ],
    ips: [...previous.ips, {
      ...cniVersion < "1.0.0" ? { version: "4" } : {},
      ...{ address, gateway, interface: previous.interfaces.length },
    }],
    routes: [...previous.routes, { dst: "0.0.0.0/0", gw: gateway }],
    dns: conf.dns ?? previous.dns ?? {},
  };
  return [`${address} ${hostVeth.ifname}`, result];
}

/** Makes the bridge, or takes the one that is there, and gives it its mark. */
async function makeBridge(podCIDR: PodCIDR): Promise<void> {
  const bridge = await lookAtBridge(podCIDR);
  // A MAC of its own. Else it has that of one of its ports, and changes it when
  // that pod ends, while others' ARP knows the old one.
  const mac = bridge?.address ?? macOf(ipam.address(podCIDR, 1));
  const line = `link add ${BRIDGE} address ${mac} type bridge`;
  // By -force the node's first two pods may meet here: it has to be there then.
  if (!bridge) await ip(`${line}\nlink show dev ${BRIDGE}`, "-force");
  await deafen(BRIDGE); // before it is up
  const lines = `link set ${BRIDGE} address ${mac}
    link show dev ${BRIDGE}
    link property add dev ${BRIDGE} altname ${markOf(podCIDR)}`;
  await ip(lines, "-force");
}

/** Second names: of a bridge that is ready for a range, of a host veth. */
const markOf = ({ text }: PodCIDR) => `${BRIDGE}-${text.replace("/", "-")}`;
const altnameOf = (alias: string) => alias.replaceAll("/", ",");

/** Makes a link deaf to the IPv6 router that a pod may play. */
async function deafen(link: string, ...enter: string[]): Promise<void> {
  const key = `net/ipv6/conf/${link}/accept_ra=0`; // eth0.1 has a dot
  const [program, ...args] = [...enter, "sysctl", "-eqw", key];
  const { stderr } = await run(program, args)
    .catch(({ message }) => ({ stderr: message }));
  if (stderr) log("WARN", `${link} takes IPv6 routes from pods: ${stderr}`);
}

/**
 * Takes the number n, and makes the veth pair: the pod's address ends in n, the
 * host veth is vethN, with a second name for DEL. The pod's end is born in the
 * pod, so the node may have an eth0 of its own. Its MAC follows from the
 * address: whoever has that in an ARP cache reaches the new pod too. Hairpin
 * lets a pod reach itself through its own Service.
 */
async function makeVeth(call: Call, podCIDR: PodCIDR) {
  const { netns, ifname, conf, alias } = call;
  const mtu = conf.mtu ? ` mtu ${conf.mtu}` : "";
  let cni0 = markOf(podCIDR); // a bridge that was not prepared has no such name
  for (let n = await ipam.nextNumber(podCIDR);; cni0 = BRIDGE) {
    const podIP = ipam.address(podCIDR, n);
    const hostMac = `address ${macOf(podIP, 0x59)}`;
    const named = `link property add dev veth${n} altname ${altnameOf(alias)}`;
    const peer = `${ifname}${mtu} address ${macOf(podIP)} netns "${netns}"`;
    try {
      const [[bridge], [hostVeth]] = await ip(`
        link show dev ${cni0}
        link set ${BRIDGE} up
        addr replace ${ipam.address(podCIDR, 1)}/${podCIDR.prefix} dev ${BRIDGE}
        link add veth${n}${mtu} ${hostMac} type veth peer name ${peer}
        ${cni0 === BRIDGE || alias.length > 127 ? "" : named}
        link set veth${n} alias ${alias} master ${BRIDGE} up
        link set veth${n} type bridge_slave hairpin on
        link show dev veth${n}`);
      // The kernel tells the peer's namespace only if it is another one.
      const isOwn = hostVeth.link_netnsid === undefined;
      if (isOwn) fail(4, `CNI_NETNS ${netns} is the node's own namespace`);
      return { bridge, hostVeth, address: `${podIP}/${podCIDR.prefix}` };
    } catch (error: Any) {
      const unmarked = `ip link show dev ${markOf(podCIDR)}`;
      if (error.message === unmarked) await makeBridge(podCIDR);
      // An ADD without a DEL before: that one goes by its alias alone.
      if (error.message === `ip ${named}`) await ip(`link del veth${n}`);
      if ([unmarked, `ip ${named}`].includes(error.message)) continue;
      const noPair = /^ip (addr|link (add|set cni0|show dev cni0))\b/;
      if (!noPair.test(error.message)) await takeBack(call, error);
      // No pair was made, and the kernel does not tell if for the pod's end.
      const [[podVeth]] = await inPod(netns, `link show dev ${ifname}`)
        .catch(({ details }) => {
          if (!/network namespace/.test(details)) return [[]];
          return fail(4, `CNI_NETNS ${netns} is no network namespace`, details);
        });
      if (podVeth) fail(100, `${ifname} exists already in ${netns}`, "DEL it");
      // Or is it vethN? Only now, since on a full node the list is long.
      const used = await usedNumbers(podCIDR);
      if (!used.has(n)) throw error;
      n = await ipam.nextNumber(podCIDR, used);
    }
  }
}

/** Takes back what an ADD made, as DEL does, and passes its error on. */
async function takeBack(call: Call, error: unknown): Promise<never> {
  await del(call).catch(() => {}); // what stays has the alias: DEL finds it
  throw error;
}

/** DEL: takes the attachment away, as often as asked, whatever is left. */
async function del(call: Call): Promise<Answer> {
  const { name, netns, ifname, alias } = call;
  const altname = altnameOf(alias);
  const lines = `link show dev ${altname}\nlink del ${altname}\nlink show`;
  const answers = await ip(lines, "-force").catch((error) => {
    if (!error.message.includes(altname)) throw error;
    return ip("link show"); // too long, or an `ip` before 5.4
  });
  const [links, gone = []] = answers.reverse();
  let ours = links.filter((link) => link.ifalias === alias);
  if (!gone.length && !ours.length && netns) {
    // Was an ADD killed before it wrote the alias? The ends know each other.
    const [[end]] = await inPod(netns, `link show dev ${ifname}`)
      .catch((): Any[][] => [[]]);
    ours = links.filter(({ ifalias, ifindex, link_index }) =>
      !ifalias && ifindex === end?.link_index && link_index === end.ifindex
    );
  }
  // With the host veth go the pod's end, its address and its route.
  const left = await removeLinks(ours, links);
  if (name) unname(name, left);
  const names = [...gone, ...ours].map((link) => link.ifname);
  return [names.join(" ") || "nothing left"];
}

/** CHECK: is all as ADD answered it? If not, says all that is missing. */
async function check(call: Call): Promise<Answer> {
  const { name, netns, ifname, conf, alias } = call;
  const podCIDR = ipam.parsePodCIDR(conf.podcidr);
  const gateway = ipam.address(podCIDR, 1);
  const { interfaces = [], ips = [], routes = [] }: Record<string, Any[]> =
    conf.prevResult ?? fail(7, "CHECK needs the prevResult that ADD answered");
  const index = interfaces.findIndex((it) => it.name === ifname && it.sandbox);
  const { address } = ips.find((ip) => ip.interface === index) ?? {};
  // A plugin after this one may replace the route, and then says so.
  const isOurs = (it: Any) => it.dst === "0.0.0.0/0" && it.gw === gateway;

  const [links] = await ip("link show");
  const hostVeth = links.find((link) => link.ifalias === alias);
  const bridge = await lookAtBridge(podCIDR);
  const isNamed = !name ||
    linkTarget(name)?.endsWith(netns.replace(/^\/var\/run/, "/run"));
  const lines = `
    addr show dev ${ifname}
    route show default via ${gateway} dev ${ifname}`;
  const [[podVeth], [route]] = await inPod(netns, lines)
    .catch((): Any[][] => [[], []]);
  const expected: [isThere: unknown, what: string][] = [
    [hostVeth?.flags.includes("UP"), `veth with alias ${alias} that is up`],
    [hostVeth?.master === BRIDGE, `veth of it on ${BRIDGE}`],
    [bridge?.flags.includes("UP"), `${BRIDGE} that is up`],
    [bridge?.hasGateway, `${BRIDGE} with ${gateway}`],
    [isNamed, `name ${name} for ${netns}`],
    [podVeth?.flags.includes("UP"), `${ifname} in ${netns} that is up`],
    [addressesOf(podVeth).includes(address), `${ifname} with ${address}`],
    [podVeth?.address === interfaces[index]?.mac, `${ifname} with its MAC`],
    [route || !routes.some(isOurs), `default route via ${gateway}`],
  ];
  const missing = expected.flatMap(([isThere, what]) => isThere ? [] : what);
  if (!missing.length) return ["as ADD left it"];
  return fail(101, "Not as ADD left it", `no ${missing.join(", no ")}`);
}

/** GC: removes what is this network's and not in the runtime's list. */
async function gc({ conf }: Call): Promise<Answer> {
  // No list is not an empty list: better a leftover than a pod without network.
  if (!conf[VALID]) return [`no ${VALID}: removed nothing`];
  const valid: string[] = conf[VALID].map(({ containerID, ifname }: Any) =>
    `${conf.name}/${containerID}/${ifname}`
  );
  const [links] = await ip("link show");
  const stale = links.filter(({ ifalias = "" }) =>
    ifalias.startsWith(`${conf.name}/`) && !valid.includes(ifalias)
  );
  const left = await removeLinks(stale, links);
  // A namespace that went without a DEL took its veth along, not its name: a
  // link to nowhere, by the long hexadecimal number that is a runtime's ID.
  const ended = stale.map(({ ifalias }) => ifalias.split("/")[1]);
  ensureDirSync(NETNS_DIR);
  for (const { name } of Deno.readDirSync(NETNS_DIR)) {
    const path = join(NETNS_DIR, name);
    const isLost = /^[\da-f]{32,}$/.test(name) && !existsSync(path);
    if (isLost || ended.includes(name)) unname(path, left);
  }
  return [stale.map((link) => link.ifname).join(" ") || "nothing stale"];
}

/** STATUS: would an ADD succeed now? A full node is no fault: pods end. */
async function status({ conf }: Call): Promise<Answer> {
  await lookAtBridge(ipam.parsePodCIDR(conf.podcidr))
    .then(ipam.checkCounter)
    .catch((it) => fail(50, `No pod can be added: ${it.message}`, it.details));
  return [""]; // runtimes ask every few seconds: not a line each in the log
}

/** Reads the call, lets its verb run, answers the runtime, writes the log. */
async function main(): Promise<number> {
  const command = Deno.env.get("CNI_COMMAND");
  if (!command) {
    console.error(`custom-cni ${deno.version}, for CNI ${VERSIONS.join(", ")}`);
    console.error("To look at this node: deno run -A node-setup.ts --check");
    return 0;
  }
  const who = ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME"]
    .flatMap((name) => Deno.env.get(name) || []).join(" ");
  let conf: Any = {};
  try {
    conf = readStdin(command);
    const [note, result] = await answer(command, conf);
    if (result) console.log(JSON.stringify(result, null, 2));
    if (note) log("INFO", `${who} ${note}`);
    return 0;
  } catch (error: Any) {
    // What is no CNIError is a fault of this program, and is answered too.
    const { code = 999, message: msg, details = "" } = error;
    const asked = VERSIONS.find((version) => version === conf.cniVersion);
    const cniVersion = asked ?? VERSIONS.at(-1);
    console.log(JSON.stringify({ cniVersion, code, msg, details }, null, 2));
    log("ERROR", `${who} error ${code}: ${msg}; ${details}`);
    return 1;
  }
}

/** The configuration on stdin, which only the verbs about a network need. */
function readStdin(command: string): Any {
  const decoder = new TextDecoder("utf-8", { fatal: true });
  const chunk = new Uint8Array(65536);
  let text = "";
  try {
    // A stream would read it as well, two milliseconds later.
    for (let n; (n = Deno.stdin.readSync(chunk)) !== null;) {
      text += decoder.decode(chunk.subarray(0, n), { stream: true });
    }
    return parseConf(text);
  } catch (error) {
    return VERBS.has(command) ? fail(6, "No conf on stdin", `${error}`) : {};
  }
}

/** Reads a configuration; throws if it is no JSON object. */
export function parseConf(text: string): Any {
  // Go's JSON takes null for absent, and runtimes are written in Go.
  const conf = JSON.parse(text, (_, value) => value ?? undefined);
  return like({})(conf) ? conf : fail(6, "It is not a JSON object");
}

/** Checks the call from the outside in, and hands it to its verb. */
async function answer(command: string, conf: Any): Promise<Answer> {
  const { cniVersion = "0.1.0" } = conf; // as of old
  if (command === "GET") return ["a no-op"];
  if (command === "VERSION") {
    return [cniVersion, { cniVersion, supportedVersions: VERSIONS }];
  }
  const unknown = `CNI_COMMAND ${JSON.stringify(command)} is unknown`;
  const [since, needs, verb] = VERBS.get(command) ??
    fail(4, unknown, `one of ${[...VERBS.keys()]}`);
  const read = (name: string) => Deno.env.get(`CNI_${name}`) ?? "";
  const bad = Object.entries(VARIABLES)
    .filter(([name, valid]) => needs.includes(name) && !valid.test(read(name)))
    .map(([name]) => `CNI_${name}=${JSON.stringify(read(name))}`);
  if (bad.length) fail(4, `Missing or bad: ${bad.join()}`, "see the CNI spec");
  checkConf(conf);
  if (conf.cniVersion < since) fail(1, `${command} came with CNI ${since}`);
  logLevel = conf.logLevel ?? logLevel;

  const [containerID, netns, ifname] = Object.keys(VARIABLES).map(read);
  const alias = `${conf.name}/${containerID}/${ifname}`;
  const path = join(NETNS_DIR, containerID);
  const name = netns.replace(/^\/run\//, "/var/run/") === path ? "" : path;
  return await verb({ netns, ifname, conf, name, alias });
}

/** Checks a conf but for podcidr. @throws {CNIError} 7; 1 for its version. */
export function checkConf(conf: Any): void {
  for (const [key, value] of Object.entries({ name: "", ...conf })) {
    const [must, isSo] = Object.hasOwn(KEYS, key) ? KEYS[key] : [];
    if (value === undefined || !isSo || isSo(value)) continue;
    fail(7, `${key} ${JSON.stringify(value).slice(0, 80)} must be ${must}`);
  }
  if (VERSIONS.includes(conf.cniVersion)) return;
  fail(1, `cniVersion "${conf.cniVersion}" is unknown`, `one of ${VERSIONS}`);
}

/** Tells whether a value has the types of a sample; a list may be missing. */
function like(sample: Any): (value: Any) => boolean {
  const kind = (it: Any) => Object.prototype.toString.call(it);
  return (value) => {
    if (value === undefined) return Array.isArray(sample);
    if (kind(value) !== kind(sample)) return false;
    if (Array.isArray(sample)) return value.every(like(sample[0]));
    return Object.keys(sample).every((key) => like(sample[key])(value[key]));
  };
}

/**
 * Has one `ip` do some lines, and returns what those that show answer. With
 * -force it goes on after a bad one. @throws {CNIError} 100 with the bad line.
 */
export async function ip(text: string, ...options: string[]): Promise<Any[][]> {
  const lines = text.split("\n").map((line) => line.trim()).filter(Boolean);
  for (const line of lines) log("DEBUG", ["ip", ...options, line].join(" "));
  const args = [...options, "-json", "-batch", "-"];
  const { code, stdout, stderr } = await run("ip", args, lines.join("\n"));
  const answers = stdout.split("\n").filter(Boolean);
  if (code && !(options.includes("-force") && answers.length)) {
    const failed = Number(/failed -:(\d+)/.exec(stderr)?.[1] ?? 1);
    fail(100, `ip ${lines[failed - 1]}`, stderr);
  }
  // `ip` leaves control characters in the alias of a link as they are.
  return answers.map((json) => JSON.parse(json.replace(/[^ -\uffff]/g, " ")));
}

/** `ip` inside a namespace. */
function inPod(netns: string, lines: string): Promise<Any[][]> {
  // -n looks below /var/run/netns; from there a path may go up to any other.
  return ip(lines, "-n", `../../..${netns}`);
}

/** Runs a program to its end. @throws {CNIError} 100 if it can't, or hangs. */
export async function run(program: string, args: string[], input = "") {
  if (program !== "ip") log("DEBUG", `${program} ${args.join(" ")}`);
  const signal = AbortSignal.timeout(30_000);
  let child: Deno.ChildProcess;
  try {
    child = new Deno.Command(program, {
      args,
      cwd: "/", // the one of the caller may be gone
      // containerd sets LD_LIBRARY_PATH, with which Deno starts no program.
      clearEnv: true,
      env: { PATH: Deno.env.get("PATH") ?? "" },
      ...{ stdin: "piped", stdout: "piped", stderr: "piped" },
      signal,
    }).spawn();
  } catch (error) {
    const message = `${program} is not on the PATH, or does not start`;
    return fail(100, message, `apt-get install iproute2 coreutils; ${error}`);
  }
  const stdin = child.stdin.getWriter();
  stdin.write(new TextEncoder().encode(`${input}\n`)).then(() => stdin.close())
    .catch(() => {}); // it has ended, and its status tells why
  const late = new CNIError(100, `${program} hangs`, `30 seconds for ${input}`);
  const { code, ...output } = await ipam.orLate(signal, late, child.output());
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes).trim();
  return { code, stdout: text(output.stdout), stderr: text(output.stderr) };
}

/** Deletes links and returns what is left; one may go by itself meanwhile. */
async function removeLinks(links: Any[], all: Any[]): Promise<Any[]> {
  if (!links.length) return all;
  const lines = links.map(({ ifname }) => `link del ${ifname}\n`);
  const [left] = await ip(`${lines.join("")}link show`, "-force");
  const indexes = links.map(({ ifindex }) => ifindex);
  const stuck = left.find(({ ifindex }) => indexes.includes(ifindex));
  return stuck ? fail(100, `ip link del ${stuck.ifname}`, "it stays") : left;
}

/**
 * The bridge, if it is there. @throws {CNIError} 7 if it is no bridge, or if
 * the node reaches addresses of the range another way.
 */
export async function lookAtBridge(podCIDR: PodCIDR): Promise<Any> {
  const gateway = `${ipam.address(podCIDR, 1)}/${podCIDR.prefix}`;
  // -4 leaves out links without an address, such as all the veths.
  const show = `addr show\nlink show dev ${BRIDGE} type bridge`;
  const [links, [bridge] = []] = await ip(show, "-force", "-4");
  const mend = `if it is not needed: ip link del ${BRIDGE}`;
  if (bridge && !bridge.ifname) fail(7, `${BRIDGE} is not a bridge`, mend);
  for (const link of links) {
    const isBridge = link.ifname === BRIDGE;
    const addresses = addressesOf(link);
    if (bridge && isBridge) bridge.hasGateway = addresses.includes(gateway);
    const taken = addresses.find((address) =>
      !(isBridge && address === gateway) && ipam.overlaps(podCIDR, address)
    );
    if (!taken) continue;
    const why = `${link.ifname} has ${taken}, ${BRIDGE} is to get ${gateway}`;
    const message = `podcidr ${podCIDR.text} is the node's already`;
    fail(7, message, isBridge ? `${why}; ${mend}` : why);
  }
  return bridge;
}

/** The numbers of a range that are in use: those whose vethN exists. */
export async function usedNumbers({ size }: PodCIDR) {
  const [links] = await ip("link show");
  const names = links.flatMap((link) => [link.ifname, ...link.altnames ?? []]);
  const numbers = names.map((name) => Number(/^veth(\d+)$/.exec(name)?.[1]));
  return new Set(numbers.filter((n) => n > 1 && n < size - 1));
}

/** Takes the name away with the container's last interface, if it is a link. */
function unname(name: string, links: Any[]): void {
  const isOf = ({ ifalias = "" }) => name.endsWith(`/${ifalias.split("/")[1]}`);
  if (!links.some(isOf) && linkTarget(name)) Deno.removeSync(name);
}

/** Where a symbolic link points; nowhere for anything else. */
function linkTarget(path: string): string | undefined {
  try {
    return Deno.readLinkSync(path);
  } catch {
    return undefined;
  }
}

/** The addresses of a link, with their prefixes. */
function addressesOf(link: Any): string[] {
  return link?.addr_info?.map((a: Any) => `${a.local}/${a.prefixlen}`) ?? [];
}

/** The MAC 0a:58 and the four bytes of the address; 0a:59 for the host veth. */
function macOf(address: string, second = 0x58): string {
  const bytes = [0x0a, second, ...address.split(/[./]/, 4).map(Number)];
  return bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(":");
}

let logLevel: LevelName = "INFO";

/** A line for the operator. A full disk must not fail a pod. */
function log(level: LevelName, line: string): void {
  if (LogLevels[level] < LogLevels[logLevel]) return;
  const ms = level === "DEBUG" ? "" : ` (${Math.round(performance.now())} ms)`;
  // No input may begin a line of its own. (For \p{Cc} V8 loads a whole table.)
  const text = line.replace(/[^ -~\xa0-\u2027\u202a-\uffff]+/g, " ");
  try {
    // FileHandler creates a file with no mode of our choice.
    Deno.openSync(LOG, { append: true, create: true, mode: 0o640 }).close();
    using file = new FileHandler(level, { filename: LOG, bufferSize: 0 });
    file.setup();
    file.log(`${new Date().toISOString()} ${text}${ms}`);
  } catch (error) {
    console.error(`custom-cni: no line in ${LOG}: ${error}`);
  }
}

if (import.meta.main) Deno.exit(await main());
