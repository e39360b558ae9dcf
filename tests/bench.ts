/**
 * How long a pod waits for its network, beside others who do the same work.
 *
 *     deno task bench [--rounds N] [--json FILE] [--svg FILE]
 *
 * All rows take turns within each round, so that they share the noise of the
 * machine, and each figure is also given as a ratio to the first row. The
 * measuring itself runs inside a node, where a call costs nothing but itself.
 *
 * @module
 */
import { parseArgs } from "@std/cli/parse-args";
import { join } from "@std/path/posix/join";
import { permissionFlags } from "./build.ts";
import { CONF, Node, ROOT, run } from "./lab.ts";
import { DENORT } from "./offline.ts";

/** Something that can be called as a plugin. */
interface Plugin {
  name: string;
  command: string[];
  conf: Record<string, unknown>;
  path: string;
}

/** Milliseconds by row and verb, pods a second, and counts. */
interface Figures {
  times: Record<string, Record<string, number[]>>;
  atOnce: Record<string, number>;
  byPods: Record<string, Record<string, number[]>>;
  memory: Record<string, number>;
  cpu: Record<string, number>;
  processes: Record<string, Record<string, number>>;
}

const EMPTY = join(ROOT, "dist/empty");
const PATH = Deno.env.get("PATH")!;
const BASE = { ...CONF, cniVersion: "1.0.0" };

const OURS: Plugin = {
  name: "ours, compiled",
  command: ["/opt/cni/bin/custom-cni"],
  conf: BASE,
  path: "/opt/cni/bin",
};
const SCRIPT: Plugin = {
  ...OURS,
  name: `ours, by deno ${Deno.version.deno}`,
  command: [
    ...[Deno.execPath(), "run", "--no-prompt", ...permissionFlags()],
    join(ROOT, "custom-cni.ts"),
  ],
};
const PEER: Plugin = {
  name: "bridge and host-local, Go",
  command: ["/usr/lib/cni/bridge"],
  conf: {
    ...{ cniVersion: "1.0.0", name: "peer", bridge: "peer0", isGateway: true },
    ...{ isDefaultGateway: true, hairpinMode: true },
    ipam: { type: "host-local", subnet: "10.9.0.0/16", dataDir: "/tmp/ipam" },
  },
  path: "/usr/lib/cni",
};

/** Runs a command, and tells how long it took, in milliseconds. */
async function time(
  command: string[],
  env: Record<string, string> = {},
  stdin = "",
): Promise<[ms: number, stdout: string]> {
  const [program, ...args] = command;
  const start = performance.now();
  const child = new Deno.Command(program, {
    ...{ args, clearEnv: true, env: { PATH, ...env } },
    ...{ stdin: "piped", stdout: "piped", stderr: "piped" },
  }).spawn();
  const writer = child.stdin.getWriter();
  await writer.write(new TextEncoder().encode(stdin));
  await writer.close();
  const { success, stdout, stderr } = await child.output();
  const ms = performance.now() - start;
  const [out, err] = [stdout, stderr].map((it) => new TextDecoder().decode(it));
  if (!success) throw new Error(`${command.join(" ")}: ${out}${err}`);
  return [ms, out];
}

let serial = 0;
/** A namespace for a pod. */
async function sandbox(): Promise<string> {
  const name = `pod${++serial}`;
  await time(["ip", "netns", "add", name]);
  return name;
}

/** Calls a plugin for a pod. */
function call(
  { command, conf, path }: Plugin,
  verb: string,
  pod: string,
  prevResult?: unknown,
  prefix: string[] = [],
): Promise<[number, string]> {
  return time([...prefix, ...command], {
    CNI_COMMAND: verb,
    CNI_CONTAINERID: `id-${pod}`, // a name of its own, as from containerd
    CNI_NETNS: `/var/run/netns/${pod}`,
    CNI_IFNAME: "eth0",
    CNI_PATH: path,
  }, JSON.stringify({ ...conf, prevResult }));
}

