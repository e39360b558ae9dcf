/**
 * containerd, called through its socket, as a kubelet does. It runs the
 * tutorial's pods as sandboxes with containers, on two nodes.
 *
 *     deno test -A tests/runtimes/cri.ts
 *
 * @module
 */
import { assert, assertEquals, assertRejects } from "@std/assert";
import { Cluster, readPods } from "../lab/cluster.ts";
import { CONF, CONF_FILE } from "../lab/node.ts";
import { machine } from "../lab/machine.ts";
import { ROOT } from "../setup/root.ts";
import { inOrder, type Message, Runtimes, until } from "./runtimes.ts";

const before = await machine();
const SERVICE = "10.96.0.20";

/** The releases of containerd, and the conf's cniVersion. */
const RUNS = [
  { name: "containerd 1.6", releases: ["bookworm"], cniVersion: "0.3.1" },
  {
    name: "containerd 2.1",
    releases: ["forky", "bookworm"],
    cniVersion: "1.1.0",
  },
];

interface Pod {
  node: Runtimes;
  id: string;
  config: Message;
  container: string;
  address: string;
}

async function networkReady(node: Runtimes): Promise<Message> {
  const { status } = await node.cri("Status");
  const isIt = ({ type }: Message) => type === "NetworkReady";
  return status.conditions.find(isIt);
}

/** Requests a page from inside a container, by its own wget. */
function request(from: Pod, address: string): Promise<string> {
  const line = ["timeout", "2", "wget", "-qO-", `http://${address}/`];
  return from.node.exec(from.container, ...line);
}

