/**
 * CHECK: it finds everything that is not as ADD left it.
 *
 * @module
 */
import { CONF_1_1, Node, vethOf } from "../lab/node.ts";
import { assertError } from "./answer.ts";

Deno.test("CHECK finds everything that is not as ADD left it", async (t) => {
  await using node = await Node.start("node1", CONF_1_1);
  for (
    const { fault, says } of [
      {
        fault: "ip -n $pod addr flush dev eth0",
        says: /eth0 .*10\.240\.0\.\d+\/24/,
      },
      { fault: "ip -n $pod route del default", says: /no default route/ },
      { fault: "ip -n $pod link set eth0 down", says: /eth0 .*\bup\b/ },
      { fault: "ip -n $pod link set eth0 address 2:0:0:0:0:1", says: /MAC/ },
      { fault: "ip link del $veth", says: /no host veth/ },
      { fault: "ip link set $veth nomaster", says: /veth.* on cni0/ },
      { fault: "ip link set $veth down", says: /veth.*\bup\b/ },
      { fault: "rm /run/netns/$id", says: /netns\/\S+ does not point to/ },
      { fault: "ip netns del $pod", says: /netns/ },
      { fault: "ip link set cni0 down", says: /cni0 .*\bup\b/ },
      { fault: "ip addr flush dev cni0", says: /cni0 .*10\.240\.0\.1$/ },
    ]
  ) {
    await t.step(fault, async () => {
      const pod = await node.start("alpine1");
      const netns = pod.netns.split("/").pop();
      const names = `id=${pod.containerID} pod=${netns} veth=${vethOf(pod)}`;
      await node.sh(`${names}; ${fault}`);
      const check = { conf: { ...CONF_1_1, prevResult: pod.json } };
      assertError(await node.cni("CHECK", pod, check), 101, says);
    });
  }
});