/** The same work by `ip` alone: what the kernel and two processes take. */
const FLOOR: Record<string, (pod: string) => Promise<number>> = {
  ADD: async (pod) => {
    const [host] = await time(
      ["ip", "-batch", "-"],
      {},
      `
      link add v${pod} type veth peer name eth0 netns ${pod}
      link set v${pod} alias floor/${pod}/eth0
      link set v${pod} up
      link set v${pod} master floor0
      link set v${pod} type bridge_slave hairpin on`,
    );
    const [inside] = await time(
      ["ip", "-n", pod, "-batch", "-"],
      {},
      `
      link set eth0 up
      addr add 10.8.0.2/24 dev eth0
      route add default via 10.8.0.1 dev eth0
      link show dev eth0`,
    );
    return host + inside;
  },
  DEL: async (pod) => (await time(["ip", "link", "del", `v${pod}`]))[0],
};

/** The measuring, inside a node. */
async function measure(rounds: number): Promise<Figures> {
  const figures: Figures = {
    ...{
      times: {},
      atOnce: {},
      byPods: {},
      memory: {},
      cpu: {},
      processes: {},
    },
  };
  const note = (
    of: Record<string, Record<string, number[]>>,
    row: string,
    key: string,
    ms: number,
  ) => ((of[row] ??= {})[key] ??= []).push(ms);
  await time(["sh", "-c", "ip link add floor0 up type bridge"]);
  const plugins = [OURS, SCRIPT, PEER];
  // The first call of each makes its bridge and fills the caches.
  for (let round = -1; round < rounds; round++) {
    const row = (name: string, key: string, ms: number) =>
      round >= 0 && note(figures.times, name, key, ms);
    for (const plugin of plugins) {
      const pod = await sandbox();
      const [add, stdout] = await call(plugin, "ADD", pod);
      const result = JSON.parse(stdout);
      row(plugin.name, "ADD", add);
      row(plugin.name, "CHECK", (await call(plugin, "CHECK", pod, result))[0]);
      row(plugin.name, "DEL", (await call(plugin, "DEL", pod, result))[0]);
      row(plugin.name, "VERSION", (await call(plugin, "VERSION", pod))[0]);
      await time(["ip", "netns", "del", pod]);
    }
    const pod = await sandbox();
    for (const verb of ["ADD", "DEL"]) {
      row("two bare ip -batch", verb, await FLOOR[verb](pod));
    }
    await time(["ip", "netns", "del", pod]);
    const [empty] = await time([EMPTY]);
    for (const verb of ["ADD", "DEL", "VERSION"]) {
      row("an empty program", verb, empty);
    }
  }

  for (const plugin of plugins) {
    const pods: string[] = [];
    for (let i = 0; i < 10; i++) pods.push(await sandbox());
    const start = performance.now();
    await Promise.all(pods.map((pod) => call(plugin, "ADD", pod)));
    figures.atOnce[plugin.name] = 10_000 / (performance.now() - start);
    for (const pod of pods) await call(plugin, "DEL", pod);

    const [pod] = pods;
    const gnu = ["/usr/bin/time", "-f", "%M %U %S", "-o", "/tmp/time"];
    await call(plugin, "ADD", pod, undefined, gnu);
    const [kB, user, system] = (await Deno.readTextFile("/tmp/time")).trim()
      .split(" ").map(Number);
    figures.memory[plugin.name] = kB / 1024;
    figures.cpu[plugin.name] = 1000 * (user + system);
    await call(plugin, "DEL", pod);
    figures.processes[plugin.name] = await countProcesses(plugin, pod);
    for (const pod of pods) await time(["ip", "netns", "del", pod]);
  }

  let pods = 0;
  for (const target of [1, 50, 100, 250]) {
    for (; pods < target - 1; pods++) {
      for (const plugin of [OURS, PEER]) {
        await call(plugin, "ADD", await sandbox());
      }
    }
    for (let round = 0; round < rounds; round++) {
      for (const plugin of [OURS, PEER]) {
        const pod = await sandbox();
        const [ms, stdout] = await call(plugin, "ADD", pod);
        note(figures.byPods, plugin.name, `${target}`, ms);
        await call(plugin, "DEL", pod, JSON.parse(stdout));
        await time(["ip", "netns", "del", pod]);
      }
    }
  }
  return figures;
}

