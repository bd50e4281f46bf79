/*
 * The control groups of a jailed VM. The jailer makes them, enters them and writes the limits before Firecracker runs
 * (docs/jailer.md, --cgroup); to remove them is our part. It speaks to one version of cgroups at a time.
 */
import { readdirSync, readFileSync, rmdirSync } from 'node:fs';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';

export interface CgroupLimits {
  readonly memoryBytes: number;
  /** Processes and threads. */
  readonly pids: number;
}

/** Where the host has its hierarchies: proc(5), /proc/mounts. */
export const hostMounts = '/proc/mounts';

interface Hierarchy {
  readonly version: 1 | 2;
  readonly directory: string;
  readonly controllers: readonly string[];
}

/** The files by which each version limits what we limit. cgroups(7), "memory" and "pids"; admin-guide/cgroup-v2.rst. */
const limitFiles: Readonly<Record<1 | 2, (limits: CgroupLimits) => Readonly<Record<string, number>>>> = {
  1: ({ memoryBytes, pids }) => ({ 'memory.limit_in_bytes': memoryBytes, 'pids.max': pids }),
  2: ({ memoryBytes, pids }) => ({ 'memory.max': memoryBytes, 'pids.max': pids }),
};

/** The removed group may still hold the kernel's own threads for its VM, for so long at most, and is tried so often. */
const removalLimitMs = 2_000;
const removalIntervalMs = 10;

/** The group that is the parent of the VM's own, which is named as its --id. */
function parentGroup(uid: number): string {
  return `kiln-${uid}`;
}

/**
 * The jailer's arguments: the version that has more of the controllers (on a hybrid host that is v1), and a limit for each
 * that it has. None on a host without cgroups.
 */
export function cgroupArguments(uid: number, limits: CgroupLimits, mounts = hostMounts): string[] {
  const hierarchies = hierarchiesIn(mounts);
  const settings = (version: 1 | 2): string[] => {
    const controllers = hierarchies.filter((each) => each.version === version).flatMap((each) => each.controllers);
    const files = Object.entries(limitFiles[version](limits));
    return files
      .filter(([file]) => controllers.includes(file.split('.', 1)[0] ?? ''))
      .map(([file, value]) => `${file}=${value}`);
  };
  const [v1, v2] = [settings(1), settings(2)];
  const [version, chosen] = v1.length > v2.length ? (['1', v1] as const) : (['2', v2] as const);
  if (chosen.length === 0) return [];
  const args = ['--cgroup-version', version, '--parent-cgroup', parentGroup(uid)];
  return [...args, ...chosen.flatMap((setting) => ['--cgroup', setting])];
}

/** Removes a VM's groups, whose processes have ended. @throws Error of rmdir(2) for one that stays in use */
export async function removeCgroups(uid: number, mounts = hostMounts): Promise<void> {
  for (const { directory } of hierarchiesIn(mounts)) await removeTree(path.join(directory, parentGroup(uid)));
}

/** rmdir(2) is all there is to do to a group: its files are the kernel's. */
async function removeTree(directory: string): Promise<void> {
  for (const child of groupsIn(directory)) await removeTree(path.join(directory, child));
  for (let waited = 0; ; waited += removalIntervalMs) {
    try {
      rmdirSync(directory);
      return;
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code === 'ENOENT') return;
      if (code !== 'EBUSY' || waited >= removalLimitMs) throw error;
    }
    await delay(removalIntervalMs);
  }
}

function groupsIn(directory: string): string[] {
  try {
    const entries = readdirSync(directory, { withFileTypes: true });
    return entries.filter((entry) => entry.isDirectory()).map((entry) => entry.name);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
}

function hierarchiesIn(mounts: string): Hierarchy[] {
  const lines = readFileSync(mounts, 'utf8').split('\n');
  return lines.flatMap((line): Hierarchy[] => {
    const [, directory = '', type, options = ''] = line.split(' ');
    if (type === 'cgroup') return [{ version: 1, directory, controllers: options.split(',') }];
    if (type === 'cgroup2') return [{ version: 2, directory, controllers: controllersOf(directory) }];
    return [];
  });
}

function controllersOf(directory: string): string[] {
  try {
    return readFileSync(path.join(directory, 'cgroup.controllers'), 'utf8').trim().split(' ');
  } catch {
    return []; // It is not ours to see, so there is nothing to limit by it.
  }
}
