/**
 * Other programs that call CNI plugins, each in its own way: cnitool (libcni
 * itself, also with plugins after ours), containerd's `ctr`, and podman.
 *
 *     deno test -A tests/runtimes/tools.ts
 *
 * @module
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { CONF, Node } from "../lab/node.ts";
import { machine } from "../lab/machine.ts";
import { DEBS } from "../setup/debian.ts";
import { IMAGE, inOrder, Runtimes, until } from "./runtimes.ts";

const before = await machine();
const PLUGINS = "/opt/cni/bin:/usr/lib/cni";

/** Defines a test on one node with the packages of these releases. */
function onNode(
  name: string,
  releases: string[],
  test: (
    host: Runtimes,
    step: ReturnType<typeof inOrder>,
    node: Node,
  ) => Promise<void>,
): void {
  Deno.test(name, async (t) => {
    await using node = await Node.start("node1");
    await using host = await Runtimes.on(node, releases);
    await test(host, inOrder(t), node);
  });
}

/** Calls cnitool for eth0 in a namespace. */
function cnitool(
  host: Runtimes,
  verb: string,
  network: string,
  netns: string,
  env = {},
) {
  const line = `${DEBS}/libcni/cnitool ${verb} ${network} /run/netns/${netns}`;
  return host.run(line, { CNI_PATH: PLUGINS, ...env });
}

/** The same; it must succeed. */
async function mustCnitool(...call: Parameters<typeof cnitool>) {
  const { code, stdout, stderr } = await cnitool(...call);
  assertEquals(code, 0, stdout + stderr);
  return stdout ? JSON.parse(stdout) : undefined;
}

for (const cniVersion of ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]) {
  onNode(
    `cnitool, with CNI ${cniVersion}`,
    ["bookworm"],
    async (host, step, node) => {
      await node.configure({ ...CONF, cniVersion });
      await host.sh("ip netns add a; ip netns add b");

      if (cniVersion === "1.1.0") {
        await step("STATUS says whether an ADD would succeed", async () => {
          await mustCnitool(host, "status", CONF.name, "a");
          await host.sh("ip addr add 10.240.0.77/24 dev lo");
          const { code, stderr } = await cnitool(
            host,
            "status",
            CONF.name,
            "a",
          );
          assert(code !== 0);
          assertMatch(stderr, /its route to 10\.240\.0\.0\/24 uses lo/);
          await host.sh("ip addr del 10.240.0.77/24 dev lo");
        });
      }

      await step("ADD: two containers reach each other", async () => {
        const a = await mustCnitool(host, "add", CONF.name, "a");
        const b = await mustCnitool(host, "add", CONF.name, "b");
        assertEquals(a.cniVersion, cniVersion);
        assertEquals(a.ips[0].address, "10.240.0.2/24");
        assertEquals(b.ips[0].address, "10.240.0.3/24");
        await host.sh("ip netns exec a ping -qc1 -W2 10.240.0.3");
      });

      await step("CHECK fails if something is missing", async () => {
        const check = () => cnitool(host, "check", CONF.name, "a");
        const { code, stderr } = await check();
        if (cniVersion === "0.3.1") {
          assertMatch(stderr, /does not support .*CHECK/);
          return;
        }
        assertEquals(code, 0, stderr);
        await host.sh("ip -n a route del default");
        const after = await check();
        assert(after.code !== 0);
        assertMatch(after.stderr, /no default route via 10\.240\.0\.1/);
      });

      if (cniVersion === "1.1.0") {
        await step("GC removes what the runtime no longer knows", async () => {
          // libcni sends a DEL for each of its results that is not in the
          // list. Without results, the plugin has to do it.
          const gc = (list: string) =>
            host.sh(
              `CNI_PATH=${PLUGINS} ${DEBS}/libcni/gc ${CONF.name} '${list}'`,
            );
          const veths = () => host.sh("ls /sys/class/net | grep veth || :");
          const results = await host.sh("cat /var/lib/cni/results/*");
          const b = /"containerId":"([^"]+)"[^}]*netns\/b"/.exec(results)![1];
          await host.sh("rm /var/lib/cni/results/*");
          assertEquals(await veths(), "veth2\nveth3");
          await gc(`[{"containerID": "${b}", "ifname": "eth0"}]`);
          assertEquals(await veths(), "veth3");
          await host.sh("ip netns exec b ping -qc1 -W2 10.240.0.1");
          await gc("[]");
          assertEquals(await veths(), "");
        });
      }

      await step("DEL leaves nothing, and may be repeated", async () => {
        for (const netns of ["a", "b", "a"]) {
          await mustCnitool(host, "del", CONF.name, netns);
        }
        await host.sh("ip netns del a; ip netns del b");
        assertEquals(await host.leftovers(), []);
      });
    },
  );
}

