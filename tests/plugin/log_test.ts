/**
 * What the plugin tells its operator: the lines of /var/log/cni.log by level,
 * and its words if you run it by hand.
 *
 * @module
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { conf, Node } from "../lab/node.ts";
import { assertError } from "./answer.ts";

Deno.test("the log has one line a call, and not everybody may read it", async () => {
  await using node = await Node.start("node1");
  const pod = await node.start("alpine1");
  await node.cni("ADD", pod);
  await node.cni("DEL", pod);
  const log = node.path("/var/log/cni.log");
  const lines = (await Deno.readTextFile(log)).trimEnd().split("\n");
  const who = `${pod.containerID} eth0`;
  const ends = [
    `ADD ${who} 10.240.0.2/24`,
    `ADD ${who} error 100`,
    `DEL ${who}`,
  ];
  assertEquals(lines.length, ends.length);
  for (const [i, line] of lines.entries()) {
    assertMatch(line, new RegExp(`^\\d{4}-\\d\\d-\\d\\dT[\\d:.]+Z ${ends[i]}`));
  }
  assertEquals((await Deno.stat(log)).mode! & 0o777, 0o640);
});

Deno.test("the log's steps do what ADD did if you paste them", async () => {
  await using node = await Node.start("node1", conf({ logLevel: "DEBUG" }));
  const log = async () =>
    (await Deno.readTextFile(node.path("/var/log/cni.log"))).trimEnd()
      .split("\n").map((line) => line.replace(/^\S+ /, ""));
  const pod = await node.start("alpine1");
  const added = await node.listing(pod);
  const steps = await log();
  assertMatch(steps.pop()!, /^ADD /);
  assert(
    steps.every((line) => /^(ip|ln|nsenter|sysctl) /.test(line)),
    `${steps}`,
  );
  assert(steps.some((line) => /^nsenter .* ip addr add .*\/24/.test(line)));
  assertEquals((await node.cni("DEL", pod)).code, 0);
  await node.sh("ip link del cni0");
  // The steps do not include the counter, which stays as it is.
  await node.sh(steps.map((line) => `${line} > /dev/null`).join("\n"));
  assertEquals(withoutIndexes(await node.listing(pod)), withoutIndexes(added));
  await node.ping("10.240.0.1", pod);
});

/** A listing without the kernel's indexes of links. */
const withoutIndexes = (listing: string) =>
  listing.replaceAll(/^\d+: |@if\d+/gm, "");

for (
  const { logLevel, lines } of [
    { logLevel: "INFO", lines: 2 },
    { logLevel: "ERROR", lines: 1 },
  ]
) {
  Deno.test(`the log has ${lines} of two lines if logLevel is ${logLevel}`, async () => {
    await using node = await Node.start("node1", conf({ logLevel }));
    const pod = await node.start("alpine1");
    assertError(await node.cni("ADD", pod), 100, /exists/);
    const log = await Deno.readTextFile(node.path("/var/log/cni.log"));
    assertEquals(log.trimEnd().split("\n").length, lines, log);
  });
}

Deno.test("the plugin says what it is and where to look if run by hand", async () => {
  await using node = await Node.start("node1");
  const { code, stdout, stderr } = await node.run("/opt/cni/bin/custom-cni");
  assertEquals([code, stdout], [0, ""]);
  const [version, look, ...rest] = stderr.trimEnd().split("\n");
  assertMatch(version, /^custom-cni \d+\.\d+\.\d+, .*0\.3\.0.*1\.1\.0$/);
  assertMatch(look, /node-setup\.ts --check/);
  assertEquals(rest, []);
});
