/**
 * What a cluster does to its plugin: programs are killed, a node reboots, is
 * full or has a broken conf, pods come and go. After each fault every pod
 * reaches every other one, no two pods share an address, and nothing is left
 * of pods that ended.
 *
 *     deno test -A tests/kubernetes/faults.ts
 *
 * @module
 */
import { assertEquals, assertStringIncludes } from "@std/assert";
import { machine } from "../lab/machine.ts";
import { CONF_FILE } from "../lab/node.ts";
import { inOrder, type Message, until } from "../runtimes/runtimes.ts";
import { ROOT } from "../setup/root.ts";
import { INSTALL, Kubernetes, type KubernetesNode, SETUP } from "./cluster.ts";

const before = await machine();
const README = await Deno.readTextFile(`${ROOT}README.md`);
const BIN = "/opt/cni/bin";
const FAILED = 'plugin type="custom-cni" name="custom-cni" failed (add):';

/** Web servers on one node. They end without delay. */
const deployment = (node: string, name = node) => ({
  apiVersion: "apps/v1",
  kind: "Deployment",
  metadata: { name },
  spec: {
    replicas: 0,
    selector: { matchLabels: { app: name } },
    template: {
      metadata: { labels: { app: name } },
      spec: {
        nodeSelector: { "kubernetes.io/hostname": node },
        terminationGracePeriodSeconds: 0,
        containers: [{ name: "nginx", image: "nginx" }],
      },
    },
  },
});

/** A pod whose only container fails again and again. */
const CRASHING = {
  apiVersion: "v1",
  kind: "Pod",
  metadata: { name: "crashing" },
  spec: {
    nodeSelector: { "kubernetes.io/hostname": "node2" },
    terminationGracePeriodSeconds: 0,
    containers: [{ name: "alpine", image: "alpine", command: ["false"] }],
  },
};

/** The cluster, with what the tests ask of it. */
class World {
  constructor(readonly kubernetes: Kubernetes, readonly cniVersion: string) {}

  /** Runs kubectl; it must succeed. */
  kubectl(line: string): Promise<string> {
    return this.kubernetes.node1.sh(`kubectl ${line}`);
  }

  apply(...objects: unknown[]): Promise<string> {
    const items = { apiVersion: "v1", kind: "List", items: objects };
    return this.kubectl(`apply -f - << 'END'\n${JSON.stringify(items)}\nEND`);
  }

  scale(name: string, replicas: number): Promise<string> {
    return this.kubectl(`scale deployment ${name} --replicas=${replicas}`);
  }

  /** Installs the plugin and its conf, with some keys changed. */
  configure(node: KubernetesNode, keys: Record<string, unknown> = {}) {
    return node.install({ cniVersion: this.cniVersion, ...keys });
  }

  /** Changes some keys of node2's conf during an action. */
  async withConf(keys: Record<string, unknown>, action: () => Promise<void>) {
    await this.configure(this.kubernetes.node2, keys);
    await action();
    await this.configure(this.kubernetes.node2);
  }

  async pods(): Promise<Message[]> {
    return JSON.parse(await this.kubectl("get pods -o json")).items;
  }

  /** Waits until an event says why a pod does not start. */
  async complains(words: string): Promise<void> {
    const find = "get events --field-selector=reason=FailedCreatePodSandBox";
    await this.kubernetes.until(find, (events) => events.includes(words));
  }

  /** Waits until exactly so many pods exist and are ready. */
  async ready(count: number): Promise<Message[]> {
    let pods: Message[] = [];
    const isReady = ({ metadata, status }: Message) =>
      !metadata.deletionTimestamp && status.podIP &&
      status.containerStatuses?.every((it: Message) => it.ready);
    await until(`${count} pods are ready`, async () => {
      pods = await this.pods();
      return pods.length === count && pods.every(isReady);
    }, 180);
    return pods;
  }

