/** The tutorial behaves as it says, and the machine stays as it was. */
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { join } from "@std/path/posix/join";
import { run } from "./node.ts";
import { ROOT } from "../setup/root.ts";

const TUTORIAL = [
  ...[Deno.execPath(), "run", "-A", join(ROOT, "tests/lab/tutorial.ts")],
];

/** What the lab could leave on the machine. */
async function machine(): Promise<string> {
  const { stdout } = await run([
    "sh",
    "-c",
    `
    ip -o link; ip -o addr; ip route show table all; iptables-save -c 2>&1
    cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/hostname
    ls -a /etc/cni /opt/cni /run/netns /var/log/cni.log /tmp/last_allocated_ip`,
  ]);
  return stdout.replaceAll(/valid_lft.*|^#.*|\[\d+:\d+\]/gm, "");
}

Deno.test("each step of the tutorial fails before and works after", async () => {
  const before = await machine();
  const { code, stdout, stderr } = await run([...TUTORIAL, "--quiet"]);
  assertEquals(code, 0, stdout + stderr);
  assertEquals(stdout.match(/^ok {3}Step \d/gm)?.length, 6, stdout);
  const readme = await Deno.readTextFile(join(ROOT, "README.md"));
  assertStringIncludes(readme, stdout.trim());
  assertEquals(await machine(), before);
});

Deno.test("the tutorial stops after the step that is asked for", async () => {
  const { code, stdout } = await run([...TUTORIAL, "--step", "1"]);
  assertEquals(code, 0, stdout);
  assertStringIncludes(stdout, "10.240.1.2/24");
  assertStringIncludes(stdout, "The pods end");
  assert(!stdout.includes("Step 2"), stdout);
});

Deno.test("Ctrl-C and a kill leave nothing of the tutorial", async () => {
  for (const signal of ["SIGINT", "SIGKILL"] as const) {
    const before = await machine();
    const [program, ...args] = [...TUTORIAL, "--keep", "--step", "1"];
    const child = new Deno.Command(program, { args, stdout: "piped" }).spawn();
    const reader = child.stdout.getReader();
    let said = "";
    while (!said.includes("Ctrl-C here")) {
      const { value, done } = await reader.read();
      assert(!done, said);
      said += new TextDecoder().decode(value);
    }
    const entries = said.matchAll(/nsenter -t(\d+)/g);
    const pids = new Set(Array.from(entries, ([, pid]) => pid));
    assertEquals(pids.size, 3);
    child.kill(signal);
    while (!(await reader.read()).done);
    await child.status;
    // The nodes' processes see the end of their stdin, and end.
    for (const pid of pids) {
      await run(["tail", "-f", "/dev/null", "--pid", pid]);
    }
    assertEquals(await machine(), before);
  }
});
