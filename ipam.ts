/**
 * The address manager: which address of the node's pod CIDR a pod gets.
 *
 * As in the shell script, a counter in /tmp holds the last number, and each pod
 * gets the next one. Number 7 of 10.240.1.0/24 is 10.240.1.7, and its host veth
 * is veth7. The counter only says where to continue. The kernel knows which
 * numbers are in use: those whose host veths exist. So no address is given
 * twice after somebody cleans /tmp, and a crash loses none.
 *
 * @module
 */

/** The file that holds the last number. */
const COUNTER = "/tmp/last_allocated_ip";

/** An error as a plugin reports it (CNI spec, section 5, "Error"). */
export class CNIError extends Error {
  constructor(
    readonly code: number,
    message: string,
    readonly details = "",
  ) {
    super(message);
  }
}

/** Throws a {@linkcode CNIError}. */
export function fail(code: number, message: string, details?: string): never {
  throw new CNIError(code, message, details);
}

/** A pod CIDR: the range of addresses for a node's pods. */
export interface PodCIDR {
  /** As in the conf: "10.240.1.0/24". */
  text: string;
  /** The first address, as an integer. */
  network: number;
  prefix: number;
  /** The number of addresses. */
  size: number;
  /** How many of them are for pods. */
  room: number;
}

/**
 * Parses a pod CIDR, from /8 to /30.
 *
 * @throws {CNIError} 7 for a bad one, with the value and the reason.
 */
export function parsePodCIDR(text: unknown): PodCIDR {
  const refuse = (why: string) => {
    const value = JSON.stringify(text)?.slice(0, 80) ?? "is missing";
    const fix = 'each node has its own, such as "podcidr": "10.240.1.0/24"';
    return fail(7, `podcidr ${value}: ${why}`, fix);
  };
  // Strict, since inet_aton(3) reads 010.1.0.0 as octal and 10.1 as 10.0.0.1.
  const part = "(0|[1-9][0-9]{0,2})";
  const pattern = `^${part}\\.${part}\\.${part}\\.${part}/[1-9][0-9]?$`;
  if (typeof text !== "string" || !new RegExp(pattern).test(text)) {
    return refuse("not an IPv4 range in CIDR notation");
  }
  const [address, length] = text.split("/");
  const parts = address.split(".").map(Number);
  const prefix = Number(length);
  if (Math.max(...parts) > 255) {
    refuse("each part of an address is at most 255");
  }
  if (prefix < 8 || prefix > 30) {
    refuse("the prefix must be from /8 to /30");
  }
  const network = toInteger(address);
  const size = 2 ** (32 - prefix);
  if (network % size !== 0) {
    refuse(`bits are set after the prefix /${prefix}`);
  }
  // 0/8 is "this network", 127/8 is loopback, 224/3 is multicast and reserved.
  if (parts[0] === 0 || parts[0] === 127 || parts[0] > 223) {
    refuse("not a range for hosts");
  }
  // The network, the gateway and the broadcast address are not for pods.
  return { text, network, prefix, size, room: size - 3 };
}

/** An address as an integer: "0.0.1.2" is 258. */
function toInteger(address: string): number {
  const [a, b, c, d] = address.split(".").map(Number);
  return ((a * 256 + b) * 256 + c) * 256 + d;
}

/** The address of a number: 7 of 10.240.1.0/24 is "10.240.1.7". */
export function address(podCIDR: PodCIDR, n: number): string {
  const integer = podCIDR.network + n;
  const bytes = [integer >>> 24, integer >>> 16, integer >>> 8, integer];
  return bytes.map((byte) => byte & 255).join(".");
}

/** The number of an address: "10.240.1.7" of 10.240.1.0/24 is 7. */
export function numberOf(podCIDR: PodCIDR, address: string): number {
  return toInteger(address) - podCIDR.network;
}

/** Whether a pod may have this number: not 0, 1 or the last one. */
export function isForPod(podCIDR: PodCIDR, n: number): boolean {
  return n > 1 && n < podCIDR.size - 1;
}

/** Whether a pod CIDR and the network of "10.0.2.14/24" share addresses. */
export function overlaps(podCIDR: PodCIDR, other: string): boolean {
  const [address, prefix] = other.split("/");
  const size = 2 ** (32 - Number(prefix));
  const first = Math.floor(toInteger(address) / size) * size;
  const { network } = podCIDR;
  return first < network + podCIDR.size && network < first + size;
}

