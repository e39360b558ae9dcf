/**
 * custom-cni: the CNI plugin that a container runtime runs for every pod.
 *
 * It follows the tutorial's shell script step by step: a bridge cni0, a veth
 * pair for each pod, an address from the node's pod CIDR, a default route. The
 * runtime passes the call in CNI_* variables and the conf, the network's
 * configuration, on stdin. The answer is JSON on stdout
 * (https://www.cni.dev/docs/spec/).
 *
 * The kernel is the only database. The alias of each host veth, the node's end
 * of a pair, names its owner. So DEL, CHECK and GC find it, whatever is lost.
 *
 * @module
 */
import { ensureDirSync } from "@std/fs/ensure-dir";
import { existsSync } from "@std/fs/exists";
import { FileHandler } from "@std/log/file-handler";
import { type LevelName, LogLevelNames } from "@std/log/levels";
import { Logger, type LogRecord } from "@std/log/logger";
import { join } from "@std/path/posix/join";
import deno from "./deno.json" with { type: "json" };
import * as ipam from "./ipam.ts";
import { CNIError, fail, type PodCIDR } from "./ipam.ts";

const BRIDGE = "cni0";
const LOG = "/var/log/cni.log";
const NETNS_DIR = "/var/run/netns"; // where `ip netns` looks
const VERSIONS = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/** The pod that a call is about (CNI spec, section 2, "Parameters"). */
interface Call {
  containerID: string;
  netns: string;
  ifname: string;
  /** NAME/CONTAINERID/IFNAME: marks the host veth of this attachment. */
  alias: string;
  /** The symlink that `ip netns` follows to netns; none if it is netns. */
  name?: string;
}

/** What a verb returns: a result for the runtime, a note for the log. */
interface Answer {
  result?: object;
  note?: string;
}

/** Reads the call, runs its verb, and answers the runtime. */
async function main(): Promise<number> {
  const command = Deno.env.get("CNI_COMMAND");
  if (!command) {
    console.error(`custom-cni ${deno.version}, for CNI ${VERSIONS.join(", ")}`);
    console.error("To check this node: deno run -A node-setup.ts --check");
    return 0;
  }
  openLog();
  let conf: Conf | undefined;
  try {
    conf = readConf(command);
    log.levelName = logLevelOf(conf);
    const { result, note } = await answer(command, conf);
    if (result) console.log(JSON.stringify(result, null, 2));
    if (note) log.info(`${caller()} ${note}`);
    return 0;
  } catch (error) {
    const { code, message: msg, details } = error instanceof CNIError
      ? error
      : new CNIError(999, "Unexpected error in custom-cni", `${error}`);
    const known = VERSIONS.find((version) => version === conf?.cniVersion);
    const cniVersion = known ?? VERSIONS.at(-1);
    console.log(JSON.stringify({ cniVersion, code, msg, details }, null, 2));
    log.error(`${caller()} error ${code}: ${msg}; ${details}`);
    return 1;
  }
}

/** The script's `case`: checks what a verb needs, then runs it. */
async function answer(command: string, conf: Conf): Promise<Answer> {
  switch (command) {
    case "ADD":
      checkConf(conf, "0.3.0");
      return await add(readCall(command, conf), conf);
    case "DEL":
      // Only the name: a bad edit of the conf must not keep pods from ending.
      checkName(conf);
      return await del(readCall(command, conf));
    case "CHECK":
      checkConf(conf, "0.4.0");
      return await check(readCall(command, conf), conf);
    case "GC":
      checkConf(conf, "1.1.0");
      return await gc(conf);
    case "STATUS":
      checkConf(conf, "1.1.0");
      return await status(conf);
    case "GET":
      return { note: "a no-op" };
    case "VERSION": {
      const { cniVersion = "0.1.0" } = conf; // from before the key existed
      const result = { cniVersion, supportedVersions: VERSIONS };
      return { result, note: cniVersion };
    }
    default: {
      const unknown = `CNI_COMMAND ${JSON.stringify(command)} is unknown`;
      return fail(4, unknown, "use ADD, DEL, CHECK, GC, STATUS or VERSION");
    }
  }
}

