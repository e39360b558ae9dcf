/**
 * How long a pod waits for its network, compared with other plugins.
 *
 *     deno task bench [--rounds N] [--json FILE] [--svg FILE] [--beside FILE]
 *
 * All rows take turns within each round, so they share the machine's noise.
 * Each figure also has its ratio to the first row. The measuring runs inside a
 * node, where a call costs only itself. --beside adds a row for another binary
 * of this plugin, such as an older one.
 *
 * @module
 */
import { parseArgs } from "@std/cli/parse-args";
import { join } from "@std/path/posix/join";
import { CONF, DENORT, Node, run } from "../lab/node.ts";
import { ROOT } from "../setup/root.ts";

/** A plugin to measure. */
interface Plugin {
  name: string;
  command: string[];
  conf: Record<string, unknown>;
  path: string;
}

/** Milliseconds, by row and column of a table. */
type Times = Record<string, Record<string, number[]>>;

/** What was measured. */
interface Figures {
  times: Times;
  /** By the number of the node's pods. */
  byPods: Times;
  /** Where an ADD spends its time, in order. */
  parts: Record<string, number[]>;
  /** Pods a second if ten start at once. */
  atOnce: Record<string, number[]>;
  /** An ADD's MiB, its milliseconds of CPU, and the programs that it starts. */
  memory: Record<string, number>;
  cpu: Record<string, number>;
  processes: Record<string, Record<string, number>>;
}

/** Programs of the same runtime that do next to nothing. */
const BARE = { empty: "", hello: "console.log()" };
const EMPTY = "an empty program";
const FLOOR = "two bare ip -batch";
const PATH = Deno.env.get("PATH")!;
const BASE = { ...CONF, cniVersion: "1.0.0", podcidr: "10.128.0.0/16" };

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
    ...[Deno.execPath(), "run", "--quiet", "--no-prompt", "-P=plugin"],
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

/** The plugins to measure. --beside adds one. */
const PLUGINS = [OURS, SCRIPT, PEER];

/** When a command started, answered and ended, in milliseconds. */
interface Run {
  start: number;
  answer: number;
  ms: number;
  stdout: string;
}

/** The path of a bare program. */
const bare = (name: string) => join(ROOT, "dist", name);

/** Runs a command and takes its time. */
async function time(
  command: string[],
  env: Record<string, string> = {},
  stdin = "",
): Promise<Run> {
  const [program, ...args] = command;
  const start = performance.now();
  const child = new Deno.Command(program, {
    ...{ args, clearEnv: true, env: { PATH, ...env } },
    ...{ stdin: "piped", stdout: "piped", stderr: "piped" },
  }).spawn();
  const writer = child.stdin.getWriter();
  await writer.write(new TextEncoder().encode(stdin)).catch(() => {});
  await writer.close().catch(() => {}); // it ended without reading
  const stderr = new Response(child.stderr).text();
  const decoder = new TextDecoder();
  let [stdout, answer] = ["", 0];
  for await (const chunk of child.stdout) {
    answer ||= performance.now() - start;
    stdout += decoder.decode(chunk, { stream: true });
  }
  const { success } = await child.status;
  const ms = performance.now() - start;
  if (!success) {
    throw new Error(`${command.join(" ")}: ${stdout}${await stderr}`);
  }
  return { start, answer, ms, stdout };
}

/** Adds a figure to a table. */
function note(to: Times, row: string, column: string, ms: number): void {
  ((to[row] ??= {})[column] ??= []).push(ms);
}

let serial = 0;
/** Creates a namespace for a pod. */
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
): Promise<Run> {
  return time([...prefix, ...command], {
    CNI_COMMAND: verb,
    CNI_CONTAINERID: `id-${pod}`, // not the name of the namespace
    CNI_NETNS: `/var/run/netns/${pod}`,
    CNI_IFNAME: "eth0",
    CNI_PATH: path,
  }, JSON.stringify({ ...conf, prevResult }));
}

