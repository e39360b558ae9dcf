/**
 * Runs Deno in its own mount namespace, where the missing tools lie over /usr. A
 * plain user first becomes root in a user namespace, and may make networks and
 * mounts in there, and nowhere else.
 *
 *     deno run -A tests/setup/enter.ts run -A tests/lab/tutorial.ts
 *
 * @see {@link https://man7.org/linux/man-pages/man7/user_namespaces.7.html}
 * @module
 */
import { PATH, unpackTools } from "./tools.ts";

/** In a container /proc/sys may be read-only. A fresh /proc is not. */
const ENTER = `set -e
tools=$1
shift
if [ -n "$tools" ]; then
  cd "$tools" # since a colon in the path would end it
  mount -t overlay -o lowerdir=usr:/usr overlay /usr
  cd "$OLDPWD"
fi
! grep -q ' /proc/sys proc ro' /proc/mounts || mount -t proc proc /proc
exec "$@"`;

async function enter(command: string[]): Promise<number> {
  const tools = await unpackTools();
  const isRoot = Deno.uid() === 0;
  const user = isRoot ? [] : ["--user", "--map-root-user"];
  const child = new Deno.Command("unshare", {
    args: [...user, "--mount", "sh", "-c", ENTER, "sh", tools, ...command],
    // The lab prints how to enter its nodes from outside, and has to know this.
    env: isRoot ? { PATH } : { PATH, LAB_OF_USER: "yes" },
  }).spawn();
  // The terminal sends Ctrl-C to the child, too, which cleans up and ends.
  Deno.addSignalListener("SIGINT", () => {});
  for (const signal of ["SIGTERM", "SIGHUP"] as const) {
    Deno.addSignalListener(signal, () => child.kill(signal));
  }
  const { code } = await child.status;
  return code;
}

try {
  Deno.exit(await enter([Deno.execPath(), ...Deno.args]));
} catch (error) {
  console.error(`${error}`);
  Deno.exit(1);
}
