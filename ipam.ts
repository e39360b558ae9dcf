/**
 * The address manager: which address of the node's pod CIDR a pod gets.
 *
 * As in the shell script a file in /tmp holds the number given last, and each
 * pod gets the next one: number 7 of 10.240.1.0/24 is 10.240.1.7, and its host
 * veth is veth7. The file only says where to go on. Which numbers are in use
 * the kernel tells, by the veths that exist, so neither a cleaned /tmp nor a
 * crash gives an address twice or loses one.
 *
 * @module
 */

/** Where the number given last is kept. */
export const COUNTER = "/tmp/last_allocated_ip";

// Strict, since inet_aton(3) reads 010.1.0.0 as octal and 10.1 as 10.0.0.1.
const PART = "(0|[1-9]\\d{0,2})";
const CIDR = new RegExp(`^${PART}\\.${PART}\\.${PART}\\.${PART}/([1-9]\\d?)$`);

/** An error as a plugin reports it (CNI spec, section 5, "Error"). */
export class CNIError extends Error {
  constructor(readonly code: number, message: string, readonly details = "") {
    super(message);
  }
}

/** Throws a {@linkcode CNIError}; in one word, so that `?? fail(…)` reads. */
export function fail(code: number, message: string, details?: string): never {
  throw new CNIError(code, message, details);
}

/** Waits until a signal; a timer would be 22 more scripts for Deno to load. */
export function orLate<T>(end: AbortSignal, late: Error, work: Promise<T>) {
  const over = new Promise<T>((_, no) => end.onabort = () => no(late));
  return Promise.race([work, over]);
}

/** A node's range of addresses. */
export interface PodCIDR {
  text: string; // as written, "10.240.1.0/24"
  network: number; // its first address, as a number
  prefix: number;
  size: number;
  room: number; // how many pods it has addresses for
}

/**
 * Reads a pod CIDR, from /8 to /30.
 *
 * @throws {CNIError} 7 if it is none, with the value and the reason.
 */
export function parsePodCIDR(text: unknown): PodCIDR {
  const value = JSON.stringify(text)?.slice(0, 80) ?? "is missing";
  const mend = 'a node has its own range, such as "podcidr": "10.240.1.0/24"';
  const refuse = (why: string) => fail(7, `podcidr ${value}: ${why}`, mend);
  if (typeof text !== "string" || !CIDR.test(text)) {
    return refuse("not an IPv4 range in CIDR notation");
  }
  const { parts, network, prefix, size } = parse(text);
  if (Math.max(...parts) > 255) refuse("an address has parts up to 255");
  if (prefix < 8 || prefix > 30) refuse("the prefix must be from /8 to /30");
  if (network % size) refuse(`bits are set behind the prefix /${prefix}`);
  // 0/8 is "this network", 127/8 loopback, 224/3 multicast and reserved.
  const [first] = parts;
  if ([0, 127].includes(first) || first > 223) refuse("not a range for hosts");
  // All but the network's own address, the gateway's and the broadcast's.
  return { text, network, prefix, size, room: size - 3 };
}

function parse(text: string) {
  const [a, b, c, d, prefix] = text.split(/[./]/).map(Number);
  const network = ((a * 256 + b) * 256 + c) * 256 + d;
  return { parts: [a, b, c, d], network, prefix, size: 2 ** (32 - prefix) };
}

/** The address with the number n: 7 of 10.240.1.0/24 is "10.240.1.7". */
export function address({ network }: PodCIDR, n: number): string {
  const bits = network + n;
  return [24, 16, 8, 0].map((shift) => (bits >>> shift) & 255).join(".");
}

/** Tells whether a range has addresses of the network of "10.0.2.14/24". */
export function overlaps({ network, size }: PodCIDR, text: string): boolean {
  const other = parse(text);
  const first = other.network - other.network % other.size;
  return first < network + size && network < first + other.size;
}

/**
 * Tells whether the counter is there. Everybody may write in /tmp and we are
 * root, so only a plain file of root's own will do: through a link we would
 * overwrite what it points to.
 *
 * @throws {CNIError} 5 if it is anything else.
 */
export function checkCounter(): boolean {
  try {
    const { isFile, uid, nlink } = Deno.lstatSync(COUNTER);
    if (isFile && uid === 0 && nlink === 1) return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    fail(5, `Cannot look at ${COUNTER}`, `${error}`);
  }
  const mend = `somebody else made it; look at it, then: rm -r ${COUNTER}`;
  return fail(5, `${COUNTER} is not a plain file of root's`, mend);
}

/**
 * Opens the counter, and waits until no other ADD on the node has it. It stays
 * locked, as in flock(2), until it is closed or the process ends.
 */
async function lockCounter(): Promise<Deno.FsFile> {
  for (let tries = 0; tries < 10; tries++) {
    const createNew = !checkCounter();
    try {
      const options = { read: true, write: true, createNew, mode: 0o600 };
      const counter = Deno.openSync(COUNTER, options);
      if (!counter.tryLockSync(true)) {
        const late = new CNIError(11, `${COUNTER} is locked by another ADD`);
        await orLate(AbortSignal.timeout(60_000), late, counter.lock(true));
      }
      // Cleaned away in between? Then the others lock a new file.
      const { ino } = Deno.lstatSync(COUNTER);
      if (counter.statSync().ino === ino) return counter;
      counter.close();
    } catch (error) {
      const { AlreadyExists, NotFound } = Deno.errors; // another ADD's doing
      if (error instanceof AlreadyExists || error instanceof NotFound) continue;
      if (error instanceof CNIError) throw error;
      fail(5, `Cannot open ${COUNTER}`, `${error}`);
    }
  }
  return fail(11, `${COUNTER} is replaced again and again`);
}

/**
 * Takes the next number: one more than the last, past those in use, and from
 * the end back to the first. So an address comes back as late as it can. One
 * ADD at a time takes one, so no two get the same.
 *
 * @param used The numbers of this range that are known to be in use.
 * @throws {CNIError} 11 if that is all of them, 5 if the counter can't be used.
 */
export async function nextNumber(podCIDR: PodCIDR, used = new Set<number>()) {
  const { text, size, room } = podCIDR;
  if (used.size >= room) {
    const details = `all ${room} are in use, a pod must end first`;
    fail(11, `No free address in ${text}`, details);
  }
  const last = size - 2; // behind it is the broadcast address
  using counter = await lockCounter();
  const content = new Uint8Array(32);
  const length = counter.readSync(content) ?? 0;
  let n = Number(new TextDecoder().decode(content.subarray(0, length)));
  // Empty, rubbish, from a larger range: begin again.
  if (!Number.isInteger(n) || n < 1 || n > last) n = 1;
  do {
    n = n < last ? n + 1 : 2; // 0 is the network, 1 the gateway
  } while (used.has(n));
  const line = new TextEncoder().encode(`${n}\n`);
  try {
    counter.seekSync(0, Deno.SeekMode.Start);
    counter.writeSync(line);
    counter.truncateSync(line.length);
  } catch (error) {
    fail(5, `Cannot write ${COUNTER}`, `${error}`);
  }
  return n;
}
