/**
 * The README's two commands begin in the same way. Every npm has to understand
 * that as it is meant: an old one took the word `task` for a package, fetched a
 * stranger's program of that name, and ran it.
 *
 *     deno test -A tests/setup/npx.ts
 *
 * @module
 */
import { assertEquals, assertStringIncludes } from "@std/assert";
import { ROOT } from "./root.ts";

/** The npm of Debian 11 is a 7, that of Ubuntu 20.04 a 6. */
const VERSIONS = ["6", "7", "8", "latest"];

for (const version of VERSIONS) {
  Deno.test(`npx of npm ${version} runs the README's command`, async () => {
    const folder = await Deno.makeTempDir();
    const readme = await Deno.readTextFile(`${ROOT}README.md`);
    const command = readme.match(/^npx .* task (?=lab$)/m)![0];
    await Deno.writeTextFile(
      `${folder}/deno.json`,
      '{ "tasks": { "say": "echo it says" } }',
    );
    // As root npm 6 runs a package's scripts as nobody, who has to get there.
    await Deno.chmod(folder, 0o755);
    const env: Record<string, string> = { NO_COLOR: "1" };
    if (version === "6") env.npm_config_cache = `${folder}/cache`;
    const { success, stdout, stderr } = await new Deno.Command("sh", {
      args: [
        "-c",
        `npm install --silent --no-save --prefix npm npm@${version} &&
        PATH="$PWD/npm/node_modules/.bin:$PATH" && npx --version &&
        ${command}say --step 1`,
      ],
      cwd: folder,
      env,
      signal: AbortSignal.timeout(300_000),
    }).output();
    await Deno.remove(folder, { recursive: true });
    const decoder = new TextDecoder();
    assertEquals(success, true, decoder.decode(stderr));
    assertStringIncludes(decoder.decode(stdout), "it says --step 1");
  });
}
