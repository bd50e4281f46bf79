/**
 * The guest's disks, by the serials that virtio disks show in sysfs: a drive slot's name, or what the VMM makes of its file.
 *
 * The host puts files behind drive slots while the guest runs, and a guest's kernel looks at a disk's size once, when its
 * driver finds it. Where a container has the disk as a device, the size matters: the driver lets go of a disk of the
 * wrong size, and finds it again.
 */
import { closeSync, constants, fsync, openSync, readdirSync, readFileSync, realpathSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { promisify } from 'node:util';
import type { FindDisksRequest_Disk, FindDisksResponse_Device } from '../gen/kiln/agent/v1/agent.ts';
import { AgentError } from './errors.ts';
import type { Undo } from './undo.ts';

/** How long something may have a disk that no container uses any more, and how often we look, in milliseconds. */
const freeLimitMs = 10_000;
const freeLookMs = 10;

/** What sysfs counts in, whatever the disk's own blocks are: Documentation/ABI/stable/sysfs-block, "size". */
const sectorBytes = 512n;

const sysfs = '/sys/block';

/** How many mounts of containers, and containers with it as a device, each disk has. */
const uses = new Map<string, number>();

/** Disks that the driver has found again, with the size of what was behind them then. */
const sized = new Set<string>();

/**
 * The device of the disk that carries `serial`.
 *
 * @param sysBlock where sysfs lists the block devices
 * @throws AgentError internal, naming the serials that exist
 */
export function findDisk(serial: string, sysBlock = sysfs): string {
  return `/dev/${nameOf(serial, sysBlock)}`;
}

/** Where serials were found last: sysfs asks the VMM for each one that is read. */
const names = new Map<string, string>();

function nameOf(serial: string, sysBlock: string): string {
  const serialOf = (name: string) => readSerial(join(sysBlock, name, 'serial'));
  const known = names.get(serial);
  if (known !== undefined && serialOf(known) === serial) return known;
  const seen: string[] = [];
  for (const name of readdirSync(sysBlock)) {
    const found = serialOf(name);
    if (found === '') continue;
    names.set(found, name);
    if (found === serial) return name;
    seen.push(found);
  }
  throw new AgentError(
    'internal',
    `no disk with serial "${serial}" in the guest (there are: ${seen.sort().join(', ')})`,
  );
}

/** Only virtio disks have the file. */
function readSerial(path: string): string {
  try {
    return readFileSync(path, 'utf8').trim();
  } catch {
    return '';
  }
}

/**
 * The device numbers of disks, whose sizes are right then.
 *
 * @throws AgentError internal for a disk that is not there, or is not of the size that the host says
 */
export function findDisks(disks: readonly FindDisksRequest_Disk[], sysBlock = sysfs): FindDisksResponse_Device[] {
  return disks.map(({ serial, bytes }) => {
    if (bytesOf(serial, sysBlock) !== bytes && !isUsed(serial)) findAgain(serial, sysBlock);
    const seen = bytesOf(serial, sysBlock);
    if (seen !== bytes) {
      throw new AgentError('internal', `the disk ${serial} has ${seen} bytes in the guest, and ${bytes} on the host`);
    }
    const [major = Number.NaN, minor = Number.NaN] = attribute(serial, 'dev', sysBlock).split(':').map(Number);
    return { major, minor };
  });
}

function bytesOf(serial: string, sysBlock: string): bigint {
  return BigInt(attribute(serial, 'size', sysBlock)) * sectorBytes;
}

function attribute(serial: string, name: string, sysBlock: string): string {
  return readFileSync(join(sysBlock, nameOf(serial, sysBlock), name), 'utf8').trim();
}

/** Has the driver find a disk again that was a device earlier: what is behind it now may be larger. */
export function forgetSize(serial: string, sysBlock = sysfs): void {
  if (sized.has(serial) && !isUsed(serial)) findAgain(serial, sysBlock);
}

/** The disk's name and its numbers may be others then. */
function findAgain(serial: string, sysBlock: string): void {
  const device = join(sysBlock, nameOf(serial, sysBlock), 'device');
  const name = basename(realpathSync(device));
  const driver = realpathSync(join(device, 'driver'));
  sized.add(serial);
  writeFileSync(join(driver, 'unbind'), name);
  writeFileSync(join(driver, 'bind'), name);
}

function isUsed(serial: string): boolean {
  return (uses.get(serial) ?? 0) > 0;
}

/** Notes a use of a disk until `undo`. */
export function countUse(serial: string, undo: Undo): void {
  uses.set(serial, (uses.get(serial) ?? 0) + 1);
  undo.deferWithin(() => void uses.set(serial, (uses.get(serial) ?? 0) - 1));
}

/** Has a container use a disk as a device. `undo` writes to the disk what is not there yet. */
export function useAsDevice(serial: string, undo: Undo): void {
  countUse(serial, undo);
  // What cannot be written any more must not keep the container in the guest: its programs have been told.
  undo.defer(() => flushDisk(serial).catch(() => {}));
}

async function flushDisk(serial: string): Promise<void> {
  const fd = openSync(findDisk(serial), 'r');
  try {
    await promisify(fsync)(fd);
  } finally {
    closeSync(fd);
  }
}

/**
 * Resolves when nobody has a disk whose last use in our sight has ended: a container's mount namespace, which has mounts
 * of its own, is taken apart a little after its last process. At once for a disk that another container uses, and for one
 * that nobody has used.
 *
 * @throws AgentError internal when that takes too long
 */
export async function diskIsFree(serial: string): Promise<void> {
  // One that was never used may not even be there, which whoever wanted to use it has told.
  if (uses.get(serial) !== 0) return;
  const device = findDisk(serial);
  const deadline = performance.now() + freeLimitMs;
  for (;;) {
    try {
      // Of a block device this means that nobody else may have it, a filesystem included; open(2).
      closeSync(openSync(device, constants.O_RDONLY | constants.O_EXCL));
      return;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EBUSY') throw error;
      if (performance.now() > deadline) throw new AgentError('internal', `something still has the disk ${serial}`);
    }
    await delay(freeLookMs);
  }
}
