/** What a build is made of. */
import { assertEquals, assertLess } from "@std/assert";
import { unzipped } from "./npm.ts";
import { ROOT } from "./root.ts";

// Each holds a file "denort" with the word twenty times; made by Python.
const DEFLATED = "UEsDBBQAAAAIAAAAIQAode0BDAAAAIwAAAAGAAAAZGVub3J0S0nNyy8q\
UUgZDBQAUEsBAhQDFAAAAAgAAAAhACh17QEMAAAAjAAAAAYAAAAAAAAAAAAAAIABAAAAAGRlbm9y\
dFBLBQYAAAAAAQABADQAAAAwAAAAAAA=";
const STORED = "UEsDBBQAAAAAAAAAIQAode0BjAAAAIwAAAAGAAAAZGVub3J0ZGVub3J0IGR\
lbm9ydCBkZW5vcnQgZGVub3J0IGRlbm9ydCBkZW5vcnQgZGVub3J0IGRlbm9ydCBkZW5vcnQgZGVu\
b3J0IGRlbm9ydCBkZW5vcnQgZGVub3J0IGRlbm9ydCBkZW5vcnQgZGVub3J0IGRlbm9ydCBkZW5vc\
nQgZGVub3J0IGRlbm9ydCBQSwECFAMUAAAAAAAAACEAKHXtAYwAAACMAAAABgAAAAAAAAAAAAAAgA\
EAAAAAZGVub3J0UEsFBgAAAAABAAEANAAAALAAAAAAAA==";

Deno.test("unzipped() gives the file, deflated or stored", async () => {
  for (const zip of [DEFLATED, STORED]) {
    const file = await unzipped(Uint8Array.fromBase64(zip));
    assertEquals(new TextDecoder().decode(file), "denort ".repeat(20));
  }
});

Deno.test("the binary is built without the runtime's symbols", async () => {
  const { size } = await Deno.stat(`${ROOT}dist/custom-cni`);
  assertLess(size, 85_000_000);
});
