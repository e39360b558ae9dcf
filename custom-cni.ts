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
import { join } from "@std/path/posix/join";
import * as ipam from "./ipam.ts";
import { CNIError, fail } from "./ipam.ts";

const BRIDGE = "cni0";
const LOG = "/var/log/cni.log";
const NETNS_DIR = "/var/run/netns"; // where `ip netns` looks
const CONF_DIR = "/etc/cni/net.d";
const VERSIONS = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const NAME = /^[a-zA-Z0-9][a-zA-Z0-9_.-]*$/;
const POD = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"];
const PATIENCE = 30; // seconds for `ip`: a kubelet waits four minutes for us

/** The verbs about a network: since which version, with which variables. */
const VERBS: Record<
  string,
  { since: string; needs: string[]; run: (call: Call) => Promise<Answer> }
> = {
  ADD: { since: "0.3.0", needs: POD, run: add },
  DEL: { since: "0.3.0", needs: ["CNI_CONTAINERID", "CNI_IFNAME"], run: del },
  CHECK: { since: "0.4.0", needs: POD, run: check },
  GC: { since: "1.1.0", needs: [], run: gc },
  STATUS: { since: "1.1.0", needs: [], run: status },
};

/** One call of the runtime: who, and the network configuration on stdin. */
interface Call {
  containerID: string;
  netns: string;
  ifname: string;
  conf: Conf;
  /** NAME/CONTAINERID/IFNAME: marks the host veth as this attachment's. */
  alias: string;
}

/** The keys of the network configuration that matter here. */
interface Conf {
  cniVersion?: string;
  name?: string;
  podcidr?: unknown;
  dns?: object;
  prevResult?: Result;
  "cni.dev/valid-attachments"?: Attachment[];
}

interface Attachment {
  containerID: string;
  ifname: string;
}

/** What ADD answers (CNI spec, section 5, "ADD Success"). */
interface Result {
  interfaces?: { name: string; mac?: string; sandbox?: string }[];
  ips?: { address: string; gateway?: string; interface?: number }[];
  routes?: { dst: string; gw?: string }[];
  dns?: object;
}

/** What a verb says: to the operator in the log, and to the runtime. */
type Answer = [note: string, result?: object];

/** What `ip -json` shows of a link. */
interface Link {
  ifname: string;
  ifindex: number;
  link_index?: number;
  address: string;
  flags: string[];
  ifalias?: string;
  master?: string;
  link_netnsid?: number;
  addr_info?: { local: string; prefixlen: number }[];
}

/** A line for `ip -batch`, and the line that takes it back. */
type Step = [line: string, undo?: string];

/** A veth pair: its end on the host, and the address for that in the pod. */
type Veth = { hostEnd: Link; address: string };

