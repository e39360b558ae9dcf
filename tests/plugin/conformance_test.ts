/** Plays the rows of `conformance.ts`, with our plugin and with Debian's. */
// deno-lint-ignore-file no-explicit-any -- what plugins and `ip` answer
import { assertEquals, assertObjectMatch } from "@std/assert";
import { type Row, TABLE, VERSIONS } from "./conformance.ts";
import { Node, run } from "../lab/node.ts";

/** A plugin under test. */
interface Plugin {
  path: string;
  versions: string[];
  /** What its conf needs besides cniVersion and name. */
  conf: Record<string, unknown>;
  env?: Record<string, string>;
  /** The keys that its errors always have, with their types. */
  error: Record<string, string>;
}

const OURS: Plugin = {
  path: "/opt/cni/bin/custom-cni",
  versions: VERSIONS,
  conf: { podcidr: "10.240.0.0/24" },
  error: {
    cniVersion: "string",
    code: "number",
    msg: "string",
    details: "string",
  },
};

/** Debian's containernetworking-plugins, of any release. */
const PEER: Plugin = {
  path: "/usr/lib/cni/bridge",
  versions: await askVersions("/usr/lib/cni/bridge"),
  conf: {
    bridge: "cni0",
    isGateway: true,
    isDefaultGateway: true,
    // Its leases are in the node's own /tmp, not on the machine's disk.
    ipam: { type: "host-local", subnet: "10.240.0.0/24", dataDir: "/tmp/ipam" },
  },
  env: { CNI_PATH: "/usr/lib/cni" }, // where it finds host-local
  error: { code: "number", msg: "string" },
};

/** The versions that a plugin says it knows. */
async function askVersions(plugin: string): Promise<string[]> {
  const { stdout } = await run([plugin], {
    env: { CNI_COMMAND: "VERSION" },
    stdin: '{ "cniVersion": "0.4.0" }',
  });
  return JSON.parse(stdout).supportedVersions;
}

let node: Node;
Deno.test.beforeAll(async () => {
  node = await Node.start("node2");
});
Deno.test.afterAll(() => node[Symbol.asyncDispose]());

/** Plays a row on a node without a bridge, in a pod of its own. */
async function play(plugin: Plugin, verb: string, row: Row, version?: string) {
  const pod = await node.sandbox("pod");
  const ns = pod.netns.split("/").pop()!;
  let added: any;

  const call = (verb: string, env: Row["env"] = {}) => {
    const { conf } = row;
    const own = typeof conf === "function" ? conf({ pod, added }) : conf;
    const base = { cniVersion: version, name: "net", ...plugin.conf };
    const before = /DEL|CHECK/.test(verb) ? { prevResult: added } : {};
    return node.cni(verb, /GC|STATUS|VERSION/.test(verb) ? undefined : pod, {
      plugin: plugin.path,
      env: { CNI_ARGS: "IgnoreUnknown=1;A=B", ...plugin.env, ...env },
      conf: typeof own === "string" ? own : { ...base, ...before, ...own },
    });
  };

  try {
    for (const step of row.after ?? []) {
      if (step.includes(" ")) {
        await node.sh(step.replaceAll("$NS", ns));
      } else {
        const { code, stdout, json } = await call(step);
        assertEquals(code, 0, stdout);
        added = json ?? added;
      }
    }
    const { code: status, stdout, json: answer } = await call(verb, row.env);

    const listing = await node.sh(`
      for what in "link" "-n ${ns} addr" "-n ${ns} route"; do
        # Without a route, some releases of ip begin a list and fail.
        list=$(ip -json $what 2>/dev/null) && echo "$list" || echo []
      done`);
    const [host, all, routes] = listing.split("\n").map((it) => JSON.parse(it));
    const links = all.filter((link: any) => link.ifname !== "lo");

    const { code = 0, pod: names = [], shows = {} } = row;
    // One JSON document or nothing: the lab parses stdout as a whole.
    assertEquals([status, answer?.code ?? 0], [code && 1, code], stdout);
    if (code) {
      const types = Object.entries(answer).map(([key, it]) => [key, typeof it]);
      assertObjectMatch(Object.fromEntries(types), plugin.error);
    } else if (!Object.keys(shows).length) assertEquals(stdout, "");
    assertEquals(links.map((link: any) => link.ifname), names);
    const ports = host.filter((link: any) => link.master === "cni0");
    assertEquals(ports.length, row.ports ?? names.length, "ports of cni0");
    const known = plugin.versions;
    const seen = { known, version, pod, added, answer, host, links, routes };
    for (const [what, look] of Object.entries(shows)) {
      assertEquals(...look(seen), what);
    }
  } finally {
    const clean =
      `ip -n ${ns} link del eth0; ip netns del ${ns}; ip link del cni0`;
    await node.run("sh", "-c", clean);
  }
}

/** A row with what is otherwise with this peer. */
function ofPeer(row: Row): Row {
  let changed = row;
  for (const difference of [row.peer ?? []].flat()) {
    const { before } = difference;
    if (before && PEER.versions.includes(before)) continue;
    changed = { ...changed, ...difference };
  }
  return changed;
}

for (const plugin of [OURS, PEER]) {
  for (const [clause, rows] of Object.entries(TABLE)) {
    for (const [line, ours] of Object.entries(rows)) {
      const row = plugin === PEER ? ofPeer(ours) : ours;
      const usual = plugin.versions.includes("1.0.0") ? "1.0.0" : "0.4.0";
      for (const version of row.versions ?? [usual]) {
        // An older peer is not asked about what came after it.
        const isReal = VERSIONS.includes(version!);
        if (isReal && !plugin.versions.includes(version!)) continue;
        const [verb, condition] = line.split(/ (if .*)/);
        const outcome = row.code ? `answers error ${row.code}` : "succeeds";
        const section = clause.split(":")[0];
        const who = plugin.path.split("/").pop();
        const where = `${who}, CNI ${
          version ?? "without a version"
        }, ${section}`;
        Deno.test(
          `${verb} ${outcome} ${condition} (${where})`,
          () => play(plugin, verb, row, version),
        );
      }
    }
  }
}
