/**
 * Nothing lost, nothing left, no one let in. Each test tries one kind of harm.
 * A table at the end says how often. `deno task soak` tries far more often.
 *
 * @module
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { join } from "@std/path/posix/join";
import {
  type Answer,
  CONF,
  CONF_1_1,
  DENORT,
  Node,
  type Pod,
  run,
  SHIM_PATH,
} from "../lab/node.ts";
import { ROOT } from "../setup/root.ts";

/** How often each harm is tried: in a soak, and in CI. */
const SIZE = Deno.env.has("SOAK")
  ? { kills: 40, atOnce: 100, rounds: 1000, pods: 50, inputs: 300 }
  : { kills: 6, atOnce: 12, rounds: 30, pods: 8, inputs: 30 };

const figures: Record<string, { tried: number; lost: number }> = {};
Deno.test.afterAll(() => console.table(figures));

/** Counts successful tries. A lost one fails its test. */
function count(what: string, tried: number): void {
  figures[what] = { tried: (figures[what]?.tried ?? 0) + tried, lost: 0 };
}

const SOON = 50; // milliseconds until an `ip` without stdin has ended

/** A node with a pod that must not lose its network. */
class Place {
  constructor(readonly node: Node, readonly other: Pod & Answer) {}

  static async prepare(): Promise<Place> {
    const node = await Node.start("node2", CONF_1_1);
    return new Place(node, await node.start("other"));
  }

  async [Symbol.asyncDispose]() {
    await this.node[Symbol.asyncDispose]();
  }

  /** DEL cleans up after the harm, ADD works, and the other pod is fine. */
  async recover(pod: Pod, before: string, what: string): Promise<void> {
    const { node, other } = this;
    await node.sh("rm -rf /opt/shims");
    assertEquals((await node.cni("DEL", pod)).code, 0, what);
    assertEquals(await node.listing(pod), before, what);
    const again = await node.cni("ADD", pod);
    assertEquals(again.code, 0, `${what}: ${again.stdout}`);
    await node.ping("10.240.0.1", pod, 2);
    await node.ping("10.240.0.1", other, 2);
    assertEquals((await node.cni("DEL", pod)).code, 0, what);
    assertEquals(await node.listing(pod), before, what);
    await node.remove(pod);
  }
}

/** How long a call takes, in milliseconds. */
async function duration(call: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await call();
  return performance.now() - start;
}

Deno.test("ADD and DEL may be killed at any moment", async () => {
  await using place = await Place.prepare();
  const { node } = place;
  const first = await node.sandbox("first");
  const times = {
    ADD: await duration(() => node.cni("ADD", first)),
    DEL: await duration(() => node.cni("DEL", first)),
  };
  await node.remove(first);
  for (const verb of ["ADD", "DEL"] as const) {
    for (let i = 0; i < SIZE.kills; i++) {
      const pod = await node.sandbox("pod");
      const before = await node.listing(pod);
      if (verb === "DEL") await node.cni("ADD", pod);
      const killAfter = times[verb] * (0.3 + 0.8 * i / SIZE.kills);
      await node.cni(verb, pod, { killAfter });
      await run(["sleep", `${SOON / 1000}`]);
      await place.recover(pod, before, `${verb} killed after ${killAfter} ms`);
      count("kills at a moment", 1);
    }
  }
});

/**
 * An ip that passes on its lines until a condition holds, and then kills the
 * plugin. The real ip sees the end of its stdin, as if it were killed between
 * two lines. The plugin is its parent under nsenter too, since nsenter becomes
 * ip. The script holds the condition, since the plugin passes no variables on.
 */
const killer = (isLast: string) => `
  plugin=$PPID
  while read -r line; do
    echo "$line"
    echo "$line" >> /opt/shims/seen
    ${isLast} || continue
    sleep 0.03
    kill -9 $plugin
    exit
  done | exec ip "$@"`;

/** Whether it is the nth line of all that a call of the plugin gives to ip. */
const isNth = (n: number) => `[ $(wc -l < /opt/shims/seen) = ${n} ]`;

/** Whether the line matches a pattern. */
const isLike = (pattern: string) => `echo "$line" | grep -q '${pattern}'`;

const KILLED = 137; // by SIGKILL