/** ADD: gives the pod its interface, address and route, or leaves nothing. */
async function add(call: Call): Promise<Answer> {
  const { containerID, netns, ifname, conf } = call;
  const podCIDR = ipam.parsePodCIDR(conf.podcidr);
  const gateway = ipam.address(podCIDR, 1);
  ensureDirSync(NETNS_DIR);
  const pod = inPod(netns);
  const lookAtPod = pod.ask("link show");
  lookAtPod.catch(() => {}); // it is told below, where it is waited for
  const name = join(NETNS_DIR, containerID);
  if (netns !== name && existsSync(name) && !linkTarget(name)) {
    fail(4, `CNI_CONTAINERID ${containerID} is another namespace's name`, name);
  }
  const host = new Ip("-4"); // starts while the pod's one works

  // One ADD at a time on the node, until this one ends: no two take the same
  // number, and none removes a bridge that another one has just joined.
  using counter = await ipam.lockCounter();
  const [bridge, [podLinks]] = await Promise.all([
    lookAtBridge(host, podCIDR),
    lookAtPod,
  ]).catch((error) => {
    if (!/network namespace/.test(error.details)) throw error;
    fail(4, `CNI_NETNS ${netns} is not a network namespace`, error.details);
  });
  if (podLinks.some((link) => link.ifname === ifname)) {
    fail(100, `${ifname} exists already in ${netns}`, "DEL it first");
  }

  // The bridge, with a MAC of its own: else it has that of one of its ports,
  // and changes it when that pod ends, while others' ARP knows the old one.
  const bridgeMac = bridge?.address ?? macOf(gateway);
  const bridgeSteps: Step[] = [];
  if (!bridge) {
    const line = `link add ${BRIDGE} address ${bridgeMac} type bridge`;
    bridgeSteps.push([line, `link del ${BRIDGE}`]);
  }
  if (!isUp(bridge)) {
    bridgeSteps.push([`link set ${BRIDGE} up`, `link set ${BRIDGE} down`]);
  }
  if (!hasAddress(bridge, gateway)) {
    const where = `${gateway}/${podCIDR.prefix} dev ${BRIDGE}`;
    bridgeSteps.push([`addr add ${where}`, `addr del ${where}`]);
  }

  const undo: string[] = [];
  /** Does steps up to a `show`, and notes what takes back those that it did. */
  const take = async (host: Ip, steps: Step[], show: string) => {
    const lines = [...steps.map(([line]) => line), show];
    const answers = await host.ask(...lines).finally(() => {
      undo.push(...steps.slice(0, host.done).flatMap(([, line]) => line ?? []));
    });
    return answers[0][0];
  };

  /**
   * The number n: the pod's address ends in it, and its host end is vethN. All
   * links are a long list on a full node, so they are looked through only if
   * the kernel tells that this vethN exists already.
   */
  const addVeth = async (host: Ip, used?: Set<number>): Promise<Veth> => {
    const n = ipam.nextNumber(counter, podCIDR, used);
    const podIP = ipam.address(podCIDR, n);
    const veth = `veth${n}`;
    // The veth pair. The pod's end is born in the pod, so the node may have an
    // eth0 of its own. Its MAC follows from the address: whoever has the
    // address in an ARP cache reaches the new pod too. Hairpin lets a pod reach
    // itself through its own Service.
    const peer = `peer name ${ifname} address ${macOf(podIP)} netns "${netns}"`;
    const steps: Step[] = [
      [`link add ${veth} type veth ${peer}`, `link del ${veth}`],
      [`link set ${veth} alias ${call.alias}`],
      [`link set ${veth} up`],
      [`link set ${veth} master ${BRIDGE}`],
      [`link set ${veth} type bridge_slave hairpin on`],
    ];
    try {
      const hostEnd = await take(host, steps, `link show dev ${veth}`);
      return { hostEnd, address: `${podIP}/${podCIDR.prefix}` };
    } catch (error) {
      if (used || !/File exists/.test((error as CNIError).details)) throw error;
      const another = new Ip("-4"); // the first one has ended
      return await addVeth(another, await usedNumbers(another, podCIDR));
    }
  };

  let naming = Promise.resolve(false);
  try {
    if (bridgeSteps.length) {
      await take(host, bridgeSteps, `link show dev ${BRIDGE}`);
    }
    const { hostEnd, address } = await addVeth(host);
    // The kernel tells the peer's namespace only if it is another one.
    if (hostEnd.link_netnsid === undefined) {
      fail(4, `CNI_NETNS ${netns} is the node's own namespace`);
    }

    // A name for the namespace, so that `ip netns exec CONTAINERID` works. And
    // in the pod: up, address, default route, and its MAC is read. The route
    // is appended, so that the one of another network stays the first.
    naming = nameNetns(containerID, netns);
    const inside = pod.ask(
      `link set dev ${ifname} up`,
      `addr add ${address} dev ${ifname}`,
      `route append default via ${gateway} dev ${ifname}`,
      `link show dev ${ifname}`,
    );
    const [[[podEnd]]] = await Promise.all([inside, naming]);

    // The result: the pod's interface is the first, as in the tutorial, but
    // for those that plugins before this one have answered.
    const { interfaces = [], ips = [], routes = [], ...rest } =
      conf.prevResult ?? {};
    const version = isBefore(conf, "1.0.0") ? { version: "4" } : {};
    const result = {
      ...rest,
      cniVersion: conf.cniVersion,
      interfaces: [
        ...interfaces,
        { name: ifname, mac: podEnd.address, sandbox: netns },
        { name: hostEnd.ifname, mac: hostEnd.address },
        { name: BRIDGE, mac: bridgeMac },
      ],
      ips: [
        ...ips,
        { ...version, address, gateway, interface: interfaces.length },
      ],
      routes: [...routes, { dst: "0.0.0.0/0", gw: gateway }],
      dns: conf.dns ?? rest.dns ?? {},
    };
    return [`${address} ${hostEnd.ifname}`, result];
  } catch (error) {
    try {
      if (await naming.catch(() => false)) Deno.removeSync(name);
      await new Ip("-force").ask(...undo.reverse(), "link show");
    } catch {
      // What is left carries the alias: DEL finds it.
    }
    throw error;
  }
}

