/** What a newcomer's machine, folder and rights may be like. */
import { assertEquals, assertMatch } from "@std/assert";
import { dirname } from "@std/path/posix/dirname";
import { ROOT } from "../setup/root.ts";
import { TOOLS } from "../setup/tools.ts";
import { type Output, run } from "./node.ts";

/** Where a student on Windows may have it, in WSL. */
const CHECKOUT = "/mnt/c/Meine Übung 1";
const RIGHTS = "$deno tests/setup/rights.ts";
const TUTORIAL = "tests/lab/tutorial.ts --quiet";
const USER = "setpriv --reuid=65534 --regid=65534 --clear-groups";

/** A shell line on a laptop, which has the checkout there, and a home. */
function onLaptop(line: string): Promise<Output> {
  const script = `set -e
    # Either may lie below /mnt, which is covered next.
    exec 3< '${ROOT}' 4< '${dirname(Deno.execPath())}'
    mount -t tmpfs -o mode=755 tmpfs /mnt
    mkdir -p '${CHECKOUT}' /mnt/deno /mnt/bin
    mount --no-canonicalize --bind /proc/self/fd/3 '${CHECKOUT}'
    mount --no-canonicalize --bind /proc/self/fd/4 /mnt/deno
    exec 3<&- 4<&-
    mkdir -m 777 /mnt/home
    export HOME=/mnt/home
    deno="/mnt/deno/deno run -A"
    cd '${CHECKOUT}'
    ${line}`;
  return run(["unshare", "--mount", "--net", "sh", "-c", script]);
}

/** The one line by which a task is refused on such a laptop. */
async function refusal(line: string): Promise<string> {
  const { code, stderr } = await onLaptop(line);
  assertEquals(code, 1, stderr);
  assertEquals(stderr.trim().split("\n").length, 1, stderr);
  return stderr;
}

/** Containers mount files over those in /etc. No user may overlay these. */
const IS_CONTAINER = / \/etc\//.test(Deno.readTextFileSync("/proc/mounts"));

Deno.test("a plain user walks through the tutorial, below /mnt, in a folder with a blank", async () => {
  if (IS_CONTAINER) {
    const said = await refusal(`${USER} ${RIGHTS} lab`);
    return assertMatch(
      said,
      /^This kernel lets no plain user .* Run it as root/,
    );
  }
  const { code, stdout, stderr } = await onLaptop(
    `${USER} $deno tests/setup/enter.ts run -A ${TUTORIAL}`,
  );
  assertEquals(code, 0, stdout + stderr);
  assertEquals(stdout.match(/^ok {3}Step \d/gm)?.length, 6, stdout);
});

Deno.test("the lab starts no programs but its tools and those of each Debian", async () => {
  const tools = Object.keys(TOOLS).filter((tool) => !tool.startsWith("/"));
  const { code, stdout, stderr } = await onLaptop(`
    essential=$(dpkg-query -Wf '\${Essential} \${Package}\\n' |
      sed -n 's/^yes //p')
    # Not below /mnt, which each node of the lab has for itself.
    mount -t tmpfs tmpfs /media
    ln -sf $(dpkg -L $essential mount | grep -E '/s?bin/') /media
    for tool in ${tools.join(" ")} iptables-restore; do
      ln -sf $(command -v $tool) /media
    done
    PATH=/media
    $deno ${TUTORIAL}`);
  assertEquals(code, 0, stdout + stderr);
});

Deno.test("programs speak English, whatever the user's language", async () => {
  const { stdout } = await run(["sh", "-c", "echo $LC_ALL"]);
  assertEquals(stdout, "C.UTF-8\n");
});

Deno.test("rights.ts says nothing if root does a task", async () => {
  const { code, stdout, stderr } = await onLaptop(`${RIGHTS} test`);
  assertEquals({ code, stdout, stderr }, { code: 0, stdout: "", stderr: "" });
});

Deno.test("rights.ts says that a task needs root", async () => {
  const said = await refusal(`${USER} ${RIGHTS} test`);
  assertMatch(said, /^"deno task test" needs root/);
});

Deno.test("rights.ts names the rights that a container lacks", async () => {
  const said = await refusal(
    `setpriv --bounding-set=-net_admin,-sys_admin ${RIGHTS} lab`,
  );
  assertMatch(
    said,
    /^Root lacks CAP_NET_ADMIN, CAP_SYS_ADMIN here.*--privileged/,
  );
});

Deno.test("rights.ts says that the kernel gives users no namespaces", async () => {
  const said = await refusal(`
    printf '#!/bin/sh\\necho not permitted >&2; exit 1' > /mnt/bin/unshare
    chmod +x /mnt/bin/unshare
    PATH=/mnt/bin:$PATH
    ${USER} ${RIGHTS} lab`);
  assertMatch(said, /^This kernel lets no plain user .*\(not permitted\)/);
});

Deno.test("rights.ts says that the kernel's module is not loaded", async () => {
  const said = await refusal(`
    mount -t tmpfs tmpfs /proc/sys/net
    ${RIGHTS} lab > /dev/null`);
  assertMatch(said, /sudo modprobe br_netfilter$/m);
});

Deno.test("rights.ts names a folder that can't be written", async () => {
  const said = await refusal(`
    mount -o remount,bind,ro .
    ${RIGHTS} lab`);
  assertMatch(said, /^You can't write to \/mnt\/c\/Meine Übung 1/);
});

Deno.test("rights.ts says that a first run has too little space", async () => {
  const said = await refusal(`
    mkdir /mnt/small
    mount -t tmpfs -o size=20m tmpfs /mnt/small
    mkdir /mnt/small/tests
    cp -r tests/setup /mnt/small/tests
    cd /mnt/small
    ${RIGHTS} lab`);
  assertMatch(said, /^The first run takes \d+ MB, and there are \d\d MB free/);
});