Deno.test("ADD and DEL may be killed after any line of any ip", async () => {
  await using place = await Place.prepare();
  const { node } = place;
  const lines = { ADD: 0, DEL: 0 };
  for (const verb of ["ADD", "DEL"] as const) {
    for (let n = 1;; n++) {
      const pod = await node.sandbox("pod");
      const before = await node.listing(pod);
      if (verb === "DEL") await node.cni("ADD", pod);
      await node.shim("ip", killer(isNth(n)));
      const { code } = await node.cni(verb, pod, { env: { PATH: SHIM_PATH } });
      await run(["sleep", `${SOON / 1000}`]);
      await place.recover(pod, before, `${verb} killed after line ${n}`);
      if (code !== KILLED) {
        // The call has fewer lines.
        assertEquals(code, 0, verb);
        break;
      }
      lines[verb]++;
      count("kills after a line", 1);
    }
  }
  assert(lines.ADD > 5 && lines.DEL >= 1, Deno.inspect(lines));
});

Deno.test("GC removes what a killed ADD has left", async () => {
  await using place = await Place.prepare();
  const { node, other } = place;
  const { containerID } = other;
  const valid = [{ containerID, ifname: "eth0" }];
  const gc = { ...CONF_1_1, "cni.dev/valid-attachments": valid };
  const before = await node.listing();
  // After each of these there is a veth pair, which GC finds by its alias.
  const lines = [
    "^link set veth.* master",
    "^link set .*eth0 up",
    "^route append",
  ];
  for (const last of lines) {
    const pod = await node.sandbox("pod");
    await node.shim("ip", killer(isLike(last)));
    const { code } = await node.cni("ADD", pod, { env: { PATH: SHIM_PATH } });
    assertEquals(code, KILLED, last);
    await run(["sleep", `${SOON / 1000}`]);
    await node.sh("rm -rf /opt/shims");
    assertEquals((await node.cni("GC", undefined, { conf: gc })).code, 0);
    await node.remove(pod);
    assertEquals(await node.listing(), before, last);
    count("kills that GC cleared up", 1);
  }
});

/** Stand-ins for the programs on the PATH, and what the error says. */
interface Broken {
  shims: Record<string, string>;
  isWithoutNsenter?: boolean;
  says: RegExp;
}

const BROKEN: Record<string, Broken> = {
  "ip is missing": { shims: {}, says: /ip is not on the PATH/ },
  "ip fails": { shims: { ip: "exit 1" }, says: /ip/ },
  "ip hangs": { shims: { ip: "exec sleep 60" }, says: /30 seconds/ },
  "the pod's ip hangs": {
    // It was told to enter a namespace, or was started in the pod's.
    shims: {
      ip: `[ "$1" != -n ] || exec sleep 60
        [ /proc/$$/ns/net -ef /proc/$PPID/ns/net ] || exec sleep 60
        exec ip "$@"`,
      ln: 'exec ln "$@"',
    },
    says: /30 seconds/,
  },
  "nsenter is missing": {
    shims: { ip: 'exec ip "$@"', ln: 'exec ln "$@"' },
    isWithoutNsenter: true,
    says: /nsenter is not on the PATH/,
  },
  "ln is missing": { shims: { ip: 'exec ip "$@"' }, says: /ln/ },
  "ln fails": {
    shims: { ip: 'exec ip "$@"', ln: "echo no space left >&2; exit 1" },
    says: /no space left/,
  },
};

Deno.test("ADD leaves nothing if a program is missing, fails or hangs", async () => {
  // All at once, since two of them take half a minute.
  const cases = Object.entries(BROKEN);
  await Promise.all(cases.map(async ([what, broken]) => {
    await using place = await Place.prepare();
    const { node } = place;
    const pod = await node.sandbox("pod");
    const before = await node.listing(pod);
    const { shims, isWithoutNsenter, says } = broken;
    await node.sh("mkdir /opt/shims");
    if (!isWithoutNsenter) {
      // The real one, since a shim would start the ip of another PATH.
      await node.sh("ln -s $(command -v nsenter) /opt/shims");
    }
    for (const [name, script] of Object.entries(shims)) {
      await node.shim(name, script);
    }
    const env = { PATH: "/opt/shims" };
    const { code, json, stdout } = await node.cni("ADD", pod, { env });
    assertEquals([code, typeof json?.code], [1, "number"], what + stdout);
    assertMatch(json.msg + json.details, says, what);
    await node.sh("rm -rf /opt/shims");
    assertEquals(await node.listing(pod), before, what);
    await place.recover(pod, before, what);
    count("programs that fail", 1);
  }));
});

