/**
 * The machine that the nodes are on: it must be afterwards as it was before.
 *
 * @module
 */
import { run } from "./node.ts";

/**
 * What a node, a runtime or a kubelet could leave, as text to compare. Left out
 * is what the kernel and the machine's own daemons change meanwhile.
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
