/** Each room of tests/ says what it is for, and imports run one way only. */
import { assert, assertEquals } from "@std/assert";
import { ROOT } from "./root.ts";

/** What a room may import, beside itself and what ships. */
const ROOMS: Record<string, string[]> = {
  setup: [],
  lab: ["setup"],
  plugin: ["setup", "lab"],
  "node-setup": ["setup", "lab"],
  runtimes: ["setup", "lab"],
  kubernetes: ["setup", "lab", "runtimes"],
  bench: ["setup", "lab"],
  debian: ["setup"],
};

Deno.test("imports between the rooms run one way only", () => {
  const rooms = Array.from(Deno.readDirSync(`${ROOT}tests`), (it) => it.name);
  assertEquals(rooms.sort(), Object.keys(ROOMS).sort());
  for (const room of rooms) {
    const folder = `${ROOT}tests/${room}/`;
    const files = Array.from(Deno.readDirSync(folder), (it) => it.name);
    assertEquals(files.sort()[0], "README.md", room);
    for (const file of files.filter((name) => name.endsWith(".ts"))) {
      const text = Deno.readTextFileSync(folder + file);
      for (const [, path] of text.matchAll(/(?:from|import\() ?"(\.[^"]+)"/g)) {
        const [, other] = /^\.\.\/([^./]+)\//.exec(path) ?? [];
        const isOurs = !other || ROOMS[room].includes(other);
        assert(isOurs, `tests/${room}/${file} imports ${path}`);
      }
    }
  }
});