/** ADD: gives the pod its interface, address and route, or undoes it all. */
async function add(call: Call, conf: Conf): Promise<Answer> {
  const { netns, ifname, alias, name } = call;

  // The pod CIDR. Its first address is the gateway's.
  const podCIDR = ipam.parsePodCIDR(conf.podcidr);
  const gateway = ipam.address(podCIDR, 1);
  const oldTarget = readName(name);

  // The number n: the pod's address ends in n, and its host veth is vethN.
  let n = await ipam.nextNumber(podCIDR);
  const node = await lookAtNode(podCIDR, `veth${n}`);
  if (node.hasVeth) {
    // In use. Only now look at all links, which takes longer with many pods.
    n = await ipam.nextNumber(podCIDR, await usedNumbers(podCIDR));
  }
  const veth = `veth${n}`;
  const podIP = ipam.address(podCIDR, n);
  const address = `${podIP}/${podCIDR.prefix}`;

  // The bridge cni0. The node's first ADD creates it.
  const bridge = node.readyBridge ?? await makeBridge(podCIDR, node.bridge);

  try {
    // The veth pair. The pod's end is created inside the pod, so the node may
    // have its own eth0. The host veth goes up and onto the bridge. Hairpin
    // lets a pod reach itself through its own Service.
    const mtu = conf.mtu ? ` mtu ${conf.mtu}` : "";
    const hostEnd = `${veth}${mtu} address ${macOf(podIP, HOST_MAC)}`;
    const podEnd = `${ifname}${mtu} address ${macOf(podIP)}`;
    const [hostVeth]: Link[] = await ip(`
      link add ${hostEnd} type veth peer name ${podEnd} netns "${netns}"
      link set ${veth} alias ${alias} master ${BRIDGE} up
      link set ${veth} type bridge_slave hairpin on
      link show dev ${veth}`);
    // The kernel shows the other end's namespace only if it is a different one.
    if (hostVeth.link_netnsid === undefined) {
      fail(4, `CNI_NETNS ${netns} is the node's own namespace`);
    }

    // In the pod: up, address, default route; then read the MAC. `append` keeps
    // another network's default route first. On the node: a name for the
    // namespace, so that `ip netns exec CONTAINERID` works.
    const inside = `
      link set ${ifname} up
      addr add ${address} dev ${ifname}
      route append default via ${gateway} dev ${ifname}
      link show dev ${ifname}`;
    const [[podVeth]] = await Promise.all([
      inNewPod(netns, ifname, inside),
      giveName(name, netns),
    ]);

    // The result. As in the script, the pod's interface comes first, but after
    // those of earlier plugins in the chain.
    const { cniVersion, prevResult = {} } = conf;
    const { interfaces = [], ips = [], routes = [], dns = {} } = prevResult;
    const version = cniVersion < "1.0.0" ? "4" : undefined;
    const result = {
      cniVersion,
      interfaces: [
        ...interfaces,
        { name: ifname, mac: podVeth.address, sandbox: netns },
        { name: veth, mac: hostVeth.address },
        { name: BRIDGE, mac: bridge.address },
      ],
      ips: [
        ...ips,
        { version, address, gateway, interface: interfaces.length },
      ],
      routes: [...routes, { dst: "0.0.0.0/0", gw: gateway }],
      dns: conf.dns ?? dns,
    };
    return { result, note: `${address} ${veth}` };
  } catch (error) {
    await undo(call, veth, oldTarget);
    throw await explain(error, call, veth);
  }
}

/** What ADD must know about the node before it changes anything. */
interface NodeState {
  bridge?: Link;
  /** The bridge, if it needs no change. */
  readyBridge?: Link;
  /** Whether the node's route to its pods goes through the bridge. */
  hasRoute: boolean;
  /** Whether the veth exists, if the question was asked. */
  hasVeth: boolean;
}

/**
 * Looks at the node: the bridge, perhaps one veth, and the routes into the pod
 * CIDR.
 * The answer of `ip` does not grow with the number of pods.
 *
 * @throws {CNIError} 7 if cni0 is not a bridge or has an address of another
 * pod CIDR, or if a route into the pod CIDR does not use cni0.
 */
export async function lookAtNode(
  podCIDR: PodCIDR,
  veth?: string,
): Promise<NodeState> {
  const gateway = ipam.address(podCIDR, 1);
  const cidr = `${gateway}/${podCIDR.prefix}`;
  // -force: go on if cni0 or the veth does not exist.
  const look = `
    route show root ${podCIDR.text}
    route show table local root ${podCIDR.text}
    addr show dev ${BRIDGE}
    ${veth ? `link show dev ${veth}` : ""}`;
  const answers = await ip(look, "-force", "-details");
  const routes: Route[] = answers.filter((it) => it.dst);
  const links: Link[] = answers.filter((it) => it.ifname);
  // Only "addr show" answers with addr_info, even if that is empty.
  const bridge = links.find((link) => link.addr_info);
  const hasVeth = links.some((link) => !link.addr_info);

  const fix = `ip link del ${BRIDGE}, which cuts off its pods`;
  const isBridge = bridge?.ifname === BRIDGE &&
    bridge.linkinfo?.info_kind === "bridge";
  if (bridge && !isBridge) {
    fail(7, `${BRIDGE} is not a bridge`, fix);
  }
  const taken = `podcidr ${podCIDR.text} is already in use on this node`;
  for (const other of addressesOf(bridge)) {
    if (other !== cidr && ipam.overlaps(podCIDR, other)) {
      fail(7, taken, `${BRIDGE} has ${other} instead of ${cidr}; ${fix}`);
    }
  }
  for (const { dst, dev } of routes) {
    if (dev !== BRIDGE) {
      fail(7, taken, `its route to ${dst} uses ${dev ?? "no device"}`);
    }
  }

  // The kernel keeps this route while the bridge is up and has the address.
  const hasRoute = routes.some((route) =>
    route.dst === podCIDR.text && route.prefsrc === gateway
  );
  const isReady = hasRoute && bridge?.ifalias === PREPARED;
  const readyBridge = isReady ? bridge : undefined;
  return { bridge, readyBridge, hasRoute, hasVeth };
}

