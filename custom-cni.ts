/**
 * custom-cni: the CNI plugin that a container runtime runs for every pod.
 *
 * It is the tutorial's shell script, step by step in TypeScript: a bridge cni0,
 * a veth pair for each pod, an address from the node's pod CIDR, a default
 * route. The runtime says what to do in CNI_* variables, and writes the
 * network's configuration to stdin. The answer is JSON on stdout
 * (https://www.cni.dev/docs/spec/).
 *
 * The kernel is the only database. The alias of each host veth says whose it
 * is (see `ip link`), so DEL, CHECK and GC find it whatever else was lost.
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

/** For whom a runtime calls (CNI spec, section 2, "Parameters"). */
interface Call {
  containerID: string;
  netns: string;
  ifname: string;
  /** NAME/CONTAINERID/IFNAME: marks the host veth as this attachment's. */
  alias: string;
  /** The path by which `ip netns` finds the namespace; none if that is netns. */
  name?: string;
}

/** What a verb says: to the runtime on stdout, to the operator in the log. */
interface Answer {
  result?: object;
  note?: string;
}

/** Reads the call, does what it asks for, and answers the runtime. */
async function main(): Promise<number> {
  const command = Deno.env.get("CNI_COMMAND");
  if (!command) {
    console.error(`custom-cni ${deno.version}, for CNI ${VERSIONS.join(", ")}`);
    console.error("To look at this node: deno run -A node-setup.ts --check");
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
      : new CNIError(999, "custom-cni itself is at fault", `${error}`);
    const known = VERSIONS.find((version) => version === conf?.cniVersion);
    const cniVersion = known ?? VERSIONS.at(-1);
    console.log(JSON.stringify({ cniVersion, code, msg, details }, null, 2));
    log.error(`${caller()} error ${code}: ${msg}; ${details}`);
    return 1;
  }
}

/** The script's `case`: each verb, after a check of what it needs. */
async function answer(command: string, conf: Conf): Promise<Answer> {
  switch (command) {
    case "ADD":
      checkConf(conf, "0.3.0");
      return await add(readCall(command, conf), conf);
    case "DEL":
      // Only the name: a conf that was edited badly must not keep pods here.
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
      const { cniVersion = "0.1.0" } = conf; // the one before there was a key
      const result = { cniVersion, supportedVersions: VERSIONS };
      return { result, note: cniVersion };
    }
    default: {
      const unknown = `CNI_COMMAND ${JSON.stringify(command)} is unknown`;
      return fail(4, unknown, "one of ADD, DEL, CHECK, GC, STATUS, VERSION");
    }
  }
}