/** DEL: takes the attachment away, as often as asked, whatever is left of it. */
async function del(call: Call): Promise<Answer> {
  const { containerID, netns, ifname, alias } = call;
  const host = new Ip("-force");
  const [links] = await host.ask("link show");
  let ours = links.filter((link) => link.ifalias === alias);
  if (!ours.length && netns.startsWith("/")) {
    // Was an ADD killed before it wrote the alias? The ends know each other.
    const [inside] = await inPod(netns).ask("link show").catch(() => [[]]);
    const end = inside.find((link) => link.ifname === ifname);
    ours = links.filter((link) =>
      !link.ifalias && /^veth\d+$/.test(link.ifname) &&
      link.ifindex === end?.link_index && link.link_index === end.ifindex
    );
  }
  // With its host end go the pod's end, its address and its route.
  const left = await removeLinks(host, ours);
  if (netns !== join(NETNS_DIR, containerID)) unnameNetns(containerID, left);
  return [ours.map((link) => link.ifname).join(" ") || "nothing left"];
}

/** CHECK: is all as ADD answered it? If not, says all that is missing. */
async function check(call: Call): Promise<Answer> {
  const { containerID, netns, ifname, conf } = call;
  const podCIDR = ipam.parsePodCIDR(conf.podcidr);
  const gateway = ipam.address(podCIDR, 1);
  const { interfaces = [], ips = [], routes = [] } = conf.prevResult ??
    fail(7, "CHECK needs the prevResult that ADD answered");
  const missing: string[] = [];
  const expect = (isThere: unknown, what: string) =>
    isThere || missing.push(what);

  const host = new Ip("-4");
  const [links] = await host.ask("link show");
  const veth = links.find((link) => link.ifalias === call.alias);
  expect(isUp(veth), `veth with alias ${call.alias} that is up`);
  expect(veth?.master === BRIDGE, `veth of it on ${BRIDGE}`);
  const bridge = await lookAtBridge(host, podCIDR);
  expect(isUp(bridge), `${BRIDGE} that is up`);
  expect(hasAddress(bridge, gateway), `${BRIDGE} with ${gateway}`);
  expect(isNamed(containerID, netns), `name ${containerID} for ${netns}`);

  const index = interfaces.findIndex(({ name, sandbox }) =>
    name === ifname && sandbox === netns
  );
  const ours = ips.filter((ip) => ip.interface === index);
  expect(ours.length, `address for ${ifname} in prevResult`);
  try {
    const [[pod], route] = await inPod(netns).ask(
      `addr show dev ${ifname}`,
      `route show default via ${gateway} dev ${ifname}`,
    );
    expect(isUp(pod), `${ifname} that is up`);
    for (const { address } of ours) {
      expect(hasAddress(pod, address), `${ifname} with ${address}`);
    }
    const mac = interfaces[index]?.mac;
    expect(!mac || pod.address === mac, `${ifname} with the MAC ${mac}`);
    // A plugin after this one may replace the route, and then says so.
    if (routes.some(({ dst, gw }) => dst === "0.0.0.0/0" && gw === gateway)) {
      expect(route.length, `default route via ${gateway}`);
    }
  } catch (error) {
    expect(false, `${ifname} in ${netns}: ${(error as CNIError).details}`);
  }
  if (missing.length) {
    fail(101, "Not as ADD left it", `no ${missing.join(", no ")}`);
  }
  return ["as ADD left it"];
}

