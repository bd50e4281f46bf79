/** The host's hierarchies of control groups: cgroups(7), admin-guide/cgroup-v1 and cgroup-v2.rst of Linux. */
import { readdirSync, readFileSync, rmdirSync } from 'node:fs';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';

/** Where the host has its hierarchies: proc(5), /proc/mounts. */
export const hostMounts = '/proc/mounts';

export interface Hierarchy {
  readonly version: 1 | 2;
  /** Where it is mounted. */
  readonly directory: string;
  /** Of version 1 also the hierarchy's name, as "name=systemd". */
  readonly controllers: readonly string[];
}

export interface GroupLimits {
  readonly memoryBytes: number;
  /** Processes and threads. */
  readonly pids: number;
}

/** The files by which each version limits what we limit. cgroups(7), "memory" and "pids"; admin-guide/cgroup-v2.rst. */
export const limitFiles: Readonly<Record<1 | 2, (limits: GroupLimits) => Readonly<Record<string, number>>>> = {
  1: ({ memoryBytes, pids }) => ({ 'memory.limit_in_bytes': memoryBytes, 'pids.max': pids }),
  2: ({ memoryBytes, pids }) => ({ 'memory.max': memoryBytes, 'pids.max': pids }),
};

/** A removed group may still hold the kernel's own threads for its VM, for so long at most, and is tried so often. */
export const removalLimitMs = 2_000;
const removalIntervalMs = 10;

/** The hierarchies that are mounted, each with its controllers. */
export function hierarchiesIn(mounts: string): Hierarchy[] {
  const lines = readFileSync(mounts, 'utf8').split('\n');
  return lines.flatMap((line): Hierarchy[] => {
    const [, directory = '', type, options = ''] = line.split(' ');
    if (type === 'cgroup') return [{ version: 1, directory, controllers: options.split(',') }];
    if (type === 'cgroup2') return [{ version: 2, directory, controllers: wordsOf(directory, 'cgroup.controllers') }];
    return [];
  });
}

/** The words of a group's file; none where it is not ours to see, so that nothing can be done by it. */
export function wordsOf(directory: string, file: string): string[] {
  try {
    return readFileSync(path.join(directory, file), 'utf8').split(/\s+/).filter(Boolean);
  } catch {
    return [];
  }
}

/**
 * Removes a group with those below it, whose processes have ended or are about to. rmdir(2) is all there is to do: its
 * files are the kernel's. One that is gone is no error.
 *
 * @throws Error of rmdir(2) for one that is in use after `limitMs`
 */
export async function removeGroup(directory: string, limitMs = removalLimitMs): Promise<void> {
  if (isRemoved(directory, Number.POSITIVE_INFINITY)) return;
  for (const child of groupsIn(directory)) await removeGroup(path.join(directory, child), limitMs);
  for (let waited = 0; !isRemoved(directory, limitMs - waited); waited += removalIntervalMs) {
    await delay(removalIntervalMs);
  }
}

/** False for a group that has others below it, or is in use. @throws Error of rmdir(2); EBUSY when no time is left */
function isRemoved(directory: string, leftMs: number): boolean {
  try {
    rmdirSync(directory);
    return true;
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT') return true;
    // ENOTEMPTY is what other filesystems say of a directory that has some.
    if ((code !== 'EBUSY' && code !== 'ENOTEMPTY') || leftMs <= 0) throw error;
    return false;
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