onNode(
  "A chain with bandwidth, tuning, firewall, portmap",
  ["bookworm"],
  async (
    host,
    step,
  ) => {
    const chain = {
      cniVersion: "1.0.0",
      name: "chain",
      plugins: [
        { type: CONF.type, podcidr: CONF.podcidr },
        { type: "bandwidth", capabilities: { bandwidth: true } },
        {
          type: "tuning",
          mtu: 1400,
          sysctl: { "net.ipv4.ip_default_ttl": "9" },
        },
        { type: "firewall", backend: "iptables" },
        { type: "portmap", capabilities: { portMappings: true }, snat: true },
      ],
    };
    const bits = 8_000_000;
    const env = {
      NETCONFPATH: "/etc/cni/chain",
      CAP_ARGS: JSON.stringify({
        portMappings: [{ hostPort: 8080, containerPort: 80, protocol: "tcp" }],
        bandwidth: {
          ...{ ingressRate: bits, ingressBurst: bits },
          ...{ egressRate: bits, egressBurst: bits },
        },
      }),
    };
    await host.sh(`mkdir /etc/cni/chain
    cat > /etc/cni/chain/chain.conflist << 'END'\n${JSON.stringify(chain)}\nEND
    ip netns add pod
    ip netns add outside
    ip link add outside0 type veth peer name eth0 netns outside
    ip addr add 10.0.2.15/24 dev outside0
    ip link set outside0 up
    ip -n outside addr add 10.0.2.2/24 dev eth0
    ip -n outside link set eth0 up
    ip -n outside route add default via 10.0.2.15
    sysctl -qw net.ipv4.ip_forward=1`);
    const get = "timeout 30 busybox wget -qO-";

    await step("ADD", async () => {
      const { ips, interfaces } = await mustCnitool(
        ...[host, "add", "chain", "pod", env] as const,
      );
      assertEquals(ips[0].address, "10.240.0.2/24");
      assertEquals(interfaces[0].name, "eth0");
      await host.sh(`mkdir -p /run/www && echo pod > /run/www/index.html
      setsid ip netns exec pod busybox httpd -p 80 -h /run/www`);
    });

    await step("portmap: a port of the node leads to the pod", async () => {
      const outside = `ip netns exec outside ${get} http://10.0.2.15`;
      assertEquals(await host.sh(`${outside}:8080/`), "pod");
      assert((await host.run(`${outside}:8081/`)).code !== 0);
    });

    await step("bandwidth: excess packets wait, both ways", async () => {
      await host.sh(`head -c 3000000 /dev/zero > /run/www/zero
      setsid ip netns exec outside busybox httpd -p 80 -h /run/www
      ip netns exec pod ${get} http://10.0.2.2/zero > /dev/null
      ip netns exec outside ${get} http://10.240.0.2/zero > /dev/null`);
      for (const dev of ["veth2", "bwp"]) {
        const all = await host.sh("tc -s qdisc show");
        const mine = all.split(/^(?=qdisc)/m)
          .find((qdisc) => qdisc.match(`tbf .* dev ${dev}`)) ?? "";
        assertMatch(mine, /rate 8Mbit/);
        assertMatch(mine, /overlimits [1-9]/);
      }
    });

    await step("tuning: the pod has its own MTU and sysctl", async () => {
      assertMatch(await host.sh("ip -n pod link show eth0"), /mtu 1400/);
      const ttl = "cat /proc/sys/net/ipv4/ip_default_ttl";
      assertEquals(await host.sh(`ip netns exec pod ${ttl}`), "9");
      assertEquals(await host.sh(ttl), "64");
    });

    await step("firewall: the pod gets out even if FORWARD drops", async () => {
      const ping = "ip netns exec pod ping -qc1 -W2 10.0.2.2";
      await host.sh(`iptables -P FORWARD DROP; ${ping}`);
      // portmap 1.1.1 complains about missing IPv6 rules even if the pod has no
      // IPv6. It comes last, so no other plugin complains before the flush.
      const check = () => cnitool(host, "check", "chain", "pod", env);
      assertMatch((await check()).stderr, /^could not check ipv6 dnat/);
      await host.sh("iptables-save > /run/rules; iptables -F CNI-FORWARD");
      assert((await host.run(ping)).code !== 0);
      const { code, stderr } = await check();
      assert(code !== 0 && !stderr.includes("ipv6 dnat"), stderr);
      await host.sh("iptables-restore < /run/rules");
    });

    await step(
      "DEL of the chain leaves no rule, qdisc or link",
      async () => {
        const before = (await host.leftovers()).join("\n");
        const traces = [
          /CNI-DN-/,
          /CNI-FORWARD -s 10\.240/,
          /^veth2@/m,
          /tbf/,
          /^bwp/m,
        ];
        for (const trace of traces) assertMatch(before, trace);
        await mustCnitool(host, "del", "chain", "pod", env);
        await mustCnitool(host, "del", "chain", "pod", env);
        await host.sh("ip netns del pod; ip netns del outside");
        assertEquals(await host.leftovers(), []);
      },
    );
  },
);