/** GC: removes what is this network's and not in the runtime's list. */
async function gc({ conf }: Call): Promise<Answer> {
  const valid = conf["cni.dev/valid-attachments"];
  // No list is not an empty list: better a leftover than a pod without network.
  if (!valid) return ["no cni.dev/valid-attachments: removed nothing"];
  const isWhole = (pod: Attachment) =>
    [pod.containerID, pod.ifname].every((key) => typeof key === "string");
  if (!valid.every(isWhole)) fail(7, "cni.dev/valid-attachments lacks a key");
  const network = `${conf.name}/`;
  const keep = valid.map((pod) => `${network}${pod.containerID}/${pod.ifname}`);
  const host = new Ip("-force");
  const [links] = await host.ask("link show");
  const stale = links.filter(({ ifalias = "" }) =>
    ifalias.startsWith(network) && !keep.includes(ifalias)
  );
  const left = await removeLinks(host, stale);
  for (const { ifalias } of stale) unnameNetns(ifalias!.split("/")[1], left);
  // A namespace that went without a DEL took its veth along, not its name.
  for (const name of namesIn(NETNS_DIR)) {
    if (!existsSync(join(NETNS_DIR, name))) unnameNetns(name, left);
  }
  return [stale.map((link) => link.ifname).join(" ") || "nothing stale"];
}

/** STATUS: would an ADD succeed now? */
async function status({ conf }: Call): Promise<Answer> {
  const podCIDR = ipam.parsePodCIDR(conf.podcidr);
  try {
    ipam.checkCounter();
    const host = new Ip("-4");
    await lookAtBridge(host, podCIDR);
    const used = await usedNumbers(host, podCIDR);
    if (used.size >= podCIDR.room) {
      fail(11, `No free address in ${podCIDR.text}`);
    }
  } catch (error) {
    const { message, details } = error as CNIError;
    fail(50, `No pod can be added: ${message}`, details);
  }
  return [""]; // runtimes ask every few seconds: not a line each in the log
}

