/** How tests read the plugin's answers. */
import { assertEquals, assertMatch, assertNotEquals } from "@std/assert";
import type { Answer } from "../lab/node.ts";

/** The address in ADD's result, with its prefix. */
export const cidrOf = ({ json }: Answer): string => json.ips[0].address;

/** Asserts that a call failed with this code and these words. */
export function assertError(
  { code, json }: Answer,
  cniCode: number,
  text: RegExp,
): void {
  assertNotEquals(code, 0);
  assertEquals(json.code, cniCode);
  assertMatch(`${json.msg}; ${json.details}`, text);
}
