/*
 * A jail for one Firecracker, made and removed by us, entered by the jailer (docs/jailer.md of Firecracker). In the
 * sandbox's directory:
 *
 *   j/                            a tmpfs, where programs may run and devices work, which neither need to in /run
 *   j/<program>/<id>/root/        Firecracker's root directory: its own user's, once the jailer has entered it
 *   j/<program>/<id>/root/files/  a tmpfs that only root can change: kernel, images, drives, FIFOs, a template's files
 *   r                             a symbolic link to the root directory, so that the sockets in there have short paths
 *
 * A file of the host gets into `files` as a mount over an empty file. That is a mount of its own which is shared, so what
 * is mounted there while Firecracker runs appears in its mount namespace, too. A block device gets a node there in the place of the
 * empty file, since the host's own node is root's and no mount can make it another user's. No cgroup of a VM keeps it from
 * devices: what it can open is what it has a node for, and it can make none.
 *
 * Whoever has taken over a jailed Firecracker can put whatever it likes in the place of what lies in the root directory
 * itself. So nothing is opened or mounted there by path after the start: `files` it cannot rename, as a mount point, and of a
 * socket the file is looked at first (socket-path.ts).
 */
import {
  chmodSync,
  existsSync,
  mkdirSync,
  realpathSync,
  renameSync,
  rmdirSync,
  rmSync,
  statSync,
  symlinkSync,
} from 'node:fs';
import { stat } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { KilnError } from '../../errors.ts';
import { type GroupLimits, hostMounts } from '../../host/cgroups.ts';
import type { HelperProcess } from '../../host/helper-process.ts';
import type { Parking } from '../cards.ts';
import type { SlotName } from '../vmm.ts';
import { removeCgroups } from './jail-cgroup.ts';
import { type JailKernel, realKernel } from './jail-kernel.ts';
import { claimUid, hostClaims, releaseUid, type UidRange, uidsOf } from './jail-uids.ts';
import { startJailer } from './jailer.ts';
import { type BootFile, type FifoName, makeSparse, type Place, type Seen, type SnapshotFile } from './place.ts';

/** The host that jails are made on. Another one is for tests. */
export interface JailHost {
  readonly kernel: JailKernel;
  /** Where user ids are claimed. */
  readonly claims: string;
  /** The host's table of mounts, for its cgroups. */
  readonly mounts: string;
}

export const jailHost: JailHost = { kernel: realKernel, claims: hostClaims, mounts: hostMounts };

export interface JailOptions {
  /** Absolute path of the jailer. */
  readonly jailer: string;
  /** Absolute path of Firecracker. */
  readonly program: string;
  readonly uids: UidRange;
  readonly limits: GroupLimits;
  /** The VM's name for the process list. */
  readonly id: string;
  /** The network namespace that Firecracker runs in. */
  readonly network: Parking;
  readonly directory: string;
}

/** What the jail's own file system may hold beside Firecracker's program, in bytes: the jailer's devices and folders. */
const spareBytes = 4 * 2 ** 20;
const rootInodes = 256;

/** What is written to a drive before it has a file lands here, so this bounds it. */
const filesBytes = 4 * 2 ** 20;
const filesInodes = 64;

/** Killed processes end within milliseconds; they are not our children, so there is no event. */
const endLimitMs = 5_000;
const endIntervalMs = 5;

/**
 * Makes a jail. Its user id, and so its cgroup, are no other live VM's.
 *
 * @throws KilnError resource-exhausted without a free user id; SysError EPERM for a kilnd that is not root
 */
export async function makeJail(options: JailOptions, host: JailHost): Promise<Place> {
  const { directory, uids } = options;
  await using undo = new AsyncDisposableStack();
  undo.defer(() => clearJail(directory, host));
  const uid = claimUid(uids, directory, host.claims);
  // As the jailer does before it takes the program's name.
  const program = realpathSync(options.program);
  const id = jailId(options.id, uid);
  const base = baseOf(directory);
  const root = path.join(base, path.basename(program), id, 'root');
  mkdirSync(base);
  const sizeBytes = statSync(program).size + spareBytes;
  host.kernel.mountTmpfs(base, { sizeBytes, inodes: rootInodes, shared: false });
  const files = path.join(root, 'files');
  mkdirSync(files, { recursive: true, mode: 0o755 });
  symlinkSync(path.relative(directory, root), rootLink(directory));
  host.kernel.mountTmpfs(files, { sizeBytes: filesBytes, inodes: filesInodes, shared: true });
  undo.move();
  const { jailer, limits, network } = options;
  const entry = { jailer, program, limits, network, id, directory, base, uid, root, mounts: host.mounts };
  return new Jail({ directory, uid, host, enter: (args, signal) => startJailer({ ...entry, args }, signal) });
}

/** The jail of a VM whose kilnd is gone. */
export function findJail(directory: string, uid: number, host: JailHost): Place {
  return new Jail({ directory, uid, host });
}

/**
 * Ends what is left of the jail in a sandbox's directory: processes, mounts, cgroups, the claim on its user id. Safe where
 * there is none, or half of one.
 */
export async function clearJail(directory: string, host: JailHost = jailHost): Promise<void> {
  const uids = uidsOf(directory, host.claims);
  const base = baseOf(directory);
  if (uids.length === 0 && !existsSync(base)) return;
  await endProcesses(rootLink(directory), host.kernel);
  rmSync(rootLink(directory), { force: true });
  removeBase(base, host.kernel);
  for (const uid of uids) {
    await removeCgroups(uid, host.mounts);
    // Last: from here on another VM may have it.
    releaseUid(uid, host.claims);
  }
}

