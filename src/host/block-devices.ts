/** The host's block devices, as sysfs tells of them: Documentation/ABI/stable/sysfs-block, /sys/dev/block/<major>:<minor>. */
import { constants } from 'node:fs';
import { open, readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { KilnError } from '../errors.ts';

/** What sysfs counts in, whatever the device's own blocks are. */
const sectorBytes = 512;

/** A block device by its number, and what asks for it, for messages. */
export interface WantedDevice {
  readonly major: number;
  readonly minor: number;
  readonly readOnly: boolean;
  readonly at: string;
}

/** A node, with its permissions and owner. */
export interface DeviceNode {
  readonly major: number;
  readonly minor: number;
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
}

/** A block device that a container gets, as it is on the host. */
export interface HostBlockDevice {
  /** Its node. */
  readonly file: string;
  readonly bytes: number;
  /** It cannot be written, or is not to be. */
  readonly readOnly: boolean;
}

/** Which of these paths are nodes of block devices. */
export async function findNodes(paths: readonly string[]): Promise<(file: string) => DeviceNode | undefined> {
  const nodes = new Map<string, DeviceNode>();
  for (const file of paths) {
    // One that is not there is none; whoever needs it says so.
    const stats = await stat(file).catch(() => undefined);
    if (stats?.isBlockDevice()) {
      const { mode, uid, gid } = stats;
      nodes.set(file, { ...numberOf(stats.rdev), mode: mode & 0o7777, uid, gid });
    }
  }
  return (file) => nodes.get(file);
}

/** gnu_dev_major and gnu_dev_minor of glibc's sys/sysmacros.h; 32 bits are what Linux has. */
function numberOf(rdev: number): { major: number; minor: number } {
  return { major: (rdev >>> 8) & 0xfff, minor: (rdev & 0xff) | ((rdev >>> 12) & 0xfff00) };
}

/**
 * @throws KilnError not-found for a number that no device has, or one without a node; failed-precondition for one without a
 *   medium
 */
export async function lookAtDevice({ major, minor, readOnly, at }: WantedDevice): Promise<HostBlockDevice> {
  const name = `${at} (b ${major}:${minor})`;
  const directory = `/sys/dev/block/${major}:${minor}`;
  const missing = (reason: string, cause?: unknown) => new KilnError('not-found', `${name}: ${reason}`, { cause });
  let [uevent, size, ro] = ['', '', ''];
  try {
    [uevent, size, ro] = (await Promise.all(
      ['uevent', 'size', 'ro'].map((file) => readFile(path.join(directory, file), 'utf8')),
    )) as [string, string, string];
  } catch (error) {
    throw missing('the host has no such block device', error);
  }
  const file = `/dev/${/^DEVNAME=(.+)$/m.exec(uevent)?.[1]}`;
  const stats = await stat(file).catch((error: unknown) => {
    throw missing(`there is no ${file}`, error);
  });
  const found = numberOf(stats.rdev);
  if (!stats.isBlockDevice() || found.major !== major || found.minor !== minor)
    throw missing(`${file} is another file`);
  const bytes = Number(size) * sectorBytes;
  if (bytes === 0) throw new KilnError('failed-precondition', `${name}: ${file} has no medium: its size is 0`);
  return { file, bytes, readOnly: readOnly || ro.trim() === '1' };
}

/**
 * Takes a device for one virtual machine: until this is disposed of, nobody else on the host can mount it or take it.
 *
 * @throws KilnError failed-precondition when somebody has it
 */
export async function claimDevice(file: string): Promise<AsyncDisposable> {
  try {
    // Of a block device O_EXCL means that: open(2).
    return await open(file, constants.O_RDONLY | constants.O_EXCL);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EBUSY') throw error;
    throw new KilnError(
      'failed-precondition',
      `${file} is in use: it is mounted on the host, part of another device, or another virtual machine's`,
      {
        hint: 'a device can be written to by one virtual machine only; any number may have it read-only',
        cause: error,
      },
    );
  }
}