/** The same work only by `ip`: the time of the kernel and two processes. */
async function bareIp(verb: string, pod: string): Promise<number> {
  if (verb === "DEL") return (await time(["ip", "link", "del", `v${pod}`])).ms;
  const host = await time(
    ["ip", "-batch", "-"],
    {},
    `
      link add v${pod} type veth peer name eth0 netns ${pod}
      link set v${pod} alias floor/${pod}/eth0
      link set v${pod} up
      link set v${pod} master floor0
      link set v${pod} type bridge_slave hairpin on`,
  );
  const inside = await time(
    ["ip", "-n", pod, "-batch", "-"],
    {},
    `
      link set eth0 up
      addr add 10.8.0.2/24 dev eth0
      route add default via 10.8.0.1 dev eth0
      link show dev eth0`,
  );
  return host.ms + inside.ms;
}

/** Measures everything, inside a node. */
async function measure(rounds: number): Promise<Figures> {
  return {
    times: await oneByOne(rounds),
    parts: await inParts(rounds),
    ...await atOnceAndCosts(rounds),
    byPods: await onFullNodes(rounds),
  };
}

/** Measures each verb of each row, one at a time. */
async function oneByOne(rounds: number): Promise<Times> {
  const times: Times = {};
  await time(["ip", "link", "add", "floor0", "up", "type", "bridge"]);
  // The first round does not count: it creates bridges and fills caches.
  for (let round = -1; round < rounds; round++) {
    const row = (name: string, verb: string, ms: number) =>
      round >= 0 && note(times, name, verb, ms);
    for (const plugin of PLUGINS) {
      const pod = await sandbox();
      const { ms, stdout } = await call(plugin, "ADD", pod);
      row(plugin.name, "ADD", ms);
      const result = JSON.parse(stdout);
      for (const verb of ["CHECK", "DEL", "VERSION"]) {
        row(plugin.name, verb, (await call(plugin, verb, pod, result)).ms);
      }
      await time(["ip", "netns", "del", pod]);
    }
    const pod = await sandbox();
    // Here, like an ADD: after a "netns del" the kernel is busy for a while.
    const { ms } = await time([bare("empty")]);
    for (const verb of ["ADD", "DEL", "CHECK", "VERSION"]) row(EMPTY, verb, ms);
    for (const verb of ["ADD", "DEL"]) {
      row(FLOOR, verb, await bareIp(verb, pod));
    }
    await time(["ip", "netns", "del", pod]);
  }
  return times;
}

/** Measures ADD on nodes with pods. The nodes take turns too. */
async function onFullNodes(rounds: number): Promise<Times> {
  const nodes: { netns: string; plugin: Plugin; pods: number }[] = [];
  for (const pods of [1, 50, 100, 250]) {
    for (const plugin of [OURS, PEER]) {
      const netns = `node${serial}`;
      await time(["ip", "netns", "add", netns]);
      nodes.push({ netns, plugin, pods });
      // The plugin creates the bridge, and `ip` creates the other pods.
      const enter = ["nsenter", `--net=/run/netns/${netns}`];
      const first = await sandbox();
      await call(plugin, "ADD", first, undefined, enter);
      await call(plugin, "DEL", first, undefined, enter);
      const bridge = plugin === OURS ? "cni0" : PEER.conf.bridge;
      for (let i = 1; i < pods; i++) {
        const pod = await sandbox();
        await time(
          ["ip", "-n", netns, "-batch", "-"],
          {},
          `link add veth6${serial} type veth peer name eth0 netns ${pod}
          link set veth6${serial} alias custom-cni/id-${pod}/eth0
          link set veth6${serial} up
          link set veth6${serial} master ${bridge}
          link set veth6${serial} type bridge_slave hairpin on`,
        );
        await time(["ip", "-n", pod, "link", "set", "eth0", "up"]);
      }
    }
  }
  await time(["sleep", "5"]); // until the last pod's IPv6 has settled
  const byPods: Times = {};
  for (let round = 0; round < rounds; round++) {
    for (const { netns, plugin, pods } of nodes) {
      const enter = ["nsenter", `--net=/run/netns/${netns}`];
      const pod = await sandbox();
      const { ms, stdout } = await call(plugin, "ADD", pod, undefined, enter);
      note(byPods, plugin.name, `${pods}`, ms);
      await call(plugin, "DEL", pod, JSON.parse(stdout), enter);
      await time(["ip", "netns", "del", pod]);
      if (plugin === PEER) {
        const { ms } = await time([...enter, bare("empty")]);
        note(byPods, EMPTY, `${pods}`, ms);
      }
    }
  }
  return byPods;
}

