/**
 * DEL: it removes what is left of what ADD created, and nothing else.
 *
 * @module
 */
import { assert, assertEquals, assertMatch, assertRejects } from "@std/assert";
import { addressOf, conf, CONF_1_1, Node, vethOf } from "../lab/node.ts";

for (
  const { when, isGone, env } of [
    { when: "" },
    { when: " after the namespace is gone", isGone: true },
    { when: " with an empty CNI_NETNS", env: { CNI_NETNS: "" } },
  ]
) {
  Deno.test(`DEL${when} removes what ADD created, and nothing else`, async () => {
    await using node = await Node.start("node1");
    const other = await node.start("nginx1");
    const before = await node.listing();
    const pod = await node.start("alpine1");
    if (isGone) await node.remove(pod);
    assertEquals((await node.cni("DEL", pod, { env })).code, 0);
    if (!isGone) await node.remove(pod);
    assertEquals(await node.listing(), before);
    await node.ping(addressOf(other));
  });
}

Deno.test("DEL removes an attachment if its name is too long for a link", async () => {
  await using node = await Node.start("node1", conf({ name: "n".repeat(118) }));
  await node.start("nginx1");
  const before = await node.listing();
  const pod = { ...await node.sandbox("a"), containerID: "c".repeat(118) };
  await node.ping(addressOf(await node.cni("ADD", pod)));
  assertEquals((await node.cni("DEL", pod)).code, 0);
  await node.remove(pod);
  assertEquals(await node.listing(), before);
});

Deno.test("DEL removes both attachments if ADD ran in two namespaces", async () => {
  await using node = await Node.start("node1");
  await node.start("nginx1");
  const before = await node.listing();
  const first = await node.start("alpine1");
  const { containerID } = first;
  const second = { ...await node.sandbox("alpine1"), containerID };
  const answer = await node.cni("ADD", second);
  for (const pod of [first, answer]) await node.ping(addressOf(pod));
  assertEquals((await node.cni("DEL", second)).code, 0);
  for (const pod of [first, second]) await node.remove(pod);
  assertEquals(await node.listing(), before);
});

/** Bad edits of the conf while pods run. */
const EDITS: Record<string, unknown>[] = [
  { runtimeConfig: { ips: ["10.240.0.9/24"] } },
  { runtimeConfig: { mac: "02:00:00:00:00:01" } },
  { mtu: "1400" },
  { logLevel: "debug" },
  { dns: [] },
  { podcidr: "10.240.1.5/24" },
  { podcidr: undefined },
  { prevResult: { interfaces: "none" } },
  { "cni.dev/valid-attachments": "none" },
  { cniVersion: "9.9.9" },
  { cniVersion: 5 },
  { cniVersion: undefined },
];

Deno.test("a conf that was edited badly keeps pods from ending", async () => {
  await using node = await Node.start("node1", CONF_1_1);
  await node.start("nginx1");
  const before = await node.listing();
  for (const edit of EDITS) {
    const pod = await node.start("alpine1");
    const answer = await node.cni("DEL", pod, {
      conf: { ...CONF_1_1, ...edit },
    });
    assertEquals(answer.stdout, "", JSON.stringify(edit));
    await node.remove(pod);
    assertEquals(await node.listing(), before, JSON.stringify(edit));
  }
});

Deno.test("the name of a container called undefined stays behind", async () => {
  await using node = await Node.start("node1");
  await node.sh("ip link add other0 type bridge");
  const pod = { ...await node.sandbox("a"), containerID: "undefined" };
  assertEquals((await node.cni("ADD", pod)).code, 0);
  assertEquals((await node.cni("DEL", pod)).code, 0);
  await assertRejects(() => node.sh("ls /run/netns/undefined"));
});

