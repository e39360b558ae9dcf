/**
 * The plugin's tests with the `ip` of other Debian releases, which comes first
 * on the PATH of the plugin and of the lab.
 *
 *     deno test -A tests/runtimes/ip.ts
 *
 * @module
 */
import { assertEquals } from "@std/assert";
import { run } from "../lab/node.ts";
import { ROOT } from "../setup/root.ts";
import { IP_RELEASES, ipFolder } from "../setup/debian.ts";

const TESTS = ["add", "del", "check", "gc", "museum", "conformance"]
  .map((name) => `${ROOT}tests/plugin/${name}_test.ts`);

for (const release of IP_RELEASES) {
  const PATH = `${ipFolder(release)}:${Deno.env.get("PATH")}`;
  const { code, stdout } = await run(["ip", "-V"], { env: { PATH } });
  if (code) throw new Error("Run this first: deno task e2e");
  Deno.test(`the plugin's tests pass with ${stdout.trim()} (${release})`, async () => {
    const command = [Deno.execPath(), "test", "-A", "--no-check", ...TESTS];
    const env = { PATH, NO_COLOR: "1" };
    const { code, stdout } = await run(command, { env });
    const failures = stdout.slice(stdout.indexOf("\n ERRORS"));
    assertEquals(code, 0, failures);
  });
}
