/**
 * The first call of a binary. Deno then puts its cache beside the binary, and
 * runs that cache as root at each later call.
 *
 * @module
 */
import { assertEquals, assertMatch, assertNotEquals } from "@std/assert";
import { addressOf, CONF_1_1, Node } from "../lab/node.ts";

const CACHE = "/opt/cni/bin/.custom-cni";

/** All files of the cache: the plugin's source and its compiled code. */
const files = async (node: Node) =>
  (await node.sh(`find ${CACHE} -type f -size +0`)).split("\n");

Deno.test("ten first calls at once all succeed", async () => {
  await using node = await Node.start("node1");
  const pods = await Promise.all(
    Array.from({ length: 10 }, (_, n) => node.start(`pod${n}`)),
  );
  assertEquals(new Set(pods.map(addressOf)).size, 10);
  assertEquals((await files(node)).length, 2);
});

Deno.test("only root can write the cache, even if the runtime's umask is 0", async () => {
  await using node = await Node.start("node1");
  const careless = "#!/bin/sh\numask 0\nexec /opt/cni/bin/custom-cni\n";
  const plugin = node.path("/opt/careless");
  await Deno.writeTextFile(plugin, careless, { mode: 0o755 });
  await node.start("alpine1", { plugin: "/opt/careless" });
  assertMatch(await node.sh(`stat -c %a ${CACHE}/*.cache`), /^666$/);
  for (const file of await files(node)) {
    const words = `setpriv --reuid 65534 --clear-groups tee -a ${file}`;
    const { code, stderr } = await node.run(...words.split(" "));
    assertNotEquals(code, 0);
    assertMatch(stderr, /Permission denied/);
  }
});

for (
  const [what, line] of [
    ["holds other code", "echo 'Deno.exit(0)' > $file"],
    ["holds rubbish", "head -c 9999 /dev/urandom > $file"],
    [
      "has one byte flipped",
      "printf X | dd of=$file bs=1 seek=999 conv=notrunc",
    ],
    ["is cut off", "truncate -s 999 $file"],
    ["is gone", "rm $file"],
  ]
) {
  Deno.test(`ADD gives a network if the cache ${what}`, async () => {
    await using node = await Node.start("node1");
    const pods = [await node.start("alpine1")];
    for (const file of await files(node)) {
      await node.sh(`file=${file}; ${line}`);
      pods.push(await node.start("nginx1"));
      await node.ping(addressOf(pods[0]), pods.at(-1)!);
    }
    assertEquals(pods.length, 3);
  });
}

Deno.test("ADD gives a network if the binary's folder is read-only", async () => {
  await using node = await Node.start("node1");
  await node.sh(`mkdir /opt/fixed && mount -t tmpfs tmpfs /opt/fixed
    cp /opt/cni/bin/custom-cni /opt/fixed
    mount -o remount,ro /opt/fixed`);
  const call = { plugin: "/opt/fixed/custom-cni", env: { HOME: "/run/root" } };
  const pod = await node.start("alpine1", call);
  await node.ping("10.240.0.1", pod);
  assertMatch(await node.sh("ls /run/root/.local/share/custom-cni"), /\.cache/);
});

Deno.test("first calls that are killed leave nothing harmful", async () => {
  await using node = await Node.start("node1", CONF_1_1);
  for (let killAfter = 2; killAfter < 26; killAfter += 2) {
    await node.sh(`rm -r ${CACHE}; install -dm700 ${CACHE}`);
    await node.cni("STATUS", undefined, { killAfter });
    const pod = await node.start(`pod${killAfter}`);
    await node.ping("10.240.0.1", pod);
  }
});

Deno.test("no call fails if the binary is replaced while calls start", async () => {
  await using node = await Node.start("node1", CONF_1_1);
  const plugin = "/opt/moved/custom-cni";
  const copy = `cp /opt/cni/bin/custom-cni ${plugin}`;
  await node.sh(`mkdir /opt/moved; ${copy}`);
  for (let round = 0; round < 20; round++) {
    await node.sh(`${copy}.new`);
    const call = () => node.cni("STATUS", undefined, { plugin });
    const calls = Array.from({ length: 6 }, call);
    const moved = node.sh(`mv ${plugin}.new ${plugin}`);
    for (const { code, stdout, stderr } of await Promise.all(calls)) {
      assertEquals(code, 0, stdout + stderr);
    }
    await moved;
  }
});