/** Records with `ip monitor` what changes in a namespace, up to a line. */
async function monitor(
  enter: string[],
  last: RegExp,
): Promise<() => Promise<string>> {
  const [program, ...args] = [...enter, "ip", "-ts", "monitor", "all"];
  const child = new Deno.Command(program, {
    ...{ args, env: { TZ: "UTC" }, stdout: "piped", stderr: "null" },
    signal: AbortSignal.timeout(20_000),
  }).spawn();
  await time(["sleep", "0.1"]); // until it listens, which it does not report
  return async () => {
    let report = "";
    for await (const chunk of child.stdout) {
      report += new TextDecoder().decode(chunk);
      if (last.test(report)) break;
    }
    try {
      child.kill("SIGINT");
    } catch {
      // Its time was up.
    }
    await child.status;
    return report;
  };
}

/** The time of the first line that matches, on performance.now()'s clock. */
function timeOf(report: string, what: RegExp): number {
  const line = report.split("\n").find((line) => what.test(line)) ?? "";
  const [, time] = /\[([^\]]+)\]/.exec(line) ?? [];
  if (!time) throw new Error(`ip monitor has no ${what}:\n${report}`);
  const [seconds, fraction] = time.split(".");
  const micros = Number(fraction) / 1000;
  return Date.parse(`${seconds}Z`) + micros - performance.timeOrigin;
}

/**
 * Measures where an ADD spends its time. Its milestones are the answers of two
 * programs that do less, and the times at which the kernel reports its steps.
 */
async function inParts(rounds: number): Promise<Record<string, number[]>> {
  const parts: Record<string, number[]> = {};
  for (let round = 0; round < rounds; round++) {
    const pod = await sandbox();
    const hello = await time([bare("hello")]);
    const version = await call(OURS, "VERSION", pod);
    const enter = ["nsenter", `--net=/run/netns/${pod}`];
    const hostReport = await monitor([], /LINK.*veth/);
    const podReport = await monitor(enter, /ROUTE\]default via/);
    const { start, answer, ms, stdout } = await call(OURS, "ADD", pod);
    const [host, inside] = [await hostReport(), await podReport()];
    const milestones: [part: string, at: number][] = [
      ["Deno starts", hello.answer],
      ["modules, stdin", version.answer],
      ["lock, look, pair's ip starts", timeOf(host, /LINK.*veth/) - start],
      ["veth pair, next ones start", timeOf(inside, /LINK.*[<,]UP/) - start],
      ["address, route", timeOf(inside, /ROUTE\]default via/) - start],
      ["result", answer],
      ["log, exit", ms],
    ];
    milestones.forEach(([part, at], i) => {
      (parts[part] ??= []).push(at - (milestones[i - 1]?.[1] ?? 0));
    });
    await call(OURS, "DEL", pod, JSON.parse(stdout));
    await time(["ip", "netns", "del", pod]);
  }
  return parts;
}

/** Measures ten ADDs at once, and what one ADD costs besides time. */
async function atOnceAndCosts(rounds: number) {
  const figures = {
    ...{ atOnce: {} as Record<string, number[]> },
    ...{ memory: {} as Record<string, number>, cpu: {} as Figures["cpu"] },
    processes: {} as Figures["processes"],
  };
  const pods: string[] = [];
  for (let i = 0; i < 10; i++) pods.push(await sandbox());
  const atOnce = async (name: string, run: (pod: string) => Promise<Run>) => {
    const start = performance.now();
    await Promise.all(pods.map(run));
    const perSecond = 1000 * pods.length / (performance.now() - start);
    (figures.atOnce[name] ??= []).push(perSecond);
  };
  for (let round = 0; round < Math.ceil(rounds / 4); round++) {
    for (const plugin of PLUGINS) {
      await atOnce(plugin.name, (pod) => call(plugin, "ADD", pod));
      for (const pod of pods) await call(plugin, "DEL", pod);
    }
    await atOnce(EMPTY, () => time([bare("empty")]));
  }
  const [pod] = pods;
  for (const plugin of PLUGINS) {
    // GNU's time reports the memory. For the CPU it reports hundredths of a
    // second, bash thousandths.
    const script = `TIMEFORMAT="%3U %3S"
      { time /usr/bin/time -f %M -o /tmp/memory "$@"; } 2> /tmp/cpu`;
    const measured = ["bash", "-c", script, "bash"];
    const costs: number[][] = [];
    for (let round = 0; round < rounds; round++) {
      await call(plugin, "ADD", pod, undefined, measured);
      const memory = await Deno.readTextFile("/tmp/memory");
      const cpu = await Deno.readTextFile("/tmp/cpu");
      costs.push(`${memory.trim()} ${cpu.trim()}`.split(" ").map(Number));
      await call(plugin, "DEL", pod);
    }
    const used = costs.reduce(
      (sum, [, user, system]) => sum + user + system,
      0,
    );
    figures.cpu[plugin.name] = 1000 * used / rounds;
    figures.memory[plugin.name] = median(costs.map(([kB]) => kB)) / 1024;
    figures.processes[plugin.name] = await countProcesses(plugin, pod);
  }
  for (const pod of pods) await time(["ip", "netns", "del", pod]);
  return figures;
}

