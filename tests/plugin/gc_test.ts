/**
 * GC: it removes what the runtime does not list, and nothing of others.
 *
 * @module
 */
import { assertEquals } from "@std/assert";
import { CONF_1_1, Node } from "../lab/node.ts";

Deno.test("GC removes stale attachments of its network, and nothing else", async () => {
  await using node = await Node.start("node1", CONF_1_1);
  const name = "custom-cni2";
  const theirs = { ...CONF_1_1, name, podcidr: "10.9.9.0/24" };
  await node.sh(`ip link add veth200 type veth peer name tap0
    ip netns add foreign && ln -s foreign /run/netns/alias`);
  const kept = await node.start("alpine1");
  const other = await node.start("nginx1", { conf: theirs });
  const before = await node.listing(kept);
  const stale = await node.start("nginx2");
  const gone = await node.start("nginx3");
  await node.remove(gone);
  const { containerID } = kept;
  const valid = [{ containerID, ifname: "eth0" }];
  const gc = { ...CONF_1_1, "cni.dev/valid-attachments": valid };
  assertEquals((await node.cni("GC", undefined, { conf: gc })).code, 0);
  await node.remove(stale);
  assertEquals(await node.listing(kept), before);
  // Two networks, each with its own pod CIDR, and both work.
  await node.ping("10.240.0.1", kept);
  await node.ping("10.9.9.1", other);
});

Deno.test("GC removes other programs' names in /run/netns", async () => {
  await using node = await Node.start("node1", CONF_1_1);
  await node.sh(`mkdir -p /run/netns
    ln -s /proc/4194305/ns/net /run/netns/qemu-1
    ln -s /run/netns/gone /run/netns/router`);
  const names = () => node.sh("ls /run/netns");
  const before = await names();
  const pod = await node.start("alpine1");
  const gc = { conf: { ...CONF_1_1, "cni.dev/valid-attachments": [] } };
  assertEquals((await node.cni("GC", undefined, gc)).stdout, "");
  await node.remove(pod);
  assertEquals(await names(), before);
});
