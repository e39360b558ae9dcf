/** The tutorial does what it says, and the machine stays as it was. */
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { join } from "@std/path/posix/join";
import { machine } from "./machine.ts";
import { hear, run } from "./node.ts";
import { ROOT } from "../setup/root.ts";

const TUTORIAL = [
  ...[Deno.execPath(), "run", "-A", join(ROOT, "tests/lab/tutorial.ts")],
];

Deno.test("each step of the tutorial fails before its command and works after it", async () => {
  const before = await machine();
  const { code, stdout, stderr } = await run([...TUTORIAL, "--quiet"]);
  assertEquals(code, 0, stdout + stderr);
  assertEquals(stdout.match(/^ok {3}Step \d/gm)?.length, 6, stdout);
  const readme = await Deno.readTextFile(join(ROOT, "README.md"));
  assertStringIncludes(readme, stdout.trim());
  assertEquals(await machine(), before);
});

Deno.test("the tutorial stops after --step N", async () => {
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
    const said = await hear(child.stdout, "Ctrl-C here");
    const entries = said.matchAll(/nsenter -t(\d+)/g);
    const pids = new Set(Array.from(entries, ([, pid]) => pid));
    assertEquals(pids.size, 3);
    child.kill(signal);
    await child.stdout.cancel();
    await child.status;
    // The nodes' processes see the end of their stdin and end.
    for (const pid of pids) {
      await run(["tail", "-f", "/dev/null", "--pid", pid]);
    }
    assertEquals(await machine(), before);
  }
});
