/**
 * Runs Deno in a mount namespace of its own, in which the missing tools lie
 * over /usr. Who is not root becomes root in a user namespace first, and may
 * then make networks and mounts in there, and nowhere else.
 *
 *     deno run -A tests/setup/enter.ts run -A tests/lab/tutorial.ts
 *
 * @module
 */
import { PATH, TOOLS_FOLDER, unpackTools } from "./tools.ts";

/** In a container /proc/sys may be read-only; a fresh /proc is not. */
const ENTER = `set -e
if [ -d "$1/usr" ]; then
  cd "$1"
  mount -t overlay -o lowerdir=usr:/usr overlay /usr
  cd "$OLDPWD"
fi
! grep -q ' /proc/sys proc ro' /proc/mounts || mount -t proc proc /proc
shift
exec "$@"`;

await unpackTools();
const isRoot = Deno.uid() === 0;
const user = isRoot ? [] : ["--user", "--map-root-user"];
const deno = [Deno.execPath(), ...Deno.args];
const child = new Deno.Command("unshare", {
  args: [...user, "--mount", "sh", "-c", ENTER, "sh", TOOLS_FOLDER, ...deno],
  // The lab has to know it, to tell how its nodes are entered from outside.
  env: isRoot ? { PATH } : { PATH, LAB_OF_USER: "yes" },
}).spawn();
// A Ctrl-C reaches the child as well, which then ends what it has begun.
Deno.addSignalListener("SIGINT", () => {});
for (const signal of ["SIGTERM", "SIGHUP"] as const) {
  Deno.addSignalListener(signal, () => child.kill(signal));
}
const { code } = await child.status;
Deno.exit(code);