/** Run by hand: looks at the node, and says what mends each trouble. */
async function doctor(): Promise<void> {
  const look = async (at: () => Promise<string>) => {
    try {
      console.error(`ok   ${await at()}`);
    } catch (error) {
      const { message, details = "" } = error as CNIError;
      console.error(`BAD  ${message}\n     ${details}`);
    }
  };
  const json = { with: { type: "json" } } as const;
  const { version } = (await import("./deno.json", json)).default;
  console.error(`custom-cni ${version}, for CNI ${VERSIONS.join(", ")}`);
  console.error("A container runtime runs it for each pod. This node:");

  const found: ipam.PodCIDR[] = [];
  await look(async () => {
    // The runtime takes the first file by name, and no other.
    const isConf = (name: string) => /\.(conf|conflist|json)$/.test(name);
    const copy = `cp 10-custom-cni.conf ${CONF_DIR} # and set its podcidr`;
    const file = namesIn(CONF_DIR).find(isConf) ??
      fail(7, `${CONF_DIR} is empty ("cni config uninitialized")`, copy);
    const conf = JSON.parse(await Deno.readTextFile(join(CONF_DIR, file)));
    const plugins: (Conf & { type: string })[] = conf.plugins ?? [conf];
    const ours = plugins.find(({ type }) => type === "custom-cni") ??
      fail(
        7,
        `${file} comes first, for another plugin`,
        `mv ${CONF_DIR}/${file} /root`,
      );
    found.push(ipam.parsePodCIDR(ours.podcidr));
    return `${CONF_DIR}/${file}: podcidr ${ours.podcidr}`;
  });
  await look(async () => {
    const netconf = await run("ip", "netconf", "show");
    if (netconf.includes("inet all forwarding on")) return "ip_forward is on";
    const mend = "sysctl -w net.ipv4.ip_forward=1";
    return fail(100, "ip_forward is off: pods reach no other network", mend);
  });
  const [podCIDR] = found;
  if (!podCIDR) return;
  await look(async () => {
    const host = new Ip("-4");
    const bridge = await lookAtBridge(host, podCIDR);
    const used = await usedNumbers(host, podCIDR);
    const gateway = ipam.address(podCIDR, 1);
    const has = hasAddress(bridge, gateway) ? "has" : "will get";
    const counts = `addresses: ${used.size} used of ${podCIDR.room}`;
    if (used.size >= podCIDR.room) fail(11, counts, "kubectl delete pod POD");
    return `${BRIDGE} ${has} ${gateway}; ${counts}`;
  });
  await look(async () => {
    const now = await run("iptables", "-w", "5", "-S", "FORWARD");
    const rules = ["-s", "-d"].map((way) =>
      `-A FORWARD ${way} ${podCIDR.text} -j ACCEPT`
    );
    const mend = rules.filter((rule) => !now.includes(rule))
      .map((rule) => `iptables ${rule}`).join(" && ");
    if (mend && now.includes("-P FORWARD DROP")) {
      fail(100, "FORWARD drops the pods' packets", mend);
    }
    return "FORWARD lets the pods' packets pass";
  });
}

/** Reads the call, lets its verb run, answers the runtime, writes the log. */
async function main(): Promise<number> {
  const command = Deno.env.get("CNI_COMMAND");
  if (!command) {
    await doctor();
    return 0;
  }
  const who = ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME"]
    .flatMap((name) => Deno.env.get(name) || []).join(" ");
  let conf: Conf | CNIError;
  try {
    conf = readConf();
  } catch (error) {
    conf = error as CNIError; // for a verb that needs it
  }
  try {
    const [note, result] = await answer(command, conf);
    if (result) console.log(JSON.stringify(result, null, 2));
    if (note) log(`${who} ${note}`);
    return 0;
  } catch (error) {
    // What is no CNIError is a fault of this program, and is answered too.
    const { code = 999, message: msg, details = "" } = error as CNIError;
    const asked = (conf as Conf).cniVersion ?? "";
    const cniVersion = VERSIONS.includes(asked) ? asked : VERSIONS.at(-1);
    console.log(JSON.stringify({ cniVersion, code, msg, details }, null, 2));
    log(`${who} error ${code}: ${msg}; ${details}`);
    return 1;
  }
}

/** Checks the call from the outside in, and hands it to its verb. */
async function answer(
  command: string,
  conf: Conf | CNIError,
): Promise<Answer> {
  const { cniVersion = "0.1.0", name = "" } = conf as Conf; // as of old
  if (command === "GET") return ["a no-op"];
  if (command === "VERSION") {
    return [cniVersion, { cniVersion, supportedVersions: VERSIONS }];
  }
  if (!Object.hasOwn(VERBS, command)) {
    const verbs = `one of ${Object.keys(VERBS)}`;
    fail(4, `CNI_COMMAND ${JSON.stringify(command)} is unknown`, verbs);
  }
  const { since, needs, run } = VERBS[command];
  const [containerID, netns, ifname] = readVariables(needs);
  if (conf instanceof CNIError) throw conf;
  if (!VERSIONS.includes(cniVersion)) {
    const known = `one of ${VERSIONS}`;
    fail(1, `cniVersion ${JSON.stringify(cniVersion)} is unknown`, known);
  }
  if (isBefore(conf, since)) fail(1, `${command} came with CNI ${since}`);
  if (!NAME.test(name)) {
    fail(7, `name ${JSON.stringify(name)} is not a network's`, `${NAME}`);
  }
  const alias = `${name}/${containerID}/${ifname}`;
  if (alias.length > 255) {
    fail(4, "CNI_CONTAINERID is too long", "an alias has up to 255 bytes");
  }
  return await run({ containerID, netns, ifname, conf, alias });
}