  /** Asserts that the pods reach each other, and that nothing else is left. */
  async well(count: number): Promise<void> {
    const pods = await this.ready(count);
    const addresses = pods.map(({ status }) => status.podIP);
    assertEquals(new Set(addresses).size, count, `${addresses}`);
    const asking = `for ip in ${addresses.join(" ")}; do
      timeout 5 wget -qO /dev/null http://$ip/ || echo $ip; done`;
    for (const { metadata: { name } } of pods) {
      // A kubelet that has just lost containerd may refuse an exec.
      await until(`${name} may be asked`, async () => {
        const line = `exec ${name} -- sh -c '${asking}'`;
        const { code, stdout } = await this.kubernetes.kubectl(line);
        assertEquals(stdout, "", `${name} does not reach all`);
        return code === 0;
      });
    }
    for (const node of this.kubernetes.nodes) {
      const here = pods.filter(({ spec }) => spec.nodeName === node.name);
      const look = `ip -br link show master cni0 | wc -l
        find /var/run/netns -type l 2> /dev/null | wc -l`;
      const expected = `${here.length}\n${here.length}`;
      const isSo = async () => await node.sh(look) === expected;
      await until(`${node.name} has a veth and a name a pod`, isSo, 120);
    }
  }

  /** Removes what a reboot of node2 loses, and starts what comes up again. */
  async reboot(): Promise<void> {
    const { node2: node } = this.kubernetes;
    await node.sh(`
      for pid in $(cd /proc && ls -d [0-9]*); do # except what keeps the node
        case "$pid $(cat /proc/$pid/comm)" in
          "1 "*|"$$ "*|*" cat") ;;
          *) kill -9 $pid 2> /dev/null || : ;;
        esac
      done
      sleep 0.5
      for name in /run/netns/*; do umount $name 2> /dev/null || :; done
      mount | grep -oE ' /run/containerd/\\S+' | xargs -r umount -l
      rm -rf /run/netns /run/containerd /run/*.pid /tmp/*
      mount | grep -oE ' /var/lib/kubelet/pods/\\S+' | xargs -r umount -l
      ip link del cni0
      ip route flush proto boot scope global root 10.240.0.0/16
      for table in filter nat mangle; do
        iptables -t $table -F; iptables -t $table -X
      done
      sysctl -qw net.ipv4.ip_forward=0
      ! ip -br link show type veth | grep '^veth'`);
    await node.runtimes.startContainerd();
    await node.start("kubelet");
    await node.start("kube-proxy");
    // The command of the README's unit.
    await node.sh("deno run -A node-setup.ts --peer 10.0.2.14");
  }

  /** Waits until so many pods of node2 have restarted a container. */
  async restarted(count: number): Promise<void> {
    const isIt = ({ spec, status }: Message) =>
      spec.nodeName === "node2" &&
      status.containerStatuses?.[0].restartCount > 0;
    await this.kubernetes.until(
      "get pods -o json",
      (pods) => JSON.parse(pods).items.filter(isIt).length === count,
    );
  }
}

