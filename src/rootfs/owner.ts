import { readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';

/**
 * Names of temporary files carry who is writing them, so that what a crash left can be told from what another kilnd is
 * writing into the same folder right now: process id and start time, which together are never used twice.
 */
let ownTag: string | undefined;
let counter = 0;

/** A name part that is unique among all processes of the host: `<pid>-<start time>-<number>`. */
export function uniqueSuffix(): string {
  counter += 1;
  return `${ownerTag()}-${counter}`;
}

/** `<pid>-<start time>` of this process. */
export function ownerTag(): string {
  ownTag ??= `${process.pid}-${startTime(process.pid)}`;
  return ownTag;
}

/** Whether the process that made a name with `uniqueSuffix` or `ownerTag` has ended. */
export function ownerIsGone(suffix: string): boolean {
  const [pid, started] = suffix.split('-');
  return startTime(Number(pid)) !== started;
}

/** Field 22 of /proc/<pid>/stat (proc(5)), in clock ticks since boot; undefined when there is no such process. */
function startTime(pid: number): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    // The second field, the program's name in parentheses, may hold anything; fields are counted after its end.
    return stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19];
  } catch {
    return undefined;
  }
}

/** Removes what a kilnd left behind that was killed while it made a layer or a blank one. */
export function removeStaleParts(directory: string, names: readonly string[]): void {
  for (const name of names) {
    const suffix = /\.ext4\.(\d+-\d+)-\d+\.part$/.exec(name)?.[1];
    if (suffix !== undefined && ownerIsGone(suffix)) rmSync(join(directory, name), { force: true });
  }
}
