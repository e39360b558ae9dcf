/** The arithmetic of `ipam.ts`. */
import { assertEquals, assertThrows } from "@std/assert";
import { address, CNIError, overlaps, parsePodCIDR } from "../../ipam.ts";

const GOOD: Record<string, [prefix: number, first: string, last: string]> = {
  "10.240.1.0/24": [24, "10.240.1.0", "10.240.1.255"],
  "10.0.0.0/8": [8, "10.0.0.0", "10.255.255.255"],
  "223.255.255.252/30": [30, "223.255.255.252", "223.255.255.255"],
  "192.168.128.0/17": [17, "192.168.128.0", "192.168.255.255"],
};
for (const [text, [prefix, first, last]] of Object.entries(GOOD)) {
  Deno.test(`parsePodCIDR() reads ${text}`, () => {
    const range = parsePodCIDR(text);
    const size = 2 ** (32 - prefix);
    const { network: _, ...rest } = range;
    assertEquals(rest, { text, prefix, size, room: size - 3 });
    assertEquals([address(range, 0), address(range, size - 1)], [first, last]);
  });
}

// One for each reason. input_test.ts sends many more to the plugin.
const BAD: [value: unknown, reason: string][] = [
  [undefined, "podcidr is missing"],
  [["10.240.1.0/24"], "not an IPv4 range"],
  ["010.240.1.0/24", "not an IPv4 range"],
  ["256.0.0.0/8", "at most 255"],
  ["10.0.0.0/7", "from /8 to /30"],
  ["10.240.1.0/31", "from /8 to /30"],
  ["10.240.1.0/23", "after the prefix /23"],
  ["0.0.0.0/8", "not a range for hosts"],
  ["127.0.0.0/8", "not a range for hosts"],
  ["224.0.0.0/24", "not a range for hosts"],
];
for (const [value, reason] of BAD) {
  Deno.test(`parsePodCIDR() refuses ${JSON.stringify(value)}`, () => {
    const error = assertThrows(() => parsePodCIDR(value), CNIError, reason);
    assertEquals(error.code, 7);
  });
}

const OTHERS: [text: string, overlaps: boolean][] = [
  ["10.240.1.1/24", true], // the same
  ["10.240.1.255/32", true], // within
  ["10.1.2.3/8", true], // around
  ["0.0.0.0/0", true],
  ["10.240.0.255/24", false], // just below
  ["10.240.2.0/24", false], // just above
  ["203.0.113.1/24", false],
];
for (const [text, expected] of OTHERS) {
  Deno.test(`overlaps() is ${expected} for 10.240.1.0/24 and ${text}`, () => {
    assertEquals(overlaps(parsePodCIDR("10.240.1.0/24"), text), expected);
  });
}