/** ADD: gives the pod its interface, address and route, or leaves nothing. */
async function add(call: Call, conf: Conf): Promise<Answer> {
  const { netns, ifname, alias, name } = call;

  // podcidr, and its first address for the gateway.
  const podCIDR = ipam.parsePodCIDR(conf.podcidr);
  const gateway = ipam.address(podCIDR, 1);
  const oldTarget = readName(name);

  // The number n: the pod's address ends in it, and its host end is vethN.
  let n = await ipam.nextNumber(podCIDR);
  const node = await lookAtNode(podCIDR, `veth${n}`);
  if (node.hasVeth) {
    n = await ipam.nextNumber(podCIDR, await usedNumbers(podCIDR));
  }
  const veth = `veth${n}`;
  const podIP = ipam.address(podCIDR, n);
  const address = `${podIP}/${podCIDR.prefix}`;

  // The bridge cni0, which the node's first pod makes.
  const bridge = node.readyBridge ?? await makeBridge(podCIDR, node.bridge);

  try {
    // The veth pair. The pod's end is born in the pod, so the node may have an
    // eth0 of its own. The host end: up, and on the bridge. Hairpin lets a pod
    // reach itself through its own Service.
    const mtu = conf.mtu ? ` mtu ${conf.mtu}` : "";
    const hostEnd = `${veth}${mtu} address ${macOf(podIP, HOST_END)}`;
    const podEnd = `${ifname}${mtu} address ${macOf(podIP)}`;
    const [hostVeth]: Link[] = await ip(`
      link add ${hostEnd} type veth peer name ${podEnd} netns "${netns}"
      link set ${veth} alias ${alias} master ${BRIDGE} up
      link set ${veth} type bridge_slave hairpin on
      link show dev ${veth}`);
    // The kernel names the other end's namespace only if it is another one.
    if (hostVeth.link_netnsid === undefined) {
      fail(4, `CNI_NETNS ${netns} is the node's own namespace`);
    }

    // A name for the namespace, so that `ip netns exec CONTAINERID` works. And
    // in the pod: up, address, default route, and its MAC is read. The route is
    // appended, so the one of another network stays the first.
    const inside = `
      link set ${ifname} up
      addr add ${address} dev ${ifname}
      route append default via ${gateway} dev ${ifname}
      link show dev ${ifname}`;
    const [[podVeth]] = await Promise.all([
      inNewPod(netns, ifname, inside),
      giveName(name, netns),
    ]);

    // The result. As in the script the pod's interface is the first, but for
    // those of the plugins before this one.
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
    await takeBack(call, veth, oldTarget);
    throw await explain(error, call, veth);
  }
}

/** What ADD has to know of the node before it acts. */
interface NodeState {
  bridge?: Link;
  /** The bridge, if nothing is to be done to it. */
  readyBridge?: Link;
  /** Whether the node reaches its pods by it. */
  hasRoute: boolean;
  /** Whether a link has the name that was asked for. */
  hasVeth: boolean;
}

/**
 * Looks at the node: the bridge, a veth, and who has addresses of the range.
 * What `ip` answers does not grow with the pods.
 *
 * @throws {CNIError} 7 if cni0 is no bridge or is another range's, or if the
 * node reaches addresses of the range another way.
 */
export async function lookAtNode(
  podCIDR: PodCIDR,
  veth = "veth1", // which no pod has
): Promise<NodeState> {
  const gateway = ipam.address(podCIDR, 1);
  const cidr = `${gateway}/${podCIDR.prefix}`;
  // -force goes on where cni0 or the veth is not there.
  const look = `
    route show root ${podCIDR.text}
    route show table local root ${podCIDR.text}
    addr show dev ${BRIDGE}
    link show dev ${veth}`;
  const answers = await ip(look, "-force", "-details");
  const routes: Route[] = answers.filter((it) => it.dst);
  const links: Link[] = answers.filter((it) => it.ifname);
  // Only "addr show" tells addresses, if only that there are none.
  const bridge = links.find((link) => link.addr_info);
  const hasVeth = links.some((link) => !link.addr_info);

  const mend = `ip link del ${BRIDGE}, which cuts off the pods that are on it`;
  const isBridge = bridge?.ifname === BRIDGE &&
    bridge.linkinfo?.info_kind === "bridge";
  if (bridge && !isBridge) {
    fail(7, `${BRIDGE} is not a bridge`, mend);
  }
  const taken = `podcidr ${podCIDR.text} is the node's already`;
  for (const other of addressesOf(bridge)) {
    if (other !== cidr && ipam.overlaps(podCIDR, other)) {
      fail(7, taken, `${BRIDGE} has ${other}, is to get ${cidr}; ${mend}`);
    }
  }
  for (const { dst, dev } of routes) {
    if (dev !== BRIDGE) {
      fail(7, taken, `its route to ${dst} is by ${dev ?? "no device"}`);
    }
  }

  // The kernel has this route while the bridge is up and has the address.
  const hasRoute = routes.some((route) =>
    route.dst === podCIDR.text && route.prefsrc === gateway
  );
  const isReady = hasRoute && bridge?.ifalias === PREPARED;
  const readyBridge = isReady ? bridge : undefined;
  return { bridge, readyBridge, hasRoute, hasVeth };
}