/**
 * Takes the next number. It skips those in use, and after the last number comes
 * the first. So an address comes back as late as possible. ADDs take numbers
 * one at a time, so no two get the same.
 *
 * @param used The numbers that are known to be in use.
 * @throws {CNIError} 11 if those are all, 5 if the counter can't be used.
 */
export async function nextNumber(
  podCIDR: PodCIDR,
  used: Set<number> = new Set(),
): Promise<number> {
  const { text, size, room } = podCIDR;
  if (used.size >= room) {
    const details = `all ${room} are in use, a pod must end first`;
    fail(11, `No free address in ${text}`, details);
  }
  using counter = await lockCounter();
  const first = 2; // 0 is the network, 1 is the gateway
  const last = size - 2; // size - 1 is the broadcast address
  let n = readNumber(counter);
  do {
    n = n + 1;
    if (n < first || n > last) {
      n = first;
    }
  } while (used.has(n));
  writeNumber(counter, n);
  return n;
}

/**
 * Opens the counter and locks it. The lock is flock(2)'s: it ends when the file
 * is closed or the process ends.
 */
async function lockCounter(): Promise<Deno.FsFile> {
  for (let attempt = 0; attempt < 10; attempt++) {
    const isThere = checkCounter();
    try {
      const counter = Deno.openSync(COUNTER, {
        read: true,
        write: true,
        createNew: !isThere,
        mode: 0o600,
      });
      await lock(counter);
      // If it was deleted during the wait, other ADDs lock a new file.
      if (counter.statSync().ino === Deno.lstatSync(COUNTER).ino) {
        return counter;
      }
      counter.close();
    } catch (error) {
      // Another ADD has just created it, or somebody deleted it: look again.
      if (error instanceof Deno.errors.AlreadyExists) continue;
      if (error instanceof Deno.errors.NotFound) continue;
      if (error instanceof CNIError) throw error;
      fail(5, `Cannot open ${COUNTER}`, `${error}`);
    }
  }
  return fail(11, `${COUNTER} is being replaced again and again`);
}

/**
 * Whether the counter exists. Everybody may write to /tmp, and this program is
 * root: through a link it would overwrite any file. So only a plain file that
 * root owns will do.
 *
 * @throws {CNIError} 5 if it is anything else.
 */
export function checkCounter(): boolean {
  let file: Deno.FileInfo;
  try {
    file = Deno.lstatSync(COUNTER);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    return fail(5, `Cannot look at ${COUNTER}`, `${error}`);
  }
  if (file.isFile && file.uid === 0 && file.nlink === 1) return true;
  const fix = `somebody else created it; look at it, then: rm -r ${COUNTER}`;
  return fail(5, `${COUNTER} is not a plain file owned by root`, fix);
}

/** Locks the counter. @throws {CNIError} 11 if it stays locked for a minute. */
async function lock(counter: Deno.FsFile): Promise<void> {
  if (counter.tryLockSync(true)) return;
  const late = new Promise<never>((_, reject) => {
    const see = `see: fuser -v ${COUNTER}`;
    const error = new CNIError(11, `${COUNTER} is locked for a minute`, see);
    AbortSignal.timeout(60_000).onabort = () => reject(error);
  });
  await Promise.race([counter.lock(true), late]);
}

/** The number in the counter; 0 if it is empty or holds rubbish. */
function readNumber(counter: Deno.FsFile): number {
  const content = new Uint8Array(32);
  const length = counter.readSync(content) ?? 0;
  const n = Number(new TextDecoder().decode(content.subarray(0, length)));
  return Number.isInteger(n) ? n : 0;
}

/** Writes the number into the counter. @throws {CNIError} 5 if it can't. */
function writeNumber(counter: Deno.FsFile, n: number): void {
  const line = new TextEncoder().encode(`${n}\n`);
  try {
    counter.seekSync(0, Deno.SeekMode.Start);
    counter.writeSync(line);
    counter.truncateSync(line.length);
  } catch (error) {
    fail(5, `Cannot write ${COUNTER}`, `${error}`);
  }
}