Deno.test("pods may start and end at once", async () => {
  await using node = await Node.start("node2");
  await node.sh("mkdir /run/netns");
  const before = await node.listing();
  const sandboxes = async () => {
    const pods: Pod[] = [];
    for (let i = 0; i < SIZE.atOnce; i++) pods.push(await node.sandbox("pod"));
    return pods;
  };
  const add = async (pod: Pod) => {
    const { code, json, stdout } = await node.cni("ADD", pod);
    assertEquals(code, 0, stdout);
    return json.ips[0].address as string;
  };
  const del = async (pod: Pod) => {
    const { code, stdout } = await node.cni("DEL", pod);
    assertEquals(code, 0, stdout);
  };
  const old = await sandboxes();
  const addresses = await Promise.all(old.map(add));
  assertEquals(new Set(addresses).size, SIZE.atOnce);
  const young = await sandboxes();
  const mixed = old.flatMap((pod, i) => [del(pod), add(young[i])]);
  await Promise.all(mixed);
  await Promise.all(young.map(del));
  for (const pod of [...old, ...young]) await node.remove(pod);
  await node.sh("ip link del cni0; rm /tmp/last_allocated_ip");
  assertEquals(await node.listing(), before);
  count("ADDs and DELs at once", 4 * SIZE.atOnce);
});

/** The kernel's memory that it can't reclaim, in MiB. */
async function kernelMemory(): Promise<number> {
  const text = await Deno.readTextFile("/proc/meminfo");
  const kB = text.matchAll(/^(?:SUnreclaim|Percpu): *(\d+)/gm);
  return Array.from(kB, ([, n]) => Number(n)).reduce((a, b) => a + b) / 1024;
}

Deno.test("no two running pods ever share an address", async () => {
  const conf = { ...CONF, podcidr: "10.240.0.0/26" };
  await using node = await Node.start("node2", conf);
  const live = new Map<string, Pod>();
  let calls = 0;
  // Random, but the same sequence each time (Park and Miller).
  let seed = 42;
  const random = () => (seed = seed * 48271 % 2147483647) / 2147483647;
  const end = async (address: string) => {
    const pod = live.get(address)!;
    assertEquals((await node.cni("DEL", pod)).code, 0);
    calls++;
    await node.remove(pod);
    live.delete(address);
  };
  const memory = await kernelMemory();
  for (let round = 0; round < SIZE.rounds; round++) {
    if (live.size < SIZE.pods * random()) {
      const pod = await node.start("pod");
      calls++;
      const { address } = pod.json.ips[0];
      assert(!live.has(address), `${address} is given twice`);
      live.set(address, pod);
    } else if (live.size) {
      await end([...live.keys()][Math.floor(random() * live.size)]);
    }
  }
  for (const address of [...live.keys()]) await end(address);
  assertEquals(await node.sh("ip link show type veth; ls /run/netns"), "");
  const log = await Deno.readTextFile(node.path("/var/log/cni.log"));
  assertEquals(log.match(/\n/g)?.length, calls);
  if (SIZE.rounds >= 1000) { // fewer rounds drown in the other tests' noise
    await run(["sleep", "5"]); // the kernel ends namespaces when it likes
    const more = await kernelMemory() - memory;
    console.log(`The kernel holds ${more.toFixed(1)} MiB more than before`);
    assert(more < 32, `${more} MiB: about a namespace a round is not freed`);
  }
  count("rounds of ADD or DEL", SIZE.rounds);
});

