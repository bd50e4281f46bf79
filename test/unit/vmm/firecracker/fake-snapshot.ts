/**
 * The files of a snapshot, as far as src/vmm/src/snapshot/mod.rs and persist.rs of Firecracker v1.16 tell: the state begins with
 * a magic number and ends with a checksum, and is read by the version that wrote it alone; the memory is as long as the
 * guest's. Both are written over what is there, and made with the umask's mode where nothing is.
 */
import { createHash } from 'node:crypto';
import { closeSync, ftruncateSync, openSync, readFileSync, statSync, writeFileSync } from 'node:fs';

export interface Saved {
  readonly version: string;
  readonly memoryMib: number;
  /** Memory beyond that, which lies in the file as a hole where it is not plugged: docs/memory-hotplug.md, "Snapshots". */
  readonly hotplug: { total: number; requested: number; plugged: number } | undefined;
  /** By id, the path of each drive's file. */
  readonly drives: Readonly<Record<string, string>>;
  /** By id, the tap of each network interface. */
  readonly interfaces: Record<string, string>;
  readonly vsock: string | undefined;
}

interface Files {
  readonly state: string;
  readonly memory: string;
}

/** SNAPSHOT_MAGIC_ID of x86-64, little-endian. */
const magic = Buffer.from('0000648684191007', 'hex');
const checksumBytes = 8;

export function writeSnapshot({ state, memory }: Files, saved: Saved): void {
  const content = Buffer.concat([magic, Buffer.from(JSON.stringify(saved))]);
  writeFileSync(state, Buffer.concat([content, checksumOf(content)]));
  const fd = openSync(memory, 'a');
  ftruncateSync(fd, lengthOf(saved));
  closeSync(fd);
}

/** @throws Error with what Firecracker says */
export function readSnapshot({ state, memory }: Files, version: string): Saved {
  const bytes = readFileSync(state);
  const [content, checksum] = [bytes.subarray(0, -checksumBytes), bytes.subarray(-checksumBytes)];
  // In this order: src/vmm/src/snapshot/mod.rs, load.
  if (!checksumOf(content).equals(checksum)) throw new Error('CRC64 validation failed');
  if (!content.subarray(0, magic.length).equals(magic)) throw new Error('Magic value does not match arch');
  const saved = JSON.parse(content.subarray(magic.length).toString()) as Saved;
  if (saved.version !== version) throw new Error('Invalid data version');
  if (statSync(memory).size < lengthOf(saved)) throw new Error('The specified file offset and length');
  return saved;
}

function lengthOf({ memoryMib, hotplug }: Saved): number {
  return (memoryMib + (hotplug?.total ?? 0)) * 2 ** 20;
}

function checksumOf(content: Buffer): Buffer {
  return createHash('sha256').update(content).digest().subarray(0, checksumBytes);
}