/** The alias of a bridge that makeBridge() has prepared. */
const PREPARED = "custom-cni";

/** Creates the bridge, or repairs an existing one. */
async function makeBridge(podCIDR: PodCIDR, bridge?: Link): Promise<Link> {
  const gateway = ipam.address(podCIDR, 1);
  // A fixed MAC. Without one, a bridge takes the MAC of a port and changes it
  // when that pod ends. ARP caches would still have the old one.
  const mac = bridge?.address ?? macOf(gateway);
  if (!bridge) {
    // -force: another ADD may have just created it.
    const make = `
      link add ${BRIDGE} address ${mac} type bridge
      link show dev ${BRIDGE}`;
    await ip(make, "-force");
  }
  await deafenBridge();
  const route = `${podCIDR.text} dev ${BRIDGE} proto kernel scope link`;
  const [made] = await ip(`
    link set ${BRIDGE} address ${mac} alias ${PREPARED} up
    addr replace ${gateway}/${podCIDR.prefix} dev ${BRIDGE}
    route replace ${route} src ${gateway}
    link show dev ${BRIDGE}`);
  return made;
}

/**
 * The setting that makes a link deaf to IPv6 router advertisements, which any
 * pod may send. It works only before the link is up. With slashes, since an
 * ifname may have a dot (eth0.1): see sysctl(8).
 */
const deafness = (link: string) => `net/ipv6/conf/${link}/accept_ra=0`;

/** Makes the bridge deaf. If the kernel can't, no pod fails. */
async function deafenBridge(): Promise<void> {
  const command = ["sysctl", "-eqw", deafness(BRIDGE)];
  log.debug(command.join(" "));
  let complaint: string;
  try {
    complaint = (await run(command)).stderr;
  } catch (error) {
    complaint = `${error}`;
  }
  if (complaint) {
    log.warn(`${BRIDGE} accepts IPv6 routes from pods: ${complaint}`);
  }
}

/** The numbers in use: those whose host veths exist. */
async function usedNumbers(podCIDR: PodCIDR): Promise<Set<number>> {
  const links: Link[] = await ip("link show");
  const used = new Set<number>();
  for (const link of links) {
    const [, digits] = /^veth(\d+)$/.exec(link.ifname) ?? [];
    used.add(Number(digits));
    // A host veth that somebody renamed still has its MAC.
    used.add(numberInMAC(link, podCIDR));
  }
  return new Set([...used].filter((n) => ipam.isForPod(podCIDR, n)));
}

/** The number in the MAC of a host veth; NaN for any other link. */
export function numberInMAC({ address = "" }: Link, podCIDR: PodCIDR): number {
  if (!address.startsWith(HOST_MAC)) return NaN;
  const bytes = address.split(":").slice(2).map((hex) => parseInt(hex, 16));
  return ipam.numberOf(podCIDR, bytes.join("."));
}

/** The first two bytes of each host veth's MAC. */
const HOST_MAC = "0a:59";

/**
 * A MAC made from the pod's address: 0a:58 and its four bytes, or 0a:59 for the
 * host veth. When a new pod gets the address, old ARP entries are still right.
 */
function macOf(podIP: string, start = "0a:58"): string {
  const bytes = podIP.split(".").map(Number);
  const hex = bytes.map((byte) => byte.toString(16).padStart(2, "0"));
  return [start, ...hex].join(":");
}

/**
 * The target of a container's name before ADD, if there is one.
 *
 * @throws {CNIError} 4 if the name is not a symlink but a namespace itself.
 */
function readName(name?: string): string | undefined {
  ensureDirSync(NETNS_DIR);
  for (const entry of Deno.readDirSync(NETNS_DIR)) {
    if (join(NETNS_DIR, entry.name) !== name) continue;
    if (entry.isSymlink) return Deno.readLinkSync(name);
    fail(4, "CNI_CONTAINERID is the name of another namespace", name);
  }
}

