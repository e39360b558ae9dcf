/**
 * STATUS: it fails only if no ADD can succeed, since it makes the whole node
 * NotReady.
 *
 * @module
 */
import { assertEquals } from "@std/assert";
import {
  addressOf,
  type Answer,
  CONF_1_1,
  Node,
  type Pod,
} from "../lab/node.ts";

Deno.test("a full pod CIDR makes the whole node NotReady", async () => {
  const full = { ...CONF_1_1, podcidr: "10.9.9.0/29" };
  await using node = await Node.start("node1", full);
  const pods: (Pod & Answer)[] = [];
  for (let i = 0; i < 5; i++) pods.push(await node.start(`nginx${i}`));
  assertEquals(
    (await node.cni("ADD", await node.sandbox("more"))).json.code,
    11,
  );
  assertEquals((await node.cni("STATUS")).stdout, "");
  await node.ping(addressOf(pods[4]), pods[0]);
});
