/**
 * A museum of bugs. Each test shows one thing that the tutorial's shell script
 * gets wrong and this plugin gets right. Together they are the reason why the
 * plugin is longer than the script.
 *
 * @module
 */
import {
  assert,
  assertArrayIncludes,
  assertEquals,
  assertMatch,
  assertNotEquals,
} from "@std/assert";
import { CONF, Node } from "../lab/node.ts";

Deno.test("a failed step is not reported as a success", async () => {
  await using node = await Node.start("node1");
  await node.sh("mkdir /opt/tools && ln -s /bin/false /opt/tools/ip");
  const pod = await node.sandbox("alpine1");
  const { code, json } = await node.cni("ADD", pod, {
    env: { PATH: "/opt/tools:/bin" },
  });
  assertNotEquals(code, 0);
  assertEquals(json.ips, undefined);
});

Deno.test("an error reaches the runtime as JSON", async () => {
  await using node = await Node.start("node1");
  const pod = await node.sandbox("alpine1");
  await node.remove(pod);
  const { json } = await node.cni("ADD", pod);
  assertEquals(json.cniVersion, CONF.cniVersion);
  assertEquals(json.code, 4);
  assert(json.msg.includes(pod.netns));
});

Deno.test("the node keeps its eth0", async () => {
  await using node = await Node.start("node1");
  await node.sh(`ip link add eth0 up type bridge
    ip addr add 10.0.2.14/24 dev eth0`);
  const eth0 = () => node.sh("ip -o link show eth0; ip -o -4 addr show eth0");
  const before = await eth0();
  const pod = await node.start("alpine1");
  await node.ping("10.0.2.14", pod);
  assertEquals(await eth0(), before);
});

Deno.test("pods that start at once get different addresses", async () => {
  await using node = await Node.start("node1");
  const names = Array.from({ length: 50 }, (_, i) => `nginx${i}`);
  const pods = await Promise.all(names.map((name) => node.start(name)));
  const ips = pods.map(({ json }) => json.ips[0].address.split("/")[0]);
  assertEquals(new Set(ips).size, pods.length);
  await Promise.all(pods.map((pod, i) => {
    const next = ips[(i + 1) % ips.length];
    return node.ping(next, pod);
  }));
});

Deno.test("the counter does not run past 254", async () => {
  await using node = await Node.start("node1");
  let n = 2;
  for (const content of ["254", "300", "-1", "", "1e400", "\0\xff"]) {
    await Deno.writeTextFile(node.path("/tmp/last_allocated_ip"), content);
    const { json } = await node.start("nginx1");
    assertEquals(json.ips[0].address, `10.240.0.${n++}/24`);
  }
});

Deno.test("a cleaned /tmp gives no address twice", async () => {
  await using node = await Node.start("node1");
  for (const n of [2, 3, 4]) {
    const { json } = await node.start("nginx1");
    assertEquals(json.ips[0].address, `10.240.0.${n}/24`);
    await node.sh("rm /tmp/last_allocated_ip");
  }
});

Deno.test("the MAC is that of CNI_IFNAME", async () => {
  await using node = await Node.start("node1");
  const pod = await node.sandbox("alpine1");
  await node.in(pod, "ip link add eth0 type bridge");
  const net1 = { env: { CNI_IFNAME: "net1" } };
  const { json } = await node.cni("ADD", pod, net1);
  const [{ name, mac }] = json.interfaces;
  assertEquals(name, "net1");
  assert((await node.in(pod, "ip link show net1")).includes(`ether ${mac} `));
});

Deno.test("a /20 works as well", async () => {
  await using node = await Node.start("node1", {
    ...CONF,
    podcidr: "10.240.16.0/20",
  });
  await node.start("alpine1");
  await node.setCounter(255);
  const { json, ...pod } = await node.start("nginx1");
  // A /24 would have ended before this address.
  assertEquals(json.ips[0].address, "10.240.17.0/20");
  await node.ping("10.240.16.2", pod);
});

Deno.test("DEL removes the interface even if the namespace lives on", async () => {
  await using node = await Node.start("node1");
  const pod = await node.start("alpine1");
  await node.cni("DEL", pod);
  assertEquals(await node.in(pod, "ls /sys/class/net"), "lo");
});

for (
  const [what, plant] of [
    ["a symlink", "ln -s"],
    ["a hard link", "ln"],
    ["another user's file", "install -o nobody"],
  ]
) {
  Deno.test(`${what} in /tmp is not followed`, async () => {
    await using node = await Node.start("node1");
    await node.sh(`mkdir /tmp/nobody && echo 7 > /tmp/nobody/victim
      ${plant} /tmp/nobody/victim /tmp/last_allocated_ip`);
    const pod = await node.sandbox("alpine1");
    const before = await node.listing(pod);
    const { json } = await node.cni("ADD", pod);
    assertEquals(json.code, 5);
    assertMatch(json.msg, /last_allocated_ip/);
    assertEquals(await node.listing(pod), before);
    assertEquals(await node.sh("cat /tmp/last_allocated_ip"), "7");
  });
}

Deno.test("0.4.0 comes with CHECK", async () => {
  await using node = await Node.start("node1");
  const { supportedVersions } = (await node.cni("VERSION")).json;
  for (const cniVersion of ["0.4.0", "1.0.0", "1.1.0"]) {
    assertArrayIncludes(supportedVersions, [cniVersion]);
    const conf = { ...CONF, cniVersion };
    const pod = await node.start("alpine1", { conf });
    const check = { conf: { ...conf, prevResult: pod.json } };
    assertEquals((await node.cni("CHECK", pod, check)).code, 0);
  }
});

Deno.test("DEL of ../../../tmp/x deletes nothing", async () => {
  await using node = await Node.start("node1");
  await node.sh("mkdir /tmp/folder && ln -s folder /tmp/x");
  const pod = {
    ...await node.sandbox("alpine1"),
    containerID: "../../../tmp/x",
  };
  const before = await node.listing();
  assertEquals((await node.cni("DEL", pod)).json?.code, 4);
  assertEquals(await node.listing(), before);
});