/** How many programs a call starts, by stand-ins that count and pass on. */
async function countProcesses(
  plugin: Plugin,
  pod: string,
): Promise<Record<string, number>> {
  await Deno.mkdir("/opt/count", { recursive: true });
  for (const name of ["ip", "ln", "iptables", "host-local"]) {
    const real = name === "host-local" ? "/usr/lib/cni/host-local" : name;
    const script =
      `#!/bin/sh\necho >> /opt/calls\nPATH=${PATH} exec ${real} "$@"`;
    await Deno.writeTextFile(`/opt/count/${name}`, script, { mode: 0o755 });
  }
  const counts: Record<string, number> = {};
  for (const verb of ["ADD", "DEL"]) {
    await Deno.writeTextFile("/opt/calls", "");
    const env = ["env", `PATH=/opt/count:${PATH}`];
    const counting = { ...plugin, path: `/opt/count:${plugin.path}` };
    await call(counting, verb, pod, undefined, env);
    counts[verb] = (await Deno.readTextFile("/opt/calls")).length;
  }
  return counts;
}

function quantile(values: number[], part: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * part))];
}
const median = (values: number[]) => quantile(values, 0.5);

/** Prints a table: rows by name, with the ratio to the first row. */
function table(
  title: string,
  rows: Record<string, Record<string, number[]>>,
): void {
  console.log(`\n${title}: median and 95th percentile, ratio to the first row`);
  const [first] = Object.values(rows);
  const keys = Object.keys(first);
  console.log("".padEnd(28) + keys.map((key) => key.padStart(21)).join(""));
  for (const [name, row] of Object.entries(rows)) {
    const cells = keys.map((key) => {
      if (!row[key]) return "";
      const [ms, p95] = [median(row[key]), quantile(row[key], 0.95)];
      const ratio = (ms / median(first[key])).toFixed(2);
      return `${ms.toFixed(0)} ${p95.toFixed(0)} ms ${ratio} x`;
    });
    console.log(name.padEnd(28) + cells.map((it) => it.padStart(21)).join(""));
  }
}

/** The goals, each a ratio within this run. */
function goals({ times, atOnce, byPods, processes }: Figures): void {
  const of = (row: string, verb: string) => median(times[row][verb]);
  const [empty, floor] = ["an empty program", "two bare ip -batch"];
  const rows: [goal: string, is: number, limit: number][] = [];
  for (const verb of ["ADD", "DEL"]) {
    const limit = of(empty, verb) + 1.5 * of(floor, verb);
    rows.push([
      `${verb} / (empty + 1.5 floor)`,
      of(OURS.name, verb) / limit,
      1,
    ]);
  }
  rows.push(
    [
      "VERSION / empty",
      of(OURS.name, "VERSION") / of(empty, "VERSION"),
      1.1,
    ],
    [
      "0.6 peer / ours, 10 at once",
      0.6 * atOnce[PEER.name] / atOnce[OURS.name],
      1,
    ],
    [
      "ADD with 250 pods / with 1",
      median(byPods[OURS.name]["250"]) / median(byPods[OURS.name]["1"]),
      1.15,
    ],
    ["programs started by ADD", processes[OURS.name].ADD, 3],
    ["programs started by DEL", processes[OURS.name].DEL, 2],
  );
  console.log("\nGoals");
  for (const [goal, is, limit] of rows) {
    const mark = is <= limit ? "met  " : "MISSED";
    console.log(`  ${mark} ${goal.padEnd(30)} ${is.toFixed(2)} of ${limit}`);
  }
}