/** What happens to the cluster, in order, and the number of pods after it. */
const FAULTS: [what: string, pods: number, run: (w: World) => Promise<void>][] =
  [
    ["pods start", 4, async (world) => {
      const { nodes } = world.kubernetes;
      await world.kubernetes.install({ cniVersion: world.cniVersion });
      await world.apply(deployment("node1"), deployment("node2"));
      for (const { name } of nodes) await world.scale(name, 2);
      // --check finds no problem with the rules of a real kube-proxy.
      for (const node of nodes) await node.sh(`${SETUP} && ${SETUP} --check`);
    }],
    ["a kubelet is killed and restarted", 5, async (world) => {
      const { node2 } = world.kubernetes;
      await node2.kill("kubelet");
      await world.scale("node2", 3);
      await node2.start("kubelet");
    }],
    ["containerd is killed and restarted", 4, async (world) => {
      const { node2 } = world.kubernetes;
      await node2.runtimes.killContainerd();
      await world.scale("node2", 2);
      await node2.runtimes.startContainerd();
    }],
    ["a node reboots", 4, async (world) => {
      await world.reboot();
      await world.restarted(2);
    }],
    ["twenty pods start at once", 22, async (world) => {
      await world.scale("node2", 20);
    }],
    ["a Deployment is scaled 0-10-0 five times", 2, async (world) => {
      for (let i = 0; i < 5; i++) {
        await world.scale("node2", 0);
        await world.ready(2);
        await world.scale("node2", 10);
        await world.ready(12);
      }
      await world.scale("node2", 0);
    }],
    ["a node is full, until pods end", 15, async (world) => {
      const { node2 } = world.kubernetes;
      await world.ready(2);
      await node2.sh("ip link del cni0");
      await world.withConf({ podcidr: "10.240.0.0/28" }, async () => {
        await world.apply(deployment("node2", "more"));
        await world.scale("node2", 10);
        await world.scale("more", 6);
        await world.complains("No free address in 10.240.0.0/28");
        await world.scale("node2", 7);
        await world.ready(15);
      });
    }],
    ["the node gets its pod CIDR back", 4, async (world) => {
      const { node2 } = world.kubernetes;
      await world.kubectl("delete deployment more");
      await world.scale("node2", 0);
      await world.ready(2);
      await node2.sh("ip link del cni0");
      await world.scale("node2", 2);
    }],
    ["a container crashes again and again", 4, async (world) => {
      await world.apply(CRASHING);
      await world.kubernetes.until(
        "get pod crashing",
        (pod) => pod.includes("CrashLoopBackOff"),
      );
      await world.kubectl("delete pod crashing");
    }],
    ["a sandbox ends and is restarted", 4, async (world) => {
      const { runtimes } = world.kubernetes.node2;
      const { items } = await runtimes.cri("ListPodSandbox", {
        filter: { label_selector: { app: "node2" }, state: { state: 0 } },
      });
      await runtimes.cri("StopPodSandbox", { pod_sandbox_id: items[0].id });
      await world.restarted(1);
    }],
    ["the plugin is replaced while pods start", 12, async (world) => {
      const { node2 } = world.kubernetes;
      await world.scale("node2", 10);
      for (let i = 0; i < 10; i++) await world.configure(node2);
    }],
    ["a conf is broken for a while", 12, async (world) => {
      const { node2 } = world.kubernetes;
      await world.withConf({ podcidr: "10.240.0.0/33" }, async () => {
        await world.kubectl("delete pod -l app=node2 --wait=false");
        await world.complains(`${FAILED} podcidr "10.240.0.0/33"`);
      });
      await world.ready(12);
      await node2.sh(`echo '{' > ${CONF_FILE}`);
      await world.kubectl("delete pod -l app=node2 --wait=false");
      await world.configure(node2);
    }],
    ["the messages are those in the README", 4, async (world) => {
      const { node2 } = world.kubernetes;
      await world.scale("node2", 1);
      await world.ready(3);
      const quoted = async (words: string, more = "") => {
        assertStringIncludes(README, words);
        await world.complains(words + more);
      };
      assertStringIncludes(README, INSTALL);
      await node2.sh(`mv ${BIN}/custom-cni /run/`);
      await world.scale("node2", 2);
      await quoted('failed to find plugin "custom-cni" in path [', BIN);
      await node2.sh(`mv /run/custom-cni ${BIN}`);
      await world.ready(4);
      await world.scale("node2", 1);
      await world.ready(3);
      await world.withConf({ cniVersion: "9.9.9" }, async () => {
        await world.scale("node2", 2);
        await quoted(FAILED, ' cniVersion "9.9.9" is unknown');
      });
    }],
    ["all pods end", 0, async (world) => {
      await world.kubectl("delete deployment --all");
    }],
  ];

for (const cniVersion of ["0.3.1", "1.0.0"]) {
  Deno.test({
    name: `pods survive a real Kubernetes, with CNI ${cniVersion}`,
    // The client leaves some resources open, which end with the nodes.
    sanitizeOps: false,
    sanitizeResources: false,
    fn: async (t) => {
      const step = inOrder(t);
      await using kubernetes = await Kubernetes.start();
      const world = new World(kubernetes, cniVersion);
      for (const [what, count, run] of FAULTS) {
        await step(what, async () => {
          await run(world);
          await world.well(count);
        });
      }
      for (const { runtimes } of kubernetes.nodes) {
        assertEquals(await runtimes.leftovers(), []);
      }
    },
  });
}

Deno.test("the machine is as it was", async () => {
  assertEquals(await machine(), before);
});
