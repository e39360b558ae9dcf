/**
 * The tutorial's machines: two nodes with enp0s3 on one network, a router, and a
 * host on the internet.
 *
 *     node1 10.0.2.14 ─┐
 *                      ├─ router 10.0.2.2 ─── internet 203.0.113.8
 *     node2 10.0.2.15 ─┘
 *
 * As on the tutorial's machines, FORWARD drops what no rule accepts (Docker sets
 * that policy), and bridged packets pass through FORWARD, too.
 *
 * @module
 */
import { join } from "@std/path/posix/join";
import { CONF, hear, Node, run } from "./node.ts";
import { ROOT } from "../setup/root.ts";

/** One packet at one interface. */
export interface Sighting {
  /** Seconds and nanoseconds, all of one length: text that can be sorted. */
  time: string;
  place: string;
  dev: string;
  way: string;
  source: string;
  destination: string;
  flags: string;
}

/** Prints the TCP packets of a network namespace. */
const PACKETS = join(ROOT, "tests/lab/packets.pl");

/** A pod of pods.yaml, and its node. */
export interface Manifest {
  name: string;
  node: string;
}

/** Reads pods.yaml. It understands only the YAML of that file. */
export async function readPods(): Promise<Manifest[]> {
  const yaml = await Deno.readTextFile(join(ROOT, "pods.yaml"));
  return yaml.split(/^---$/m).map((document) => ({
    name: /^ {2}name: (\S+)$/m.exec(document)![1],
    node: /kubernetes.io\/hostname: (\S+)$/m.exec(document)![1],
  }));
}

/** The two nodes and their router; `await using` ends all of them. */
export class Cluster implements AsyncDisposable {
  private constructor(
    readonly router: Node,
    readonly node1: Node,
    readonly node2: Node,
  ) {}

  /** Starts the machines and connects them; null leaves out the plugin. */
  static async start(conf: typeof CONF | null = CONF): Promise<Cluster> {
    const [router, node1, node2] = await Promise.all([
      Node.start("router", null),
      Node.start("node1", conf && { ...conf, podcidr: "10.240.1.0/24" }),
      Node.start("node2", conf && { ...conf, podcidr: "10.240.0.0/24" }),
    ]);
    await router.sh(`
      sysctl -qw net.ipv4.ip_forward=1
      ip link add br0 type bridge
      ip link set br0 up
      ip addr add 10.0.2.2/24 dev br0
      ip netns add internet
      ip link add internet type veth peer name eth0 netns internet
      ip link set internet up
      ip addr add 203.0.113.1/24 dev internet
      ip -n internet link set eth0 up
      ip -n internet addr add 203.0.113.8/24 dev eth0
      ip -n internet route add 10.0.2.0/24 via 203.0.113.1`);
    for (const [node, address] of [[node1, 14], [node2, 15]] as const) {
      await router.sh(`
        ip link add ${node.name} type veth peer name enp0s3 netns ${node.pid}
        ip link set ${node.name} master br0 up`);
      await node.sh(`
        ip link set enp0s3 up
        ip addr add 10.0.2.${address}/24 dev enp0s3
        ip route add default via 10.0.2.2
        iptables -P FORWARD DROP
        sysctl -qw net.bridge.bridge-nf-call-iptables=1`);
    }
    await router.serve("internet", "the internet");
    return new Cluster(router, node1, node2);
  }

  /** Ends the machines. */
  async [Symbol.asyncDispose](): Promise<void> {
    const machines = [this.node1, this.node2, this.router];
    await Promise.all(machines.map((node) => node[Symbol.asyncDispose]()));
  }

  /** The node with this name. */
  node(name: string): Node {
    return name === "node1" ? this.node1 : this.node2;
  }
}

/**
 * Watches every interface of some places while `action` runs, and returns where
 * its TCP packets passed, in order.
 */
export async function capture(
  places: Record<string, string[]>,
  action: () => Promise<unknown>,
): Promise<Sighting[]> {
  const watchers = [];
  for (const [place, enter] of Object.entries(places)) {
    const [program, ...args] = [...enter, "perl", PACKETS];
    const child = new Deno.Command(program, {
      args,
      stdout: "piped",
      signal: AbortSignal.timeout(60_000),
    }).spawn();
    await hear(child.stdout, "ready\n");
    watchers.push({ place, child });
  }
  await action();
  await run(["sleep", "0.3"]); // until the last packet is written
  const sightings: Sighting[] = [];
  for (const { place, child } of watchers) {
    child.kill("SIGINT");
    const { stdout } = await child.output();
    const lines = new TextDecoder().decode(stdout).trim().split("\n");
    for (const line of lines.filter((line) => line)) {
      const [time, dev, way, source, destination, flags] = line.split(" ");
      sightings.push({ time, place, dev, way, source, destination, flags });
    }
  }
  return sightings.sort((a, b) => a.time < b.time ? -1 : 1);
}
