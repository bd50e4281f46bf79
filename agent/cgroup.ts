/**
 * A container's control group, cgroups(7) version 2: the one list of its processes that none can leave.
 */
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

const mountPoint = '/sys/fs/cgroup';

/** The group that kilnd has all containers' groups made in: src/oci/guest-spec.ts. */
export const allContainers = join(mountPoint, 'kiln');

/**
 * The directory of the control group that a container's init is in; its line in /proc/<pid>/cgroup begins with `0::`.
 *
 * @returns undefined when that is our own group: then it says nothing about the container
 */
export function cgroupOf(pid: number): string | undefined {
  const [group, own] = [pid, 'self'].map((of) => readFileSync(`/proc/${of}/cgroup`, 'utf8').match(/^0::(.*)$/m)?.[1]);
  return group === undefined || group === own ? undefined : join(mountPoint, group);
}

/** The processes in a control group and those below it (a container may make more). None when it is gone. */
export function processesIn(cgroup: string): number[] {
  try {
    const own = readFileSync(join(cgroup, 'cgroup.procs'), 'utf8').split('\n').filter(Boolean).map(Number);
    const below = readdirSync(cgroup, { withFileTypes: true }).filter((entry) => entry.isDirectory());
    return [...own, ...below.flatMap((entry) => processesIn(join(cgroup, entry.name)))];
  } catch (error) {
    if (isGone(error)) return [];
    throw error;
  }
}

/** SIGKILL to every process in the group, none can fork past it (cgroup.kill, Linux 5.14). */
export function killAll(cgroup: string): void {
  try {
    // r+, so that nothing is created where no such group is.
    writeFileSync(join(cgroup, 'cgroup.kill'), '1', { flag: 'r+' });
  } catch (error) {
    if (!isGone(error)) throw error;
  }
}

/** Removed before (ENOENT) or between (ENODEV) opening and reading. */
function isGone(error: unknown): boolean {
  const { code } = error as NodeJS.ErrnoException;
  return code === 'ENOENT' || code === 'ENODEV';
}