/** A plot of latency against the pods that are there already. */
function svg({ byPods }: Figures): string {
  const top = Math.max(
    ...Object.values(byPods).flatMap(Object.values).map(median),
  );
  const x = (pods: number) => 60 + pods * 2;
  const y = (ms: number) => 260 - ms / top * 220;
  const lines = Object.entries(byPods).map(([name, row], i) => {
    const color = ["#0366d6", "#d73a49"][i];
    const points = Object.entries(row).map(([pods, values]) =>
      `${x(Number(pods))},${y(median(values)).toFixed(1)}`
    );
    const [, last] = points.at(-1)!.split(",");
    return `<polyline points="${points.join(" ")}" fill="none" stroke="${color}"
      stroke-width="2"/><text x="570" y="${last}" fill="${color}">${name}</text>`;
  });
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((part) => {
    const ms = (top * part).toFixed(0);
    return `<text x="50" y="${
      y(top * part) + 4
    }" text-anchor="end">${ms}</text>`;
  });
  const pods = [1, 50, 100, 250].map((n) =>
    `<text x="${x(n)}" y="280" text-anchor="middle">${n}</text>`
  );
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 310"
  font-family="sans-serif" font-size="13">
<rect width="780" height="310" fill="white"/>
<text x="60" y="24">ADD in milliseconds, by the pods that the node has</text>
<path d="M60 40V260H560" fill="none" stroke="black"/>
${[...ticks, ...pods, ...lines].join("\n")}
<text x="310" y="302" text-anchor="middle">pods</text>
</svg>\n`;
}

if (import.meta.main) {
  const flags = parseArgs(Deno.args, {
    string: ["rounds", "json", "svg"],
    boolean: ["inside"],
    default: { rounds: "20" },
  });
  if (flags.inside) {
    console.log(JSON.stringify(await measure(Number(flags.rounds))));
    Deno.exit(0);
  }
  // Of the same runtime as the plugin, and with nothing in it.
  const source = await Deno.makeTempFile({ suffix: ".ts" });
  const compile = [
    "compile",
    "--no-code-cache",
    "--no-check",
    "-o",
    EMPTY,
    source,
  ];
  const hasDenort = await Deno.stat(join(ROOT, DENORT.path)).catch(() => null);
  const built = hasDenort
    ? await run(["npx", "-y", `deno@${DENORT.version}`, ...compile], {
      env: { DENORT_BIN: join(ROOT, DENORT.path) },
    })
    : await run([Deno.execPath(), ...compile]);
  if (built.code) throw new Error(built.stderr);
  await Deno.remove(source);

  await using node = await Node.start("node2", BASE);
  const words = [Deno.execPath(), "run", "-A", import.meta.filename!];
  const [program, ...args] = node.enter(
    ...[...words, "--inside", "--rounds", flags.rounds],
  );
  const child = new Deno.Command(program, { args, stderr: "inherit" });
  const { stdout } = await child.output();
  const figures: Figures = JSON.parse(new TextDecoder().decode(stdout));
  table("One at a time", figures.times);
  table("ADD with so many pods on the node", figures.byPods);
  console.log("\nTen ADDs at once, memory and CPU of an ADD, programs started");
  for (const name of Object.keys(figures.atOnce)) {
    const { ADD, DEL } = figures.processes[name];
    console.log(
      `${name.padEnd(28)} ${figures.atOnce[name].toFixed(1)} pods/s ` +
        `${figures.memory[name].toFixed(0)} MiB ` +
        `${figures.cpu[name].toFixed(0)} ms CPU  ADD ${ADD}, DEL ${DEL}`,
    );
  }
  goals(figures);
  if (flags.json) {
    await Deno.writeTextFile(flags.json, JSON.stringify(figures, null, 1));
  }
  if (flags.svg) await Deno.writeTextFile(flags.svg, svg(figures));
}