/** Counts the programs that a call starts, by stand-ins for them. */
async function countProcesses(
  plugin: Plugin,
  pod: string,
): Promise<Record<string, number>> {
  await Deno.mkdir("/opt/count", { recursive: true });
  for (const name of ["ip", "ln", "nsenter", "host-local"]) {
    const real = name === "host-local" ? "/usr/lib/cni/host-local" : name;
    const script =
      `#!/bin/sh\necho >> /opt/calls\nPATH="${PATH}" exec ${real} "$@"`;
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

/** Prints a table, with each figure's ratio to the first row. */
function table(title: string, rows: Times): void {
  console.log(`\n${title}: median and 95th percentile, ratio to the first row`);
  const [first] = Object.values(rows);
  const keys = Object.keys(first);
  console.log("".padEnd(28) + keys.map((key) => key.padStart(18)).join(""));
  for (const [name, row] of Object.entries(rows)) {
    const cells = keys.map((key) => {
      if (!row[key]) return "";
      const [ms, p95] = [median(row[key]), quantile(row[key], 0.95)];
      const ratio = (ms / median(first[key])).toFixed(2);
      return `${ms.toFixed(0)} ${p95.toFixed(0)} ms ${ratio} x`;
    });
    console.log(name.padEnd(28) + cells.map((it) => it.padStart(18)).join(""));
  }
}

/** Prints the goals, each a ratio within this run. */
function goals({ times, byPods, processes }: Figures): void {
  const of = (row: string, verb: string) => median(times[row][verb]);
  const ours = byPods[OURS.name];
  const growth = median(ours["250"]) / median(ours["1"]);
  const rows: [goal: string, is: number, limit: number][] = [
    ["ADD / an empty program", of(OURS.name, "ADD") / of(EMPTY, "ADD"), 2.7],
    ["ADD with 250 pods / with 1", growth, 1.15],
    ["programs started by ADD", processes[OURS.name].ADD, 4],
    ["programs started by DEL", processes[OURS.name].DEL, 2],
  ];
  console.log("\nGoals");
  for (const [goal, is, limit] of rows) {
    const mark = is <= limit ? "met   " : "MISSED";
    console.log(`  ${mark} ${goal.padEnd(48)} ${is.toFixed(2)} of ${limit}`);
  }
}

const COLORS = [
  ...["#9aa5b1", "#f0b429", "#2680c2", "#3ebd93"],
  ...["#199473", "#e12d39", "#7b8794"],
];

/** Draws two plots: the parts of an ADD, and its time by the node's pods. */
function svg({ byPods, parts }: Figures): string {
  const text = (x: number, y: number, words: string, more = "") =>
    `<text x="${x}" y="${y.toFixed(1)}" ${more}>${words}</text>`;
  const drawn = [
    text(20, 24, "One ADD, in milliseconds", `font-weight="bold"`),
  ];
  const medians = Object.entries(parts).map(([part, ms]) =>
    [part, median(ms)] as const
  );
  const sum = medians.reduce((all, [, ms]) => all + ms, 0);
  let x = 20;
  medians.forEach(([part, ms], i) => {
    const width = ms / sum * 740;
    drawn.push(
      `<rect x="${x.toFixed(1)}" y="36" width="${width.toFixed(1)}"` +
        ` height="34" fill="${COLORS[i]}"/>`,
    );
    x += width;
    const [left, top] = [20 + (i % 4) * 190, 84 + Math.floor(i / 4) * 22];
    drawn.push(
      `<rect x="${left}" y="${top}" width="12" height="12" fill="${
        COLORS[i]
      }"/>`,
      text(left + 18, top + 11, `${part} ${ms.toFixed(1)}`),
    );
  });

  const top = Math.max(
    ...Object.values(byPods).flatMap(Object.values).map(median),
  );
  const across = (pods: number) => 70 + pods * 1.9;
  const up = (ms: number) => 380 - ms / top * 190;
  const title = "ADD in milliseconds, by the pods that the node has";
  drawn.push(text(20, 164, title, `font-weight="bold"`));
  drawn.push(`<path d="M70 180V380H560" fill="none" stroke="black"/>`);
  for (const ms of [0, 0.5, 1].map((part) => top * part)) {
    drawn.push(text(60, up(ms) + 4, ms.toFixed(0), `text-anchor="end"`));
  }
  Object.entries(byPods).forEach(([name, row], i) => {
    const color = ["#2680c2", "#e12d39", "#7b8794"][i];
    const points = Object.entries(row).map(([pods, ms]) =>
      `${across(Number(pods))},${up(median(ms)).toFixed(1)}`
    ).join(" ");
    drawn.push(
      `<polyline points="${points}" fill="none" stroke="${color}"` +
        ` stroke-width="2"/>`,
      text(555, up(median(row["250"])) + 4, name, `fill="${color}"`),
    );
    for (const pods of Object.keys(row)) {
      drawn.push(text(across(Number(pods)), 398, pods, `text-anchor="middle"`));
    }
  });
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 410"
  font-family="sans-serif" font-size="13">
<rect width="780" height="410" fill="white"/>
${[...new Set(drawn)].join("\n")}
</svg>\n`;
}

/** Compiles the bare programs with the plugin's runtime. */
async function compileBare(): Promise<void> {
  for (const [name, source] of Object.entries(BARE)) {
    const file = await Deno.makeTempFile({ suffix: ".ts" });
    await Deno.writeTextFile(file, source);
    const flags = [
      ...["compile", "--no-prompt", "--no-check", "--no-code-cache"],
      "--v8-flags=--single-threaded",
    ];
    const built = await run(
      [Deno.execPath(), ...flags, "-o", bare(name), file],
      { env: { DENORT_BIN: DENORT } },
    );
    if (built.code) throw new Error(built.stderr);
    await Deno.remove(file);
  }
}

if (import.meta.main) {
  const flags = parseArgs(Deno.args, {
    string: ["rounds", "json", "svg", "beside"],
    boolean: ["inside"],
    default: { rounds: "20" },
  });
  const { beside } = flags;
  if (beside) {
    PLUGINS.push({ ...OURS, name: "the one beside", command: [beside] });
  }
  if (flags.inside) {
    console.log(JSON.stringify(await measure(Number(flags.rounds))));
    Deno.exit(0);
  }
  await compileBare();
  await using node = await Node.start("node2", BASE);
  const words = [Deno.execPath(), "run", "-A", import.meta.filename!];
  const [program, ...args] = node.enter(
    ...[...words, "--inside", "--rounds", flags.rounds],
    ...beside ? ["--beside", await Deno.realPath(beside)] : [],
  );
  const child = new Deno.Command(program, { args, stderr: "inherit" });
  const { stdout } = await child.output();
  const figures: Figures = JSON.parse(new TextDecoder().decode(stdout));
  table("One at a time", figures.times);
  table("ADD by the number of the node's pods", figures.byPods);
  console.log("\nWhere an ADD spends its time: median");
  for (const [part, ms] of Object.entries(figures.parts)) {
    console.log(`${part.padEnd(28)} ${median(ms).toFixed(1).padStart(6)} ms`);
  }
  console.log("\nTen at once; memory, CPU and programs of an ADD");
  for (const [name, perSecond] of Object.entries(figures.atOnce)) {
    const { ADD, DEL } = figures.processes[name] ?? {};
    const costs = ADD &&
      `${figures.memory[name].toFixed(0)} MiB ` +
        `${figures.cpu[name].toFixed(0)} ms CPU  ADD ${ADD}, DEL ${DEL}`;
    const rate = median(perSecond).toFixed(1).padStart(6);
    console.log(`${name.padEnd(28)} ${rate} a second  ${costs ?? ""}`);
  }
  goals(figures);
  if (flags.json) {
    await Deno.writeTextFile(flags.json, JSON.stringify(figures, null, 1));
  }
  if (flags.svg) await Deno.writeTextFile(flags.svg, svg(figures));
}