/** Never with what is in it: a file that is still mounted there would be somebody's. */
function removeBase(base: string, kernel: JailKernel): void {
  kernel.unmount(base);
  try {
    rmdirSync(base);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
  }
}

async function endProcesses(root: string, kernel: JailKernel): Promise<void> {
  const left = () => {
    try {
      return kernel.processesIn(root);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return []; // No root directory yet, so nobody is in it.
      throw error;
    }
  };
  for (let waited = 0; waited < endLimitMs; waited += endIntervalMs) {
    const pids = left();
    if (pids.length === 0) return;
    for (const pid of pids) kill(pid);
    await delay(endIntervalMs);
  }
  throw new KilnError('internal', `the jailed processes ${left().join(', ')} do not end`);
}

function kill(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

function baseOf(directory: string): string {
  return path.join(directory, 'j');
}

function rootLink(directory: string): string {
  return path.join(directory, 'r');
}

/** The name in the process list, and of the cgroup: 1 to 64 letters, digits and `-`; with the user id it is unique. */
function jailId(id: string, uid: number): string {
  return `${id.slice(0, 50)}-${uid}`;
}

interface JailParts {
  readonly directory: string;
  readonly uid: number;
  readonly host: JailHost;
  /** Absent for one that has been entered. */
  readonly enter?: (args: readonly string[], signal: AbortSignal) => Promise<HelperProcess>;
}

export class Jail implements Place {
  readonly uid: number;
  readonly apiSocket: Seen;
  readonly vsock: Seen;
  readonly #parts: JailParts;
  readonly #files: string;

  constructor(parts: JailParts) {
    this.uid = parts.uid;
    this.#parts = parts;
    const root = rootLink(parts.directory);
    this.apiSocket = { host: path.join(root, 'api'), inside: '/api' };
    this.vsock = { host: path.join(root, 'v'), inside: '/v' };
    this.#files = path.join(root, 'files');
  }

  async show(name: BootFile | SnapshotFile | 'guest', file: string): Promise<string> {
    await this.#mount(file, makeSparse(this.#own(name), 0, 0o400), true);
    return inside(name);
  }

  async lend(name: SnapshotFile, file: string): Promise<string> {
    await this.#mount(file, makeSparse(this.#own(name), 0, 0o400), false);
    return inside(name);
  }

  hide(name: BootFile | SnapshotFile): void {
    this.#parts.host.kernel.unmount(this.#own(name));
  }

  makeEmpty(slot: SlotName, { bytes, readOnly }: { bytes: number; readOnly: boolean }): string {
    this.#ownedByGroup(makeSparse(this.#own(slot), bytes, readOnly ? 0o440 : 0o660));
    return inside(slot);
  }

  async fill(slot: SlotName, file: string, readOnly: boolean): Promise<Seen> {
    const seen = { host: this.#own(slot), inside: inside(slot) };
    const found = await stat(file, { bigint: true });
    if (!found.isBlockDevice()) {
      await this.#mount(file, seen.host, readOnly);
      return seen;
    }
    renameSync(seen.host, emptied(seen.host));
    try {
      this.#parts.host.kernel.mknod(seen.host, readOnly ? 0o440 : 0o660, found.rdev);
      this.#ownedByGroup(seen.host);
    } catch (error) {
      this.clear(slot);
      throw error;
    }
    return seen;
  }

  clear(slot: SlotName): string {
    const own = this.#own(slot);
    if (existsSync(emptied(own))) renameSync(emptied(own), own);
    else this.#parts.host.kernel.unmount(own);
    return inside(slot);
  }

  makeFifo(name: FifoName): Seen {
    const fifo = this.fifo(name);
    this.#parts.host.kernel.mkfifo(fifo.host, 0o660);
    // The umask has taken the group's right to write. Nobody is in the jail yet.
    chmodSync(fifo.host, 0o660);
    this.#ownedByGroup(fifo.host);
    return fifo;
  }

  fifo(name: FifoName): Seen {
    return { host: this.#own(name), inside: inside(name) };
  }

  admit(socket: string): void {
    this.#parts.host.kernel.chown(socket, this.uid, this.uid);
  }

  start(args: readonly string[], signal: AbortSignal): Promise<HelperProcess> {
    const { enter } = this.#parts;
    if (enter === undefined) throw new KilnError('internal', 'the jail has been entered before');
    return enter(['--api-sock', this.apiSocket.inside, ...args], signal);
  }

  [Symbol.asyncDispose](): Promise<void> {
    return clearJail(this.#parts.directory, this.#parts.host);
  }

  async #mount(file: string, target: string, readOnly: boolean): Promise<void> {
    if (!(await stat(file)).isFile()) {
      throw new KilnError('failed-precondition', `${file} is neither a file nor a block device`);
    }
    await this.#parts.host.kernel.mountFile(file, target, { readOnly, uid: this.uid });
  }

  /** Root's, so that Firecracker can use it, but not give itself more rights. */
  #ownedByGroup(file: string): void {
    this.#parts.host.kernel.chown(file, 0, this.uid);
  }

  #own(name: string): string {
    return path.join(this.#files, name);
  }
}

/** Where a slot's empty file waits while there is the node of a device in its place. */
function emptied(file: string): string {
  return `${file}.empty`;
}

function inside(name: string): string {
  return `/files/${name}`;
}
