/**
 * The machine below the nodes. The lab must leave it unchanged.
 *
 * @module
 */
import { run } from "./node.ts";

/**
 * Lists what a node, a runtime or a kubelet could leave behind, as text to
 * compare, without what the kernel and the machine's daemons change meanwhile.
 */
export async function machine(): Promise<string> {
  const { stdout } = await run([
    "sh",
    "-c",
    `
    ip -br link; ip -br addr | grep -v '^veth'; ip route show table all; ip netns
    iptables-save | grep -v '^[#:]'; tc qdisc show
    hostname; sysctl -e net.ipv4.ip_forward net.bridge.bridge-nf-call-iptables \
      vm.overcommit_memory vm.panic_on_oom kernel.panic kernel.panic_on_oops \
      kernel.keys.root_maxkeys kernel.keys.root_maxbytes
    find /etc /opt -xdev -printf '%p %M %s %t\\n' | sort
    ls -d /run/* /run/netns/* /var/lib/* /var/log/* /tmp/last_* 2> /dev/null |
      grep -E 'cni|contain|libpod|crun|runc|netns|kube|etcd|background|last_'
    find /sys/fs/cgroup -type d -name 'custom-cni-*'
    cut -d' ' -f2,3 /proc/mounts`,
  ]);
  return stdout;
}