for (const { name, releases, cniVersion } of RUNS) {
  Deno.test({
    name: `${name} runs the tutorial's pods, with CNI ${cniVersion}`,
    // The client leaves some resources open, which end with the nodes.
    sanitizeOps: false,
    sanitizeResources: false,
    fn: async (t) => {
      const step = inOrder(t);
      await using cluster = await Cluster.start();
      for (
        const [node, n] of [[cluster.node1, 1], [cluster.node2, 0]] as const
      ) {
        await node.configure({
          ...{ ...CONF, cniVersion, podcidr: `10.240.${n}.0/24` },
        });
        await node.sh(`mv ${CONF_FILE} /run/conf`);
      }
      await using node1 = await Runtimes.on(cluster.node1, releases);
      await using node2 = await Runtimes.on(cluster.node2, releases);
      const nodes = [node1, node2];
      const pods: Record<string, Pod> = {};

      await step(
        "the node is not ready without a conf",
        async () => {
          for (const node of nodes) {
            await node.startContainerd();
            await node.loadImage("k8s.io");
            const { status, reason } = await networkReady(node);
            assertEquals([status, reason], [false, "NetworkPluginNotReady"]);
            await assertRejects(() => node.runSandbox("early"), Error, "cni");
          }
        },
      );

      await step("the node is ready with the conf", async () => {
        for (const node of nodes) {
          await node.sh(`mv /run/conf ${CONF_FILE}`);
          const isReady = async () => (await networkReady(node)).status;
          await until("the node is ready", isReady);
        }
      });

      if (cniVersion === "1.1.0") {
        await step(
          "STATUS: the node is not ready if no ADD can succeed",
          async () => {
            const address = "10.240.0.77/24 dev enp0s3";
            await node2.sh(`ip addr add ${address}`);
            const isReady = async () => (await networkReady(node2)).status;
            await until("not ready", async () => !await isReady());
            const { message } = await networkReady(node2);
            assert(message.includes("to 10.240.0.0/24 uses enp0s3"), message);
            await node2.sh(`ip addr del ${address}`);
            await until("the node is ready again", isReady);
          },
        );
      }

      await step(
        "the pods of pods.yaml run, and have addresses",
        async () => {
          for (const { name, node: where } of await readPods()) {
            const node = where === "node1" ? node1 : node2;
            const sandbox = await node.runSandbox(name);
            const serve = `mkdir /www && echo ${name} > /www/index.html &&
            exec httpd -f -p 80 -h /www`;
            const command = name.startsWith("nginx")
              ? ["sh", "-c", serve]
              : ["sleep", "infinity"];
            const container = await node.runContainer(sandbox, ...command);
            const address = await node.address(sandbox);
            pods[name] = { ...sandbox, node, container, address };
          }
          const { alpine1, nginx1, nginx2 } = pods;
          assertEquals(
            [alpine1.address, nginx1.address, nginx2.address],
            ["10.240.0.2", "10.240.0.3", "10.240.1.2"],
          );
          const inside = await alpine1.node.exec(
            alpine1.container,
            ...["ip", "-4", "addr", "show", "eth0"],
          );
          assert(inside.includes("inet 10.240.0.2/24"), inside);
        },
      );

      await step(
        "node-setup lets alpine1 reach nginx1 and nginx2",
        async () => {
          const { alpine1, nginx1, nginx2 } = pods;
          for (const { address } of [nginx1, nginx2]) {
            await assertRejects(() => request(alpine1, address), Error, "wget");
          }
          for (const [node, peer] of [[node1, 15], [node2, 14]] as const) {
            await node.sh(`cd '${ROOT}'
            ${Deno.execPath()} run -A node-setup.ts --peer 10.0.2.${peer}`);
          }
          assertEquals(await request(alpine1, nginx1.address), "nginx1\n");
          assertEquals(await request(alpine1, nginx2.address), "nginx2\n");
        },
      );

      await step(
        "a Service leads to its pods, even to the calling one",
        async () => {
          const { alpine1, nginx1, nginx2 } = pods;
          await assertRejects(() => request(alpine1, SERVICE), Error, "wget");
          // What kube-proxy writes, in short.
          const nat = "iptables -w -t nat";
          const own = "10.240.0.0/24";
          await node2.sh(
            `${nat} -A POSTROUTING -s ${own} -d ${own} -j MASQUERADE`,
          );
          const to = `-d ${SERVICE}/32 -p tcp --dport 80 -j DNAT`;
          for (
            const [name, { address }] of Object.entries({ nginx2, nginx1 })
          ) {
            await node2.sh(`${nat} -F PREROUTING
              ${nat} -A PREROUTING ${to} --to-destination ${address}:80`);
            assertEquals(await request(alpine1, SERVICE), `${name}\n`);
          }
          assertEquals(await request(nginx1, SERVICE), "nginx1\n");
        },
      );

      await step(
        "pods keep their network if containerd is killed and restarted",
        async () => {
          const { alpine1, nginx1, nginx2 } = pods;
          await node2.killContainerd();
          assert((await node2.run("timeout 5 ctr version")).code !== 0);
          const seen = await node2.sh(`ip netns exec ${alpine1.id} \
          timeout 2 busybox wget -qO- http://${nginx2.address}/`);
          assertEquals(seen, "nginx2");
          await node2.startContainerd();
          assertEquals(await node2.address(alpine1), alpine1.address);
          assertEquals(await request(alpine1, nginx1.address), "nginx1\n");
        },
      );

      await step(
        "20 sandboxes at once have different addresses, and reach the gateway",
        async () => {
          const names = Array.from({ length: 20 }, (_, n) => `many${n}`);
          const sandboxes = await Promise.all(
            names.map((name) => node2.runSandbox(name)),
          );
          const addresses = await Promise.all(
            sandboxes.map((sandbox) => node2.address(sandbox)),
          );
          assertEquals(new Set(addresses).size, 20);
          for (const { id } of sandboxes) {
            await node2.sh(`ip netns exec ${id} ping -qc1 -W2 10.240.0.1`);
          }
          await Promise.all(
            sandboxes.map((sandbox) => node2.removeSandbox(sandbox)),
          );
          // The three pods are left, and nothing of the twenty.
          const links = await node2.sh(
            "ip -br link show type veth | grep veth",
          );
          const own = links.split("\n").filter((link) => /^veth\d/.test(link));
          assertEquals(own.length, 2);
        },
      );

      await step(
        "nothing is left of pods that are stopped and removed",
        async () => {
          for (const node of nodes) {
            // As a kubelet does, including those that failed without a conf.
            for (const { id } of (await node.cri("ListPodSandbox")).items) {
              await node.removeSandbox({ id });
            }
            const { items } = await node.cri("ListPodSandbox");
            assertEquals(items, []);
            assertEquals(await node.leftovers(), []);
          }
        },
      );
    },
  });
}

Deno.test("The machine is as it was", async () => {
  assertEquals(await machine(), before);
});