/** The alias of a bridge that makeBridge() has prepared. */
const PREPARED = "custom-cni";

/** Makes the bridge, or mends the one that is there. */
async function makeBridge(podCIDR: PodCIDR, bridge?: Link): Promise<Link> {
  const gateway = ipam.address(podCIDR, 1);
  // A MAC of its own, or it has that of one of its ports, and changes it when
  // that pod ends. Others' ARP caches know the old one then.
  const mac = bridge?.address ?? macOf(gateway);
  if (!bridge) {
    // -force: another ADD may make it at this moment.
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
 * What makes a link that is down yet deaf to IPv6's router advertisements, which
 * any pod may send: see sysctl(8). With slashes, since the name of a link may
 * have a dot: eth0.1.
 */
const deafness = (link: string) => `net/ipv6/conf/${link}/accept_ra=0`;

/** A kernel that can't do so fails no pod. */
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
    log.warn(`${BRIDGE} takes IPv6 routes from pods: ${complaint}`);
  }
}

/** The numbers of a range that are in use, by the host veths. */
async function usedNumbers(podCIDR: PodCIDR): Promise<Set<number>> {
  const links: Link[] = await ip("link show");
  const used = new Set<number>();
  for (const link of links) {
    const [, digits] = /^veth(\d+)$/.exec(link.ifname) ?? [];
    used.add(Number(digits));
    // Somebody may have renamed it.
    used.add(numberOf(link, podCIDR));
  }
  return new Set([...used].filter((n) => ipam.isForPod(podCIDR, n)));
}

/** The number of a host veth, by its MAC; NaN for any other link. */
export function numberOf({ address = "" }: Link, podCIDR: PodCIDR): number {
  if (!address.startsWith(HOST_END)) return NaN;
  const bytes = address.split(":").slice(2).map((hex) => parseInt(hex, 16));
  return ipam.numberOf(podCIDR, bytes.join("."));
}

/** How the MAC of each host veth begins. */
const HOST_END = "0a:59";

/**
 * A MAC that follows from the pod's address: 0a:58 and its four bytes, 0a:59
 * for the host end. So whoever has an address in its ARP cache reaches the next
 * pod that gets it, too.
 */
function macOf(podIP: string, start = "0a:58"): string {
  const bytes = podIP.split(".").map(Number);
  const hex = bytes.map((byte) => byte.toString(16).padStart(2, "0"));
  return [start, ...hex].join(":");
}

/**
 * Where a container's name points before ADD, if it is there.
 *
 * @throws {CNIError} 4 if it is no link, but a namespace by itself.
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
  // By a program: Deno.symlink() asks for the right to write everywhere.
  const command = ["ln", "-sfT", netns, name];
  log.debug(command.join(" "));
  const { code, stderr } = await run(command);
  if (code !== 0) fail(100, command.join(" "), stderr);
}

/** Takes back what this ADD made, and nothing that was there before it. */
async function takeBack(
  call: Call,
  veth: string,
  oldTarget?: string,
): Promise<void> {
  const { name } = call;
  deadline = undefined; // half a minute more
  try {
    const links: Link[] = await ip(`link show dev ${veth}`);
    await deleteLinks(await findOurs(call, links), links);
  } catch {
    // It was never made; or it stays, and DEL finds it by its alias.
  }
  try {
    if (oldTarget) {
      await giveName(name, oldTarget);
    } else if (name && linkTarget(name)) {
      Deno.removeSync(name);
    }
  } catch {
    // It stays, and the next DEL takes it away.
  }
}