/** Names a namespace after its container. */
async function giveName(name: string | undefined, netns: string) {
  if (!name) return;
  // Not by Deno.symlink(), which needs permission to write everywhere.
  const command = ["ln", "-sfT", netns, name];
  log.debug(command.join(" "));
  const { code, stderr } = await run(command);
  if (code !== 0) fail(100, command.join(" "), stderr);
}

/** Removes what this ADD created, and nothing that existed before it. */
async function undo(
  call: Call,
  veth: string,
  oldTarget?: string,
): Promise<void> {
  const { name } = call;
  deadline = undefined; // another half minute
  try {
    const links: Link[] = await ip(`link show dev ${veth}`);
    await deleteLinks(await findOurs(call, links), links);
  } catch {
    // It was never created, or it stays and DEL finds it by its alias.
  }
  try {
    if (oldTarget) {
      await giveName(name, oldTarget);
    } else if (name && linkTarget(name)) {
      Deno.removeSync(name);
    }
  } catch {
    // It stays, and the next DEL removes it.
  }
}

/** Rewords those errors of the kernel that runtimes and operators meet. */
async function explain(error: unknown, call: Call, veth: string) {
  if (!(error instanceof CNIError)) return error;
  const { message, details } = error;
  if (details.includes("Exchange full")) {
    const full = `${BRIDGE} has 1023 ports, the most that a bridge can have`;
    return new CNIError(11, full, "a pod must end first");
  }
  if (!message.startsWith("ip link add")) return error;
  if (details.includes("File exists")) {
    try {
      // Two ADDs take one number if somebody deletes the counter in between.
      await ip(`link show dev ${veth}`);
      return new CNIError(11, `${veth} belongs to another pod`, "try again");
    } catch {
      const exists = `${call.ifname} already exists in ${call.netns}`;
      return new CNIError(100, exists, details);
    }
  }
  if (/Invalid ("netns"|argument)/.test(details)) {
    const none = `CNI_NETNS ${call.netns} is no network namespace`;
    return new CNIError(4, none, details);
  }
  return error;
}

/** DEL: removes what is left of the attachment; it may be repeated. */
async function del(call: Call): Promise<Answer> {
  const links: Link[] = await ip("link show");
  const ours = await findOurs(call, links);
  // The kernel deletes the pod's end, address and route with the host veth.
  const left = await deleteLinks(ours, links);
  if (call.name) {
    removeName(call.name, left);
  }
  return { note: namesOf(ours) || "nothing left" };
}

/**
 * Finds an attachment's host veths by their alias. If an ADD was killed before
 * it set the alias, the pod's end leads to the host veth: each end has the
 * other's index, and both MACs have the pod's address.
 */
async function findOurs(call: Call, links: Link[]): Promise<Link[]> {
  const ours = links.filter((link) => link.ifalias === call.alias);
  if (ours.length > 0 || !call.netns) return ours;
  try {
    const [podVeth] = await inPod(call.netns, `link show dev ${call.ifname}`);
    const mac = podVeth.address.replace("0a:58", HOST_MAC);
    return links.filter((link) =>
      !link.ifalias && link.address === mac &&
      link.ifindex === podVeth.link_index
    );
  } catch {
    return []; // the namespace is gone, and its veth with it
  }
}

/** Deletes links, and returns the remaining ones. */
async function deleteLinks(gone: Link[], links: Link[]): Promise<Link[]> {
  if (gone.length === 0) return links;
  const lines = gone.map((link) => `link del ${link.ifname}`);
  // -force: one may have just ended with its pod.
  const left: Link[] = await ip([...lines, "link show"].join("\n"), "-force");
  for (const { ifindex, ifname } of gone) {
    if (left.some((link) => link.ifindex === ifindex)) {
      fail(100, `ip link del ${ifname}`, "the link is still there");
    }
  }
  return left;
}