/** Reads the network configuration from stdin, and checks its types. */
function readConf(): Conf {
  const decoder = new TextDecoder("utf-8", { fatal: true });
  const chunk = new Uint8Array(65536);
  let text = "";
  let conf;
  try {
    // A stream would read it as well, two milliseconds later.
    for (let n; (n = Deno.stdin.readSync(chunk)) !== null;) {
      text += decoder.decode(chunk.subarray(0, n), { stream: true });
    }
    // Go's JSON takes null for absent, and runtimes are written in Go.
    conf = JSON.parse(text, (_, value) => value ?? undefined);
  } catch (error) {
    fail(6, "stdin is not JSON", `${error}`);
  }
  const isObject = (value: unknown) =>
    Object.prototype.toString.call(value) === "[object Object]";
  if (!isObject(conf)) fail(6, "stdin is not a JSON object");
  const { cniVersion = "", name = "", dns = {}, prevResult = {} } = conf;
  const { interfaces = [], ips = [], routes = [] } = prevResult;
  const { "cni.dev/valid-attachments": valid = [] } = conf;
  const isWell = [cniVersion, name].every((key) => typeof key === "string") &&
    [dns, prevResult].every(isObject) &&
    [interfaces, ips, routes, valid].every((key) =>
      Array.isArray(key) && key.every(isObject)
    );
  if (!isWell) fail(7, "A key on stdin has the wrong type", "see the CNI spec");
  return conf;
}