/** Puts the kernel's refusals that a runtime or an operator meets into words. */
async function explain(error: unknown, call: Call, veth: string) {
  if (!(error instanceof CNIError)) return error;
  const { message, details } = error;
  if (details.includes("Exchange full")) {
    const full = `${BRIDGE} has 1023 ports, as many as a bridge can have`;
    return new CNIError(11, full, "a pod must end first");
  }
  if (!message.startsWith("ip link add")) return error;
  if (details.includes("File exists")) {
    try {
      // Who deletes the counter while pods start lets two of them take a number.
      await ip(`link show dev ${veth}`);
      return new CNIError(11, `${veth} is another pod's`, "try again");
    } catch {
      const exists = `${call.ifname} exists already in ${call.netns}`;
      return new CNIError(100, exists, details);
    }
  }
  if (/Invalid ("netns"|argument)/.test(details)) {
    const none = `CNI_NETNS ${call.netns} is no network namespace`;
    return new CNIError(4, none, details);
  }
  return error;
}

/** DEL: takes the attachment away, as often as asked, whatever is left. */
async function del(call: Call): Promise<Answer> {
  const links: Link[] = await ip("link show");
  const ours = await findOurs(call, links);
  // With the host veth go the pod's end, its address and its route.
  const left = await deleteLinks(ours, links);
  if (call.name) {
    removeName(call.name, left);
  }
  return { note: namesOf(ours) || "nothing left" };
}

/**
 * The host veths of an attachment, by their alias. One of an ADD that was killed
 * before it wrote that is known by its pod: the ends of a pair know each other,
 * and the MACs of ours have one address.
 */
async function findOurs(call: Call, links: Link[]): Promise<Link[]> {
  const ours = links.filter((link) => link.ifalias === call.alias);
  if (ours.length > 0 || !call.netns) return ours;
  try {
    const [podVeth] = await inPod(call.netns, `link show dev ${call.ifname}`);
    const mac = podVeth.address.replace("0a:58", HOST_END);
    return links.filter((link) =>
      !link.ifalias && link.address === mac &&
      link.ifindex === podVeth.link_index
    );
  } catch {
    return []; // the namespace is gone, and its veth with it
  }
}

/** Deletes links, and returns those that are left. */
async function deleteLinks(gone: Link[], links: Link[]): Promise<Link[]> {
  if (gone.length === 0) return links;
  const lines = gone.map((link) => `link del ${link.ifname}`);
  // -force: one may end by itself meanwhile, with its pod.
  const left: Link[] = await ip([...lines, "link show"].join("\n"), "-force");
  for (const { ifindex, ifname } of gone) {
    if (left.some((link) => link.ifindex === ifindex)) {
      fail(100, `ip link del ${ifname}`, "it stays");
    }
  }
  return left;
}

/** Takes a container's name away with the last of its interfaces. */
function removeName(path: string, links: Link[]): void {
  const isOfIt = (link: Link) => path === nameOf(link.ifalias?.split("/")[1]);
  if (!linkTarget(path) || links.some(isOfIt)) return;
  try {
    Deno.removeSync(path);
  } catch (error) {
    // Another DEL of the same container was faster.
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

const namesOf = (links: Link[]) => links.map((link) => link.ifname).join(" ");

/** CHECK: is all as ADD answered it? If not, it says all that is missing. */
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

  const missing: string[] = [];
  const expect = (isThere: boolean, what: string) => {
    if (!isThere) missing.push(`no ${what}`);
  };
  expect(isUp(hostVeth), `veth with alias ${alias} that is up`);
  expect(hostVeth?.master === BRIDGE, `veth of it on ${BRIDGE}`);
  expect(isUp(bridge), `${BRIDGE} that is up`);
  expect(addressesOf(bridge).includes(cidr), `${BRIDGE} with ${gateway}`);
  expect(isNamed, `name ${name} for ${netns}`);
  expect(isUp(podVeth), `${ifname} in ${netns} that is up`);
  expect(addressesOf(podVeth).includes(address), `${ifname} with ${address}`);
  expect(podVeth?.address === mac, `${ifname} with its MAC`);
  expect(!needsRoute || route !== undefined, `default route via ${gateway}`);
  if (missing.length > 0) {
    fail(101, "Not as ADD left it", missing.join(", "));
  }
  return { note: "as ADD left it" };
}

/** What ADD, and the plugins after it, answered of the pod's interface. */
function readPrevResult({ ifname }: Call, conf: Conf, gateway: string) {
  if (!conf.prevResult) {
    fail(7, "CHECK needs the prevResult that ADD answered");
  }
  const { interfaces = [], ips = [], routes = [] } = conf.prevResult;
  const index = interfaces.findIndex((it) => it.name === ifname && it.sandbox);
  const address = ips.find((it) => it.interface === index)?.address;
  // A plugin after this one may replace the route, and then says so.
  const needsRoute = routes.some((route) =>
    route.dst === "0.0.0.0/0" && route.gw === gateway
  );
  return { mac: interfaces[index]?.mac, address: `${address}`, needsRoute };
}

/** The pod's interface and its default route, as far as they are there. */
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
    return {}; // neither is there
  }
}