/** Removes a container's name with its last interface. */
function removeName(path: string, links: Link[]): void {
  const isIts = (link: Link) => path === nameOf(link.ifalias?.split("/")[1]);
  if (!linkTarget(path) || links.some(isIts)) return;
  try {
    Deno.removeSync(path);
  } catch (error) {
    // Another DEL of the same container was faster.
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

const namesOf = (links: Link[]) => links.map((link) => link.ifname).join(" ");

/** CHECK: is everything as ADD left it? If not, it lists what is wrong. */
async function check(call: Call, conf: Conf): Promise<Answer> {
  const { netns, ifname, alias, name } = call;
  const podCIDR = ipam.parsePodCIDR(conf.podcidr);
  const gateway = ipam.address(podCIDR, 1);
  const cidr = `${gateway}/${podCIDR.prefix}`;
  const { mac, address, needsRoute } = readPrevResult(call, conf, gateway);
  const links: Link[] = await ip("link show");
  const hostVeth = links.find((link) => link.ifalias === alias);
  const { bridge } = await lookAtNode(podCIDR);
  const { podVeth, route } = await lookIntoPod(call, gateway);
  const isNamed = !name || sameFile(linkTarget(name), netns);

  const wrong: string[] = [];
  const expect = (isRight: boolean, otherwise: string) => {
    if (!isRight) wrong.push(otherwise);
  };
  expect(isUp(hostVeth), `no host veth with alias ${alias} is up`);
  expect(hostVeth?.master === BRIDGE, `the host veth is not on ${BRIDGE}`);
  expect(isUp(bridge), `${BRIDGE} is not up`);
  expect(addressesOf(bridge).includes(cidr), `${BRIDGE} lacks ${gateway}`);
  expect(isNamed, `${name} does not point to ${netns}`);
  expect(isUp(podVeth), `${ifname} in ${netns} is not up`);
  expect(addressesOf(podVeth).includes(address), `${ifname} lacks ${address}`);
  expect(podVeth?.address === mac, `${ifname} lacks the MAC ${mac}`);
  expect(!needsRoute || route !== undefined, `no default route via ${gateway}`);
  if (wrong.length > 0) {
    fail(101, "Not as ADD left it", wrong.join(", "));
  }
  return { note: "as ADD left it" };
}

/** What the result of ADD and later plugins says about the pod's interface. */
function readPrevResult({ ifname }: Call, conf: Conf, gateway: string) {
  if (!conf.prevResult) {
    fail(7, "CHECK needs ADD's result as prevResult");
  }
  const { interfaces = [], ips = [], routes = [] } = conf.prevResult;
  const index = interfaces.findIndex((it) => it.name === ifname && it.sandbox);
  const address = ips.find((it) => it.interface === index)?.address;
  // A later plugin may remove the route, and then its result lacks it.
  const needsRoute = routes.some((route) =>
    route.dst === "0.0.0.0/0" && route.gw === gateway
  );
  return { mac: interfaces[index]?.mac, address: `${address}`, needsRoute };
}

/** The pod's interface and its default route, if they exist. */
async function lookIntoPod({ netns, ifname }: Call, gateway: string) {
  const look = `
    addr show dev ${ifname}
    route show default via ${gateway} dev ${ifname}`;
  try {
    const answers = await inPod(netns, look);
    const podVeth: Link = answers[0];
    const route: Route | undefined = answers[1];
    return { podVeth, route };
  } catch {
    return {}; // neither exists
  }
}

export const isUp = (link?: Link) => link?.flags.includes("UP") ?? false;

/** The IPv4 addresses of a link, such as "10.240.0.1/24". */
export function addressesOf(link?: Link): string[] {
  const addresses = link?.addr_info ?? [];
  return addresses.filter(({ family }) => family === "inet")
    .map(({ local, prefixlen }) => `${local}/${prefixlen}`);
}

/** GC: removes this network's attachments that the runtime does not list. */
async function gc(conf: Conf): Promise<Answer> {
  const attachments = conf[ATTACHMENTS];
  if (!attachments) {
    // A missing list is not an empty one: better a leftover than a dead pod.
    return { note: `no ${ATTACHMENTS}: removed nothing` };
  }
  const valid = attachments.map((it) =>
    `${conf.name}/${it.containerID}/${it.ifname}`
  );
  const links: Link[] = await ip("link show");
  const stale = links.filter(({ ifalias = "" }) =>
    ifalias.startsWith(`${conf.name}/`) && !valid.includes(ifalias)
  );
  const left = await deleteLinks(stale, links);
  for (const { ifalias } of stale) {
    removeName(nameOf(ifalias!.split("/")[1]), left);
  }
  // If a pod's namespace ended without a DEL, its veth is gone, but its name
  // remains as a broken symlink. A runtime's container ID is long and in hex.
  ensureDirSync(NETNS_DIR);
  for (const { name } of Deno.readDirSync(NETNS_DIR)) {
    const path = join(NETNS_DIR, name);
    if (/^[0-9a-f]{32,}$/.test(name) && !existsSync(path)) {
      removeName(path, left);
    }
  }
  return { note: namesOf(stale) || "nothing stale" };
}

/** STATUS: would an ADD succeed now? A full node is fine: pods end. */
async function status(conf: Conf): Promise<Answer> {
  try {
    await lookAtNode(ipam.parsePodCIDR(conf.podcidr));
    ipam.checkCounter();
  } catch (error) {
    if (!(error instanceof CNIError)) throw error;
    fail(50, `No pod can be added: ${error.message}`, error.details);
  }
  return {}; // without a note: runtimes ask every few seconds
}

// deno-lint-ignore no-explicit-any -- JSON from a runtime or `ip`
export type Any = any;

const ATTACHMENTS = "cni.dev/valid-attachments";

/** The conf (CNI spec, section 1), as checkConf() accepts it. */
export interface Conf {
  cniVersion: string;
  name: string;
  podcidr?: unknown; // see parsePodCIDR()
  mtu?: number;
  dns?: object;
  logLevel?: LevelName;
  prevResult?: Partial<Result>;
  runtimeConfig?: { ips?: string[]; mac?: string };
  [ATTACHMENTS]?: { containerID: string; ifname: string }[];
}

/** The result of ADD (CNI spec, section 5, "ADD Success"). */
interface Result {
  interfaces: { name: string; mac?: string; sandbox?: string }[];
  ips: { address: string; gateway?: string; interface?: number }[];
  routes: { dst: string; gw?: string }[];
  dns: object;
}

/** Reads the conf. VERSION and GET need none. */
function readConf(command: string): Conf {
  try {
    return parseConf(readStdin());
  } catch (error) {
    if (command === "VERSION" || command === "GET") return {} as Conf;
    return fail(6, "No valid conf on stdin", `${error}`);
  }
}

/** Reads all of stdin. A stream would take two milliseconds longer. */
function readStdin(): string {
  const decoder = new TextDecoder("utf-8", { fatal: true });
  const chunk = new Uint8Array(65536);
  let text = "";
  while (true) {
    const length = Deno.stdin.readSync(chunk);
    if (length === null) return text + decoder.decode();
    text += decoder.decode(chunk.subarray(0, length), { stream: true });
  }
}

/** Parses a conf; throws if it is not a JSON object. */
export function parseConf(text: string): Any {
  // Runtimes are written in Go, where null in JSON means absent.
  const conf = JSON.parse(text, (_key, value) => value ?? undefined);
  if (!isObject(conf)) throw new TypeError("It is not a JSON object");
  return conf;
}

/**
 * Checks all keys of a conf but podcidr.
 *
 * @param since The first version that has the verb.
 * @throws {CNIError} 7 for a bad key, 1 for a bad version.
 */
function checkConf(conf: Any, since: string): void {
  const { cniVersion, mtu, dns, logLevel, runtimeConfig, prevResult } = conf;
  checkName(conf);
  if (cniVersion !== undefined && typeof cniVersion !== "string") {
    refuse(conf, "cniVersion", "a string");
  }
  const isMTU = Number.isInteger(mtu) && mtu >= 68 && mtu <= 65535;
  if (mtu !== undefined && !isMTU) {
    refuse(conf, "mtu", "68 to 65535");
  }
  if (dns !== undefined && !isObject(dns)) {
    refuse(conf, "dns", "an object");
  }
  if (logLevel !== undefined && !LogLevelNames.includes(logLevel)) {
    refuse(conf, "logLevel", `one of ${LogLevelNames}`);
  }
  if (runtimeConfig?.ips?.length > 0 || runtimeConfig?.mac) {
    refuse(conf, "runtimeConfig", "without ips and mac: ADD chooses them");
  }
  if (prevResult !== undefined && !isResult(prevResult)) {
    refuse(conf, "prevResult", "a CNI result");
  }
  if (conf[ATTACHMENTS] !== undefined && !isAttachments(conf[ATTACHMENTS])) {
    refuse(conf, ATTACHMENTS, "a list of objects with containerID and ifname");
  }
  if (cniVersion === undefined) {
    fail(1, "cniVersion is missing", `use one of ${VERSIONS}`);
  }
  if (!VERSIONS.includes(cniVersion)) {
    fail(1, `cniVersion "${cniVersion}" is unknown`, `use one of ${VERSIONS}`);
  }
  if (cniVersion < since) {
    fail(1, `cniVersion "${cniVersion}" has no such verb`, `use ${since}`);
  }
}

/** Checks the name of a network. @throws {CNIError} 7 for a bad one. */
function checkName(conf: Any): void {
  if (typeof conf.name !== "string" || !NAME.test(conf.name)) {
    refuse(conf, "name", `like ${NAME}`);
  }
}

/** A valid network name or container ID. The two fit into an alias. */
const NAME = /^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,118}$/;

function refuse(conf: Any, key: string, must: string): never {
  const value = JSON.stringify(conf[key])?.slice(0, 80) ?? "is missing, and";
  return fail(7, `${key} ${value} must be ${must}`);
}

function isObject(it: unknown): boolean {
  return typeof it === "object" && it !== null && !Array.isArray(it);
}

function isListOfObjects(it: unknown): boolean {
  return Array.isArray(it) && Array.from(it).every(isObject);
}

function isResult(it: Any): boolean {
  if (!isObject(it)) return false;
  const { interfaces = [], ips = [], routes = [] } = it;
  return [interfaces, ips, routes].every(isListOfObjects);
}

function isAttachments(it: Any): boolean {
  const isOne = ({ containerID, ifname }: Any) =>
    typeof containerID === "string" && typeof ifname === "string";
  return isListOfObjects(it) && it.every(isOne);
}

/**
 * Reads the CNI_* variables of a verb about one container.
 *
 * @throws {CNIError} 4 if one is missing or bad.
 */
function readCall(command: string, conf: Conf): Call {
  const containerID = read("CNI_CONTAINERID");
  const netns = read("CNI_NETNS");
  const ifname = read("CNI_IFNAME");
  if (!NAME.test(containerID)) {
    refuseVariable("CNI_CONTAINERID", `like ${NAME}`);
  }
  if (!isIfname(ifname)) {
    refuseVariable("CNI_IFNAME", "an interface name");
  }
  // DEL may lack it, since the namespace may be gone.
  if (command !== "DEL" && !isPath(netns)) {
    refuseVariable("CNI_NETNS", "an absolute path");
  }
  const alias = `${conf.name}/${containerID}/${ifname}`;
  const path = nameOf(containerID);
  const isNamed = sameFile(path, netns);
  return {
    containerID,
    netns,
    ifname,
    alias,
    name: isNamed ? undefined : path,
  };
}

const read = (variable: string) => Deno.env.get(variable) ?? "";

function refuseVariable(variable: string, must: string): never {
  const value = JSON.stringify(read(variable));
  return fail(4, `${variable}=${value} is missing or bad`, `must be ${must}`);
}

/** Stricter than the spec: the kernel or `ip -batch` may misread the rest. */
function isIfname(text: string): boolean {
  // /proc/sys/net has folders of these names.
  if ([".", "..", "all", "default"].includes(text)) return false;
  return /^[!-~]{1,15}$/.test(text) && !/[/:%#'"\\]/.test(text);
}

/** Whether `ip -batch` reads a path between quotes unchanged. */
function isPath(text: string): boolean {
  return text.startsWith("/") && !/["#\\]|[^ -~\xa0-\uffff]/.test(text);
}

/** The path where `ip netns` looks for a container's namespace. */
const nameOf = (containerID = "") => join(NETNS_DIR, containerID);

/** Whether two paths are the same: /var/run is a symlink to /run. */
function sameFile(a = "", b = ""): boolean {
  const shorten = (path: string) => path.replace(/^\/var\/run\//, "/run/");
  return shorten(a) === shorten(b);
}

/** The target of a symlink; undefined for anything else. */
function linkTarget(path?: string): string | undefined {
  try {
    return path && Deno.readLinkSync(path);
  } catch {
    return undefined;
  }
}

/** A link, as `ip -json` shows it. */
export interface Link {
  ifindex: number;
  ifname: string;
  address?: string;
  flags: string[];
  ifalias?: string;
  master?: string;
  /** A veth's other end: its index, and its namespace if it is another one. */
  link_index?: number;
  link_netnsid?: number;
  /** Only with -details. */
  linkinfo?: { info_kind?: string; info_data?: { stp_state?: number } };
  /** Only from `ip addr`. */
  addr_info?: { local: string; prefixlen: number; family: string }[];
}

/** A route, as `ip -json` shows it. */
interface Route {
  dst: string;
  dev?: string;
  prefsrc?: string;
}

/**
 * Runs lines in one `ip -batch`, and returns the answers of the "show" lines.
 * With -force it goes on after a line that fails.
 *
 * @see {@link https://man7.org/linux/man-pages/man8/ip.8.html}
 * @throws {CNIError} 100 with the line that failed.
 */
export async function ip(text: string, ...options: string[]): Promise<Any[]> {
  return await batch(["ip", ...options], text);
}

/** The same in a pod's namespace, like the script's `ip netns exec`. */
async function inPod(netns: string, text: string): Promise<Any[]> {
  return await batch(["nsenter", `--net=${netns}`, "ip"], text);
}

/** The same in a new pod. One shell first makes it deaf, then becomes `ip`. */
async function inNewPod(netns: string, ifname: string, text: string) {
  const enter = ["nsenter", `--net=${netns}`];
  const key = deafness(ifname);
  log.debug([...enter, "sysctl", "-eqw", key].join(" "));
  // The name is an argument: as part of the script, the shell might run it.
  const script = 'sysctl -eqw "$0"; exec "$@"';
  const shell = [...enter, "/bin/sh", "-c", script, key, "ip"];
  return await batch([...enter, "ip"], text, shell);
}

/** Runs lines of `ip` by these words; logs and errors show the command. */
async function batch(
  command: string[],
  text: string,
  words = command,
): Promise<Any[]> {
  const lines = text.trim().split(/\s*\n\s*/);
  for (const line of lines) {
    log.debug([...command, line].join(" "));
  }
  const program = [...words, "-json", "-batch", "-"];
  const { code, stdout, stderr } = await run(program, lines.join("\n"));
  const isForced = command.includes("-force");
  const isSilent = stdout === "" && lines.some((it) => /\bshow\b/.test(it));
  if (isSilent || (code !== 0 && !isForced)) {
    const [, number = "1"] = /Command failed -:(\d+)/.exec(stderr) ?? [];
    const line = [...command, lines[Number(number) - 1]].join(" ");
    fail(100, line, stderr || "it answers nothing");
  }
  if (code === 0 && stderr) log.warn(`${command.join(" ")}: ${stderr}`);
  // `ip` does not escape control characters in an alias. Debian 11's escapes
  // apostrophes, which is not JSON.
  const clean = stdout.replace(/[^ -\uffff\n]/g, " ")
    .replace(/\\(.)/g, (pair, char) => char === "'" ? char : pair);
  const answers = clean.split("\n").filter(Boolean);
  return answers.flatMap((json) => JSON.parse(json));
}

/** A program's exit status and output. */
interface Output {
  code: number;
  stdout: string;
  stderr: string;
}

/** When programs that hang are stopped. */
let deadline: AbortSignal | undefined;

/** Half a minute after the first program of the call started. */
function callDeadline(): AbortSignal {
  deadline ??= AbortSignal.timeout(30_000);
  return deadline;
}

/** Runs a program. @throws {CNIError} 100 if it can't start, or hangs. */
export async function run(
  command: string[],
  input = "",
  late = callDeadline(),
): Promise<Output> {
  const [program, ...args] = command;
  let child: Deno.ChildProcess;
  try {
    child = new Deno.Command(program, {
      args,
      cwd: "/", // the caller's folder may be gone
      // containerd sets LD_LIBRARY_PATH, and Deno refuses to pass that on.
      clearEnv: true,
      env: { PATH: read("PATH") },
      stdin: input ? "piped" : "null",
      stdout: "piped",
      stderr: "piped",
      signal: late,
    }).spawn();
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) {
      return fail(100, `Cannot start ${program}`, `${error}`);
    }
    const fix = "apt-get install iproute2 coreutils util-linux";
    return fail(100, `${program} is not on the PATH`, fix);
  }
  const [{ code, stdout, stderr }] = await Promise.all([
    child.output(),
    input && write(child.stdin, `${input}\n`),
  ]);
  if (late.aborted) {
    fail(100, `${program} hangs`, `stopped after 30 seconds: ${input}`);
  }
  const decoder = new TextDecoder();
  return {
    code,
    stdout: decoder.decode(stdout).trim(),
    stderr: decoder.decode(stderr).trim(),
  };
}

async function write(stdin: WritableStream, text: string): Promise<void> {
  try {
    const writer = stdin.getWriter();
    await writer.write(new TextEncoder().encode(text));
    await writer.close();
  } catch {
    // The program ended before it read everything. Its status says why.
  }
}

/** The log. Only main() opens it, so node-setup.ts writes none. */
const log = new Logger("custom-cni", "INFO");

function openLog(): void {
  try {
    // FileHandler would create a file that everybody may read.
    Deno.openSync(LOG, { append: true, create: true, mode: 0o640 }).close();
    const file = new LogFile("NOTSET", {
      filename: LOG,
      formatter: formatLine,
      bufferSize: 0, // keeps each line even if this program is killed
    });
    file.setup();
    log.handlers.push(file);
  } catch (error) {
    console.error(`custom-cni: cannot open ${LOG}: ${error}`);
  }
}

/** The file of the log. A full disk must not fail a pod. */
class LogFile extends FileHandler {
  override log(line: string): void {
    try {
      super.log(line);
    } catch (error) {
      console.error(`custom-cni: cannot write ${LOG}: ${error}`);
    }
  }
}

/** A line of the log; all but commands have the milliseconds so far. */
function formatLine({ datetime, levelName, msg }: LogRecord): string {
  // Input must not start a new line.
  const text = msg.replace(/[^ -~\xa0-\u2027\u202a-\uffff]+/g, " ");
  const line = `${datetime.toISOString()} ${text}`;
  if (levelName === "DEBUG") return line;
  return `${line} (${Math.round(performance.now())} ms)`;
}

/** The conf's log level, or the default. */
function logLevelOf({ logLevel = "INFO" }: Conf): LevelName {
  return LogLevelNames.includes(logLevel) ? logLevel : "INFO";
}

/** The call, for the log: "ADD CONTAINERID eth0". */
function caller(): string {
  const variables = ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME"];
  return variables.map(read).filter(Boolean).join(" ");
}

if (import.meta.main) Deno.exit(await main());