Deno.test("DEL deletes somebody else's veth because of its index", async () => {
  await using node = await Node.start("node1");
  const pod = await node.sandbox("alpine1");
  const third = await node.sandbox("router");
  const [ns, other] = [pod, third].map((it) => it.netns.split("/").pop());
  // The other end of the pod's eth0 is in a third namespace. Both ends have the
  // same indexes as a foreign veth pair on the node.
  await node.sh(`
    ip -n ${ns} link add eth0 index 71 type veth peer name eth9 index 72 \
      netns ${other}
    ip link add strange0 index 72 type veth peer name strange1 index 71`);
  const before = await node.listing();
  assertEquals((await node.cni("DEL", pod)).code, 0);
  assertEquals(await node.listing(), before);
});

Deno.test("ADD and DEL of net1 do not change eth0", async () => {
  await using node = await Node.start("node1");
  const pod = await node.start("alpine1");
  const before = await node.listing(pod);
  const net1 = { env: { CNI_IFNAME: "net1" } };
  const { json } = await node.cni("ADD", pod, net1);
  assertEquals(json.interfaces[0].name, "net1");
  const routes = await node.in(pod, "ip route show default");
  assertMatch(routes, /^default .*dev eth0.*\ndefault .*dev net1/);
  await node.cni("DEL", pod, net1);
  assertEquals(await node.listing(pod), before);
  await node.ping("10.240.0.1", pod);
  await node.cni("DEL", pod);
  await assertRejects(() => node.sh(`ls /run/netns/${pod.containerID}`));
});

Deno.test("ADD and DEL leave a namespace alone if it has the container's name", async () => {
  await using node = await Node.start("node1");
  const netns = "/var/run/netns/alpine1";
  const pod = { name: "alpine1", containerID: "alpine1", netns };
  await node.sh("ip netns add alpine1");
  const names = () => node.sh("ls -l /run/netns");
  const before = await names();
  await node.ping(addressOf(await node.cni("ADD", pod)));
  assertEquals(await names(), before);
  assertEquals((await node.cni("DEL", pod)).code, 0);
  assertEquals(await names(), before);
});

for (const folder of ["/run/netns", "/var/run/netns"]) {
  Deno.test(`a namespace with the container's name in ${folder} is lost`, async () => {
    await using node = await Node.start("node1");
    await node.sh("ip netns add box1");
    const pod = { name: "", containerID: "box1", netns: `${folder}/box1` };
    for (let i = 0; i < 2; i++) {
      const answer = await node.cni("ADD", pod);
      await node.ping("10.240.0.1", pod);
      assertEquals(answer.json.interfaces[0].sandbox, pod.netns);
      assertEquals((await node.cni("DEL", pod)).code, 0);
      assert((await Deno.lstat(node.path("/run/netns/box1"))).isFile);
    }
  });
}

Deno.test("a foreign link's name or alias fails DEL and STATUS", async () => {
  await using node = await Node.start("node1", CONF_1_1);
  const before = await node.start("alpine1");
  // All that the kernel accepts: a name has no blank, an alias has anything.
  const range = (from: number, to: number) =>
    Array.from({ length: to - from + 1 }, (_, i) => from + i)
      .map((byte) => `\\${byte.toString(8).padStart(3, "0")}`);
  const all = [...range(1, 31), '"', "\\134", "'\\''", ...range(127, 255)];
  const names = ["a\\001\\033b", "c\\042d", "e\\377\\134f", "g\\177h"];
  for (const [i, name] of names.entries()) {
    await node.sh(`ip link add "$(printf '${name}')" type veth peer name f${i}
      ip link set f${i} alias "$(printf '${all.slice(i).join("")}x')"`);
  }
  const check = { conf: { ...CONF_1_1, prevResult: before.json } };
  assertEquals((await node.cni("CHECK", before, check)).stdout, "");
  assertEquals((await node.cni("STATUS")).stdout, "");
  const pod = await node.start("nginx1");
  for (const each of [before, pod]) {
    assertEquals((await node.cni("DEL", each)).stdout, "");
    await assertRejects(() => node.sh(`ip link show ${vethOf(each)}`));
  }
  const gc = { conf: { ...CONF_1_1, "cni.dev/valid-attachments": [] } };
  assertEquals((await node.cni("GC", undefined, gc)).stdout, "");
  for (const i of names.keys()) await node.sh(`ip link show f${i}`);
});