/** Harm to the counter, done as root, and the code of ADD's error or 0. */
const COUNTERS: Record<string, [prepare: string, code: number]> = {
  "a link to a file": ["ln -s /etc/victim $F", 5],
  "a link to nothing": ["ln -s /etc/nothing $F", 5],
  "a link to a device": ["ln -s /dev/null $F", 5],
  "a hard link": ["echo 7 > /tmp/victim; ln /tmp/victim $F", 5],
  "a folder": ["mkdir $F", 5],
  "a pipe": ["mkfifo $F", 5],
  "another user's": ["echo 9 > $F; chown 1000 $F", 5],
  "on a full disk": ["mount -t tmpfs -o size=4k x /tmp; yes > /tmp/x || :", 5],
  "on a read-only disk": ["mount -o remount,ro /tmp", 5],
  "not readable": ["echo 9 > $F; chmod 0 $F", 0],
  "empty": [": > $F", 0],
  "rubbish": ["head -c 99 /dev/urandom > $F", 0],
  "10 MB long": ["yes 1 | head -c 10000000 > $F", 0],
  "negative": ["echo -5 > $F", 0],
  "huge": ["echo 99999999999999999999999 > $F", 0],
};

/** A counter that stays locked. ADD waits for a minute, beside other tests. */
let lockedNode: Node;
let locked: Promise<Answer>;
Deno.test.beforeAll(async () => {
  lockedNode = await Node.start("node2");
  const lock = "flock /tmp/last_allocated_ip sleep 100 > /dev/null 2>&1 &";
  await lockedNode.sh(`touch /tmp/last_allocated_ip; ${lock} sleep 0.2`);
  const pod = await lockedNode.sandbox("pod");
  locked = lockedNode.cni("ADD", pod);
});
Deno.test.afterAll(() => lockedNode[Symbol.asyncDispose]());

Deno.test("a hostile /tmp harms nobody", async () => {
  await Promise.all(
    Object.entries(COUNTERS).map(async ([what, [prepare, code]]) => {
      await using node = await Node.start("node2");
      await node.sh(`echo precious > /etc/victim
        F=/tmp/last_allocated_ip; ${prepare}`);
      const look = () =>
        node.sh(
          "cat /etc/victim; ls /etc/nothing 2>&1; ls -I last_allocated_ip /tmp; cat /tmp/victim || :",
        );
      const pod = await node.sandbox("pod");
      const before = await look();
      const { json, stdout } = await node.cni("ADD", pod);
      assertEquals(json.code ?? 0, code, `${what}: ${stdout}`);
      if (code) assertMatch(json.msg, /last_allocated_ip/, what);
      assertEquals(await look(), before, what);
      const links = await node.sh("ip -o link show type veth");
      assertEquals(links === "", code !== 0, what);
      count("hostile counters", 1);
    }),
  );
});

Deno.test("a log that cannot be written fails no pod", async () => {
  for (
    const harm of [
      "mkdir /var/log/cni.log",
      "mount -o remount,ro /var/log",
      "mount -t tmpfs -o size=4k x /var/log; yes > /var/log/x || :",
      "ln -s /nowhere/cni.log /var/log/cni.log",
    ]
  ) {
    await using node = await Node.start("node2");
    await node.sh(harm);
    const pod = await node.start("pod");
    await node.ping("10.240.0.1", pod, 2);
    count("broken logs", 1);
  }
});

Deno.test("no input can forge a line of the log", async () => {
  await using node = await Node.start("node2");
  const pod = await node.sandbox("pod");
  const evil = "x\n2026-01-01T00:00:00.000Z ADD forged\r\u2028";
  await node.cni("ADD", { ...pod, containerID: evil });
  await node.cni("ADD", { ...pod, netns: `/${evil}` });
  await node.cni(evil, pod);
  const log = await Deno.readTextFile(node.path("/var/log/cni.log"));
  assertEquals(log.trimEnd().split(/[\n\r\u2028]/).length, 3, log);
});