export const isUp = (link?: Link) => link?.flags.includes("UP") ?? false;

/** The IPv4 addresses of a link, such as "10.240.0.1/24". */
export function addressesOf(link?: Link): string[] {
  const addresses = link?.addr_info ?? [];
  return addresses.filter(({ family }) => family === "inet")
    .map(({ local, prefixlen }) => `${local}/${prefixlen}`);
}

/** GC: removes what is this network's and not in the runtime's list. */
async function gc(conf: Conf): Promise<Answer> {
  const attachments = conf[ATTACHMENTS];
  if (!attachments) {
    // No list is no empty list: better a leftover than a pod without network.
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
  // A namespace that went without a DEL took its veth along, but not its name.
  // That is a link to nowhere now, by a runtime's ID: a long hexadecimal number.
  ensureDirSync(NETNS_DIR);
  for (const { name } of Deno.readDirSync(NETNS_DIR)) {
    const path = join(NETNS_DIR, name);
    if (/^[0-9a-f]{32,}$/.test(name) && !existsSync(path)) {
      removeName(path, left);
    }
  }
  return { note: namesOf(stale) || "nothing stale" };
}

/** STATUS: would an ADD succeed now? A full node is no fault: pods end. */
async function status(conf: Conf): Promise<Answer> {
  try {
    await lookAtNode(ipam.parsePodCIDR(conf.podcidr));
    ipam.checkCounter();
  } catch (error) {
    if (!(error instanceof CNIError)) throw error;
    fail(50, `No pod can be added: ${error.message}`, error.details);
  }
  return {}; // runtimes ask every few seconds: not a line each in the log
}

// deno-lint-ignore no-explicit-any -- what a runtime or `ip` has written
export type Any = any;

const ATTACHMENTS = "cni.dev/valid-attachments";

/** The network's configuration (CNI spec, section 1), once it is checked. */
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

/** What ADD answers (CNI spec, section 5, "ADD Success"). */
interface Result {
  interfaces: { name: string; mac?: string; sandbox?: string }[];
  ips: { address: string; gateway?: string; interface?: number }[];
  routes: { dst: string; gw?: string }[];
  dns: object;
}

/** Reads the configuration, which the verbs about a network need. */
function readConf(command: string): Conf {
  try {
    return parseConf(readStdin());
  } catch (error) {
    if (command === "VERSION" || command === "GET") return {} as Conf;
    return fail(6, "No conf on stdin", `${error}`);
  }
}

/** All of stdin. A stream would read it as well, two milliseconds later. */
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

/** Reads a configuration; throws if it is no JSON object. */
export function parseConf(text: string): Any {
  // Runtimes are written in Go, whose JSON takes null for absent.
  const conf = JSON.parse(text, (_key, value) => value ?? undefined);
  if (!isObject(conf)) throw new TypeError("It is not a JSON object");
  return conf;
}

/**
 * Checks a configuration, but for podcidr.
 *
 * @param since The version that brought the verb.
 * @throws {CNIError} 7 for a key that can't be, 1 for a version.
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
    refuse(conf, "runtimeConfig", "without ips and mac, for this one counts");
  }
  if (prevResult !== undefined && !isResult(prevResult)) {
    refuse(conf, "prevResult", "a result");
  }
  if (conf[ATTACHMENTS] !== undefined && !isAttachments(conf[ATTACHMENTS])) {
    refuse(conf, ATTACHMENTS, "a list of containerID and ifname");
  }
  if (!VERSIONS.includes(cniVersion)) {
    fail(1, `cniVersion "${cniVersion}" is unknown`, `one of ${VERSIONS}`);
  }
  if (cniVersion < since) {
    fail(1, `cniVersion "${cniVersion}" has no such verb`, `use ${since}`);
  }
}

/** Checks the name of a network. @throws {CNIError} 7 if it can't be one. */
function checkName(conf: Any): void {
  if (typeof conf.name !== "string" || !NAME.test(conf.name)) {
    refuse(conf, "name", `like ${NAME}`);
  }
}

/** What a network and a container may be called: two fit into an alias. */
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
 * @throws {CNIError} 4 for one that is missing or bad.
 */
function readCall(command: string, conf: Conf): Call {
  const containerID = read("CNI_CONTAINERID");
  const netns = read("CNI_NETNS");
  const ifname = read("CNI_IFNAME");
  if (!NAME.test(containerID)) {
    refuseVariable("CNI_CONTAINERID", `like ${NAME}`);
  }
  if (!isIfname(ifname)) {
    refuseVariable("CNI_IFNAME", "the name of an interface");
  }
  // DEL may come without it, when the namespace is gone.
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

/** Beyond the spec: nothing that the kernel or `ip -batch` takes otherwise. */
function isIfname(text: string): boolean {
  // Folders below /proc/sys/net have these names.
  if ([".", "..", "all", "default"].includes(text)) return false;
  return /^[!-~]{1,15}$/.test(text) && !/[/:%#'"\\]/.test(text);
}

/** A path that `ip -batch` reads as it is, between quotes. */
function isPath(text: string): boolean {
  return text.startsWith("/") && !/["#\\]|[^ -~\xa0-\uffff]/.test(text);
}

/** Where `ip netns` looks for a container's namespace. */
const nameOf = (containerID = "") => join(NETNS_DIR, containerID);

/** Tells whether two paths are one, for /var/run is a link to /run. */
function sameFile(a = "", b = ""): boolean {
  const shorten = (path: string) => path.replace(/^\/var\/run\//, "/run/");
  return shorten(a) === shorten(b);
}

/** Where a symbolic link points; nowhere for anything else. */
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
  /** The index of a veth's other end, and that one's namespace if another. */
  link_index?: number;
  link_netnsid?: number;
  /** With -details. */
  linkinfo?: { info_kind?: string; info_data?: { stp_state?: number } };
  /** By `ip addr`. */
  addr_info?: { local: string; prefixlen: number; family: string }[];
}

/** A route, as `ip -json` shows it. */
interface Route {
  dst: string;
  dev?: string;
  prefsrc?: string;
}

/**
 * Has one `ip` do some lines, and returns all that its "show" lines answer.
 * With -force it goes on after a line that fails.
 *
 * @see {@link https://man7.org/linux/man-pages/man8/ip.8.html}
 * @throws {CNIError} 100 with the line that failed.
 */
export async function ip(text: string, ...options: string[]): Promise<Any[]> {
  return await batch(["ip", ...options], text);
}

/** The same in a pod's namespace, as the script's `ip netns exec`. */
async function inPod(netns: string, text: string): Promise<Any[]> {
  return await batch(["nsenter", `--net=${netns}`, "ip"], text);
}

/** The same for a new pod, which is made deaf before; both by one shell. */
async function inNewPod(netns: string, ifname: string, text: string) {
  const enter = ["nsenter", `--net=${netns}`];
  const key = deafness(ifname);
  log.debug([...enter, "sysctl", "-eqw", key].join(" "));
  // The name comes as an argument, for it may have what a shell would run.
  const script = 'sysctl -eqw "$0"; exec "$@"';
  const shell = [...enter, "/bin/sh", "-c", script, key, "ip"];
  return await batch([...enter, "ip"], text, shell);
}

/** Has a command, started by these words, do some lines of `ip`. */
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
  // In a link's alias `ip` leaves control characters as they are. The one of
  // Debian 11 escapes apostrophes too, which JSON does not know.
  const clean = stdout.replace(/[^ -\uffff\n]/g, " ")
    .replace(/\\(.)/g, (pair, char) => char === "'" ? char : pair);
  const answers = clean.split("\n").filter(Boolean);
  return answers.flatMap((json) => JSON.parse(json));
}

/** How a program ended, and what it wrote. */
interface Output {
  code: number;
  stdout: string;
  stderr: string;
}

/** When programs that hang are ended: half a minute after the first began. */
let deadline: AbortSignal | undefined;

/** Runs a program to its end. @throws {CNIError} 100 if it can't, or is late. */
export async function run(
  command: string[],
  input = "",
  late = deadline ??= AbortSignal.timeout(30_000),
): Promise<Output> {
  const [program, ...args] = command;
  let child: Deno.ChildProcess;
  try {
    child = new Deno.Command(program, {
      args,
      cwd: "/", // the caller's may be gone
      // containerd sets LD_LIBRARY_PATH, with which Deno starts no program.
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
    const mend = "apt-get install iproute2 coreutils util-linux";
    return fail(100, `${program} is not on the PATH`, mend);
  }
  const [{ code, stdout, stderr }] = await Promise.all([
    child.output(),
    input && write(child.stdin, `${input}\n`),
  ]);
  if (late.aborted) {
    fail(100, `${program} hangs`, `ended after 30 seconds: ${input}`);
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
    // The program has ended before it read all, and its status tells why.
  }
}

/** The log; main() opens it, so those that import this file write none. */
const log = new Logger("custom-cni", "INFO");

function openLog(): void {
  try {
    // FileHandler makes a file that everybody may read.
    Deno.openSync(LOG, { append: true, create: true, mode: 0o640 }).close();
    const file = new LogFile("NOTSET", {
      filename: LOG,
      formatter: formatLine,
      bufferSize: 0, // what was done is told even if this program is killed
    });
    file.setup();
    log.handlers.push(file);
  } catch (error) {
    console.error(`custom-cni: cannot open ${LOG}: ${error}`);
  }
}

/** A file for the log. A full disk must not fail a pod. */
class LogFile extends FileHandler {
  override log(line: string): void {
    try {
      super.log(line);
    } catch (error) {
      console.error(`custom-cni: no line in ${LOG}: ${error}`);
    }
  }
}

/** A line of the log; each but a command tells the milliseconds so far. */
function formatLine({ datetime, levelName, msg }: LogRecord): string {
  // No input may begin a line of its own.
  const text = msg.replace(/[^ -~\xa0-\u2027\u202a-\uffff]+/g, " ");
  const line = `${datetime.toISOString()} ${text}`;
  if (levelName === "DEBUG") return line;
  return `${line} (${Math.round(performance.now())} ms)`;
}

/** The level that a conf asks for, or the usual one. */
function logLevelOf({ logLevel = "INFO" }: Conf): LevelName {
  return LogLevelNames.includes(logLevel) ? logLevel : "INFO";
}

/** Who calls, for the log: "ADD CONTAINERID eth0". */
function caller(): string {
  const variables = ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME"];
  return variables.map(read).filter(Boolean).join(" ");
}

if (import.meta.main) Deno.exit(await main());