for (const releases of [["bookworm"], ["forky", "bookworm"]]) {
  const name = releases[0] === "bookworm" ? "containerd 1.6" : "containerd 2.1";
  onNode(`ctr run --cni, of ${name}`, releases, async (host, step) => {
    const ctr = `timeout 30 ctr run --cni --rm ${IMAGE}`;

    await step("two containers reach each other", async () => {
      await host.startContainerd();
      await host.loadImage("default");
      await host.sh(`setsid ${ctr} web sh -c '
        mkdir /www; echo web > /www/index.html; exec httpd -f -p 80 -h /www' \
        > /run/web.log 2>&1 &`);
      const has = "grep -o 'ADD default-web eth0 10.240.0.2/' /var/log/cni.log";
      await until(
        "web has its address",
        async () => (await host.run(has)).code === 0,
      );
      const get = `${ctr} asks timeout 2 wget -qO- http://10.240.0.2/`;
      let said = "";
      await until("web answers", async () => {
        said = (await host.run(get)).stdout;
        return said !== "";
      });
      assertEquals(said, "web\n");
    });

    await step("DEL without CNI_NETNS leaves nothing", async () => {
      await host.sh("ctr task kill -s KILL web");
      const isGone = async () => (await host.sh("ctr c ls -q")) === "";
      await until("the container is gone", isGone);
      await until(
        "nothing is left",
        async () => (await host.leftovers()).length === 0,
      );
    });
  });
}

onNode("podman, with CNI as its network backend", ["bookworm"], async (
  host,
  step,
) => {
  const podman = "timeout 60 podman";
  const run = `${podman} run --ulimit host --network ${CONF.name}`;

  await step("podman lists the network of a .conflist", async () => {
    const list = {
      ...{ cniVersion: CONF.cniVersion, name: CONF.name },
      plugins: [{ type: CONF.type, podcidr: CONF.podcidr }],
    };
    await host.sh(`rm /etc/cni/net.d/*
      cat > /etc/cni/net.d/10-custom-cni.conflist << 'END'
${JSON.stringify(list)}
END
      cat > /etc/containers/containers.conf << 'END'
[network]
network_backend = "cni"
cni_plugin_dirs = ["/opt/cni/bin", "/usr/lib/cni"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
END`);
    await host.sh(`${podman} load -qi ${DEBS}/box.tar`);
    assertMatch(await host.sh(`${podman} network ls`), /custom-cni/);
  });

  await step("two containers reach each other", async () => {
    await host.sh(`${run} -d --name web ${IMAGE} sh -c '
      mkdir /www; echo web > /www/index.html; exec httpd -f -p 80 -h /www'`);
    const format = "'{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}'";
    const address = await host.sh(`${podman} inspect -f ${format} web`);
    assertEquals(address, "10.240.0.2");
    const get = `timeout 2 wget -qO- http://${address}/`;
    assertEquals(await host.sh(`${run} --rm ${IMAGE} ${get}`), "web");
  });

  await step("nothing is left of a removed container", async () => {
    await host.sh(`${podman} rm -f -t 0 web`);
    assertEquals(await host.leftovers(), []);
  });
});

Deno.test("The machine is as it was", async () => {
  assertEquals(await machine(), before);
});