Deno.test("hostile input gets an error, and changes nothing", async () => {
  await using place = await Place.prepare();
  const { node } = place;
  const pod = await node.sandbox("pod");
  const before = await node.listing(pod);
  let seed = 7;
  const random = (n: number) => (seed = seed * 48271 % 2147483647) % n;
  const pick = <T>(of: ArrayLike<T>) => of[random(of.length)];
  const BITS = [
    "/",
    "..",
    " ",
    "\n",
    "-h",
    "$(id)",
    ";",
    "`id`",
    '"',
    "'",
    "#",
    "%s",
    "\\",
    "é",
    "\u202e",
    "*",
    "~",
    "|",
    "&",
    "0".repeat(300),
  ];
  const JUNK = [
    5,
    true,
    [],
    {},
    [[]],
    "",
    " ",
    "10.240.0.0",
    "::/64",
    "\0",
    "10.240.0.1/24",
    "999.0.0.0/24",
    "10.240.0.0/24 ",
    "1e9",
    -1,
    1e400,
  ];
  // It always ends with a character that no name may have.
  const name = () =>
    pick(["a", "", "eth"]) + pick(BITS) + pick(BITS) + pick(["/", " ", "\n"]);
  const calls: (() => Promise<Answer>)[] = [
    () => node.cni("ADD", { ...pod, containerID: name() }),
    () => node.cni("DEL", { ...pod, containerID: name() }),
    () => node.cni("ADD", pod, { env: { CNI_IFNAME: name() } }),
    () => node.cni("ADD", { ...pod, netns: name().replace(/^\/+/, "") }),
    () => node.cni("ADD", pod, { env: { CNI_NETNS: `/${name()}/none` } }),
    () => node.cni(name(), pod),
    () => node.cni("ADD", pod, { conf: { ...CONF, podcidr: pick(JUNK) } }),
    () => node.cni("ADD", pod, { conf: { ...CONF, name: name() } }),
    () => node.cni("ADD", pod, { conf: { ...CONF, cniVersion: name() } }),
    () => {
      const conf = JSON.stringify(CONF);
      const at = random(conf.length - 1) + 1;
      return node.cni("ADD", pod, { conf: conf.slice(0, at) });
    },
  ];
  for (let i = 0; i < SIZE.inputs; i += 10) {
    const answers = await Promise.all(calls.map((call) => call()));
    for (const { code, json, stdout } of answers) {
      assertEquals(code, 1, stdout);
      assert(json.code >= 1 && json.code !== 3 && json.code < 999, stdout);
    }
  }
  assertEquals(await node.listing(pod), before);
  count("hostile inputs", SIZE.inputs);
});

/** What the plugin must not do. Each line throws if Deno refuses it. */
const FORBIDDEN = [
  'new Deno.Command("sh").outputSync()',
  'new Deno.Command("/bin/ls").outputSync()',
  'await Deno.connect({ hostname: "127.0.0.1", port: 9 })',
  'Deno.listen({ hostname: "127.0.0.1", port: 0 })',
  'Deno.readTextFileSync("/etc/passwd")',
  'Deno.readTextFileSync("/tmp/other")',
  'Deno.writeTextFileSync("/tmp/other", "")',
  'Deno.writeTextFileSync("/etc/cni/net.d/x.conf", "")',
  'Deno.removeSync("/etc/passwd")',
  'Deno.symlinkSync("/etc/passwd", "/run/netns/x")',
  'Deno.env.get("HOME")',
  'Deno.kill(1, "SIGCONT")',
];

Deno.test("the plugin has no permission that it does not need", async () => {
  const probe = await Deno.makeTempFile({ suffix: ".ts" });
  const binary = probe.replace(/\.ts$/, "");
  const lines = FORBIDDEN.map((line) =>
    `try { ${line}; console.log("allowed"); } catch (e) { console.log(e.name); }`
  );
  await Deno.writeTextFile(probe, lines.join("\n"));
  const config = join(ROOT, "deno.json");
  const flags = ["-P", "--no-prompt", "--no-check", "--config", config];
  const words = [Deno.execPath(), "compile", ...flags, "-o", binary, probe];
  const env = { DENORT_BIN: DENORT };
  const { code, stderr } = await run(words, { env });
  assertEquals(code, 0, stderr);
  const { stdout } = await run([binary]);
  await Deno.remove(probe);
  await Deno.remove(binary);
  const names = stdout.trim().split("\n");
  assertEquals(names, FORBIDDEN.map(() => "NotCapable"), stdout);
  count("forbidden acts", FORBIDDEN.length);
});

Deno.test("ADD waits for a lock on the counter, but not for ever", async () => {
  const { json, stdout } = await locked;
  assertEquals(json?.code, 11, stdout);
  assertMatch(json.msg, /last_allocated_ip is locked/);
  assertEquals(await lockedNode.sh("ip -o link show type veth"), "");
  count("hostile counters", 1);
});
