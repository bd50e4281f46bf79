/** What processes cost: memory by smaps_rollup, CPU time by stat. Sources: proc_pid_smaps(5), proc_pid_stat(5), proc_meminfo(5). */
import { readdirSync, readFileSync } from 'node:fs';

export interface Memory {
  readonly rssMib: number;
  /** Proportional: a page that n processes share counts 1/n. */
  readonly pssMib: number;
  /** Pages that no other process has. What clones of a template share counts here while only one of them runs. */
  readonly privateMib: number;
}

export function memoryOf(pid: number): Memory {
  const text = readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8');
  const mebibytes = (name: string): number => Number(new RegExp(`^${name}: +(\\d+) kB`, 'm').exec(text)?.[1]) / 1024;
  const privateMib = mebibytes('Private_Clean') + mebibytes('Private_Dirty');
  return { rssMib: mebibytes('Rss'), pssMib: mebibytes('Pss'), privateMib };
}

/**
 * What a process has written, in MiB, to its private mappings of files with such a path: `Anonymous` in smaps. Undefined
 * when it has no such mapping.
 */
export function writtenTo(pid: number, filePath: RegExp): number | undefined {
  let kibibytes: number | undefined;
  let isMeant = false;
  for (const line of readFileSync(`/proc/${pid}/smaps`, 'utf8').split('\n')) {
    // A mapping's first line: address, permissions, offset, device, inode, path.
    const path = /^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)$/.exec(line)?.[1];
    if (path !== undefined) isMeant = filePath.test(path);
    else if (isMeant) kibibytes = (kibibytes ?? 0) + Number(/^Anonymous: +(\d+) kB/.exec(line)?.[1] ?? 0);
  }
  return kibibytes === undefined ? undefined : kibibytes / 1024;
}

/** Memory that the host could give to programs without swapping, in MiB. */
export function availableMib(): number {
  return Number(/^MemAvailable: +(\d+) kB/m.exec(readFileSync('/proc/meminfo', 'utf8'))?.[1]) / 1024;
}

/** CPU milliseconds so far: of the process, and of its children that have ended and were waited for. */
export function cpuOf(pid: number): { ownMs: number; childrenMs: number } {
  const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
  // The name may hold spaces and brackets; state, the third field, follows the last bracket.
  const fields = stat
    .slice(stat.lastIndexOf(')') + 2)
    .split(' ')
    .map(Number);
  // USER_HZ is 100 on every architecture that Kiln runs on.
  const ticks = (first: number): number => ((fields[first - 3] ?? 0) + (fields[first - 2] ?? 0)) * 10;
  return { ownMs: ticks(14), childrenMs: ticks(16) };
}

/**
 * CPU milliseconds of the process so far, to the nanosecond: of the threads that it has. Source: Linux,
 * Documentation/scheduler/sched-stats.rst.
 */
export function exactCpuOf(pid: number): number {
  const threads = readdirSync(`/proc/${pid}/task`);
  const ns = threads.map((thread) =>
    Number(readFileSync(`/proc/${pid}/task/${thread}/schedstat`, 'utf8').split(' ')[0]),
  );
  return ns.reduce((sum, each) => sum + each, 0) / 1e6;
}

/** Processes whose command line holds all of these texts. */
export function findProcesses(...texts: readonly string[]): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .filter((name) => {
      try {
        const commandLine = readFileSync(`/proc/${name}/cmdline`, 'utf8').replaceAll('\0', ' ');
        return texts.every((text) => commandLine.includes(text));
      } catch {
        return false;
      }
    })
    .map(Number);
}