/** Reads the attachment's variables; an empty one counts as missing. */
function readVariables(needs: string[]): string[] {
  // Beyond the spec: nothing that the kernel (eth%d) or `ip -batch` would
  // take for something else.
  const valid = [
    NAME,
    /^\/[ !$-[\]-~\xa0-\uffff]*$/,
    /^(?!(\.\.?|all|default)$)(?!.*[/:%#'"\\])[!-~]{1,15}$/,
  ];
  const values = POD.map((name) => Deno.env.get(name) ?? "");
  const bad = POD.filter((name, i) =>
    needs.includes(name) && !valid[i].test(values[i])
  ).map((name) => `${name}=${JSON.stringify(Deno.env.get(name) ?? "")}`);
  if (bad.length) {
    fail(4, `Missing or bad: ${bad.join(", ")}`, "see the CNI spec");
  }
  return values;
}

/**
 * One `ip -batch` to talk to: it does lines as they come, and answers a `show`
 * with a line of JSON. So an ADD needs two of them, for the host and the pod.
 */
class Ip {
  /** How many lines of the last question were done, as far as is known. */
  done = 0;
  #before = 0;
  #text = "";
  #child: Deno.ChildProcess;
  #stdin: WritableStreamDefaultWriter<Uint8Array>;
  #stdout: ReadableStreamDefaultReader<Uint8Array>;

  constructor(...args: string[]) {
    this.#child = spawn("ip", ...args, "-json", "-batch", "-");
    this.#stdin = this.#child.stdin.getWriter();
    this.#stdout = this.#child.stdout.getReader();
  }

  /**
   * Sends lines, of which the last is a `show`: its answer tells that all are
   * done. Without -force `ip` ends at the first line that fails.
   *
   * @throws {CNIError} 100 with that line, or if there is no answer in time.
   */
  async ask(...lines: string[]): Promise<Link[][]> {
    this.done = lines.length;
    const bytes = new TextEncoder().encode(lines.join("\n") + "\n");
    // If it has ended, the missing answer tells.
    this.#stdin.write(bytes).catch(() => {});
    const late = new Promise<undefined>((end) =>
      setTimeout(end, PATIENCE * 1000, undefined)
    );
    const answers: Link[][] = [];
    for (const _ of lines.filter((line) => /^\w+ show/.test(line))) {
      const answer = await Promise.race([this.#readLine(), late]);
      if (answer) answers.push(JSON.parse(answer));
      else {
        const rest = new Response(this.#child.stderr).text();
        const stderr = await Promise.race([rest, late]);
        if (stderr === undefined) this.#child.kill("SIGKILL");
        const failed = /failed -:(\d+)/.exec(stderr ?? "")?.[1];
        if (failed) this.done = Number(failed) - 1 - this.#before;
        const line = lines[this.done] ?? lines[0];
        const hangs = `no answer in ${PATIENCE} seconds`;
        fail(100, `ip ${line}`, stderr?.trim() ?? hangs);
      }
    }
    this.#before += lines.length;
    return answers;
  }

  async #readLine(): Promise<string | undefined> {
    const decoder = new TextDecoder();
    while (!this.#text.includes("\n")) {
      const { value, done } = await this.#stdout.read();
      if (done) return undefined;
      this.#text += decoder.decode(value, { stream: true });
    }
    const end = this.#text.indexOf("\n");
    const line = this.#text.slice(0, end);
    this.#text = this.#text.slice(end + 1);
    return line;
  }
}

/** Runs a program to its end, and returns what it wrote. */
async function run(program: string, ...args: string[]): Promise<string> {
  const { success, stdout, stderr } = await spawn(program, ...args).output();
  const [out, err] = [stdout, stderr].map((bytes) =>
    new TextDecoder().decode(bytes)
  );
  return success ? out : fail(100, `${program} ${args.join(" ")}`, err.trim());
}

/** Starts a program, or says how to get it. */
function spawn(program: string, ...args: string[]): Deno.ChildProcess {
  try {
    return new Deno.Command(program, {
      args,
      // containerd sets LD_LIBRARY_PATH, with which Deno starts no program.
      clearEnv: true,
      env: { PATH: Deno.env.get("PATH") ?? "" },
      stdin: "piped",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
  } catch (error) {
    const mend = "apt-get install iproute2 iptables coreutils";
    const isMissing = error instanceof Deno.errors.NotFound;
    if (isMissing) fail(100, `${program} is not on the PATH`, mend);
    return fail(100, `${program} does not start`, `${error}`);
  }
}

/** `ip` inside a namespace. */
function inPod(netns: string): Ip {
  // -n looks below /var/run/netns; from there a path may go up to any other.
  return new Ip("-n", `../../..${netns}`);
}

/** Deletes links and returns what is left; one may go by itself meanwhile. */
async function removeLinks(host: Ip, links: Link[]): Promise<Link[]> {
  const lines = links.map(({ ifname }) => `link del ${ifname}`);
  const [left] = await host.ask(...lines, "link show");
  const stuck = left.find(({ ifindex }) =>
    links.some((link) => link.ifindex === ifindex)
  );
  if (stuck) fail(100, `ip link del ${stuck.ifname}`, "it is still there");
  return left;
}

/**
 * The bridge, if it is there.
 *
 * @param host With -4: the listing then leaves out links without an address.
 * @throws {CNIError} 7 if the node reaches addresses of the range another way.
 */
async function lookAtBridge(
  host: Ip,
  podCIDR: ipam.PodCIDR,
): Promise<Link | undefined> {
  const [links] = await host.ask("addr show");
  const gateway = `${ipam.address(podCIDR, 1)}/${podCIDR.prefix}`;
  for (const { ifname, addr_info = [] } of links) {
    for (const { local, prefixlen } of addr_info) {
      const taken = `${local}/${prefixlen}`;
      if (ifname === BRIDGE && taken === gateway) continue;
      if (ipam.overlaps(podCIDR, taken)) {
        const why =
          `${ifname} has ${taken}, and ${BRIDGE} is to get ${gateway}`;
        fail(7, `podcidr ${podCIDR.text} is the node's already`, why);
      }
    }
  }
  const isBridge = ({ ifname }: Link) => ifname === BRIDGE;
  const bridge = links.find(isBridge);
  if (bridge) return bridge;
  const [withoutAddress] = await host.ask("link show type bridge");
  return withoutAddress.find(isBridge);
}

/** The numbers of a range that are in use: those whose vethN exists. */
async function usedNumbers(
  host: Ip,
  podCIDR: ipam.PodCIDR,
): Promise<Set<number>> {
  const [links] = await host.ask("link show");
  const numbers = links.map(({ ifname }) => /^veth(\d+)$/.exec(ifname)?.[1]);
  return new Set(
    numbers.map(Number).filter((n) => n > 1 && n < podCIDR.size - 1),
  );
}

/**
 * ln -sfT $CNI_NETNS /var/run/netns/$CNI_CONTAINERID, where it isn't so yet.
 * By a process, since Deno.symlink asks for the right to write everywhere.
 */
async function nameNetns(containerID: string, netns: string): Promise<boolean> {
  if (isNamed(containerID, netns)) return false;
  await run("ln", "-sfT", netns, join(NETNS_DIR, containerID));
  return true;
}

function isNamed(containerID: string, netns: string): boolean {
  const name = join(NETNS_DIR, containerID);
  return netns === name || netns === linkTarget(name);
}

/** Takes the name away with the container's last interface, if it is a link. */
function unnameNetns(containerID: string, links: Link[]): void {
  const name = join(NETNS_DIR, containerID);
  const isUsed = links.some(({ ifalias }) =>
    ifalias?.split("/")[1] === containerID
  );
  if (!isUsed && linkTarget(name)) Deno.removeSync(name);
}

/** Where a symbolic link points; nowhere for anything else. */
function linkTarget(path: string): string | undefined {
  try {
    return Deno.readLinkSync(path);
  } catch {
    return undefined;
  }
}

/** The names in a folder, sorted; none if it isn't there. */
function namesIn(folder: string): string[] {
  if (!existsSync(folder)) return [];
  return Array.from(Deno.readDirSync(folder), ({ name }) => name).sort();
}

function isBefore({ cniVersion }: Conf, version: string): boolean {
  return VERSIONS.indexOf(`${cniVersion}`) < VERSIONS.indexOf(version);
}

function isUp(link: Link | undefined): boolean {
  return link?.flags.includes("UP") ?? false;
}

/** Has the link this address, written with its prefix or without? */
function hasAddress(link: Link | undefined, address: string): boolean {
  return link?.addr_info?.some(({ local, prefixlen }) =>
    [local, `${local}/${prefixlen}`].includes(address)
  ) ?? false;
}

/** The MAC 0a:58 and the four bytes of the address. */
function macOf(address: string): string {
  const bytes = [10, 88, ...address.split(".").map(Number)];
  return bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(":");
}

/** One line a call for the operator. A full disk must not fail a pod. */
function log(line: string): void {
  try {
    // FileHandler creates a file with no mode of our choice.
    Deno.openSync(LOG, { append: true, create: true, mode: 0o640 }).close();
    using file = new FileHandler("INFO", { filename: LOG, bufferSize: 0 });
    file.setup();
    const time = new Date().toISOString();
    const text = `${time} ${line} (${Math.round(performance.now())} ms)`;
    // No input may begin a line of its own. (\p{Cc} says it as well, but V8
    // takes a millisecond to load its table.)
    file.log(text.replace(/[^ -~\xa0-\u2027\u202a-\uffff]+/g, " "));
  } catch (error) {
    console.error(`custom-cni: no line in ${LOG}: ${error}`);
  }
}

if (import.meta.main) Deno.exit(await main());
