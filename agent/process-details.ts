/** What ps(1) shows of a process: proc_pid_stat(5), proc_pid_status(5), proc_pid_cmdline(5). Synchronous, as stats.ts. */
import { readFileSync } from 'node:fs';
import type { ProcessDetails } from '../gen/kiln/agent/v1/agent.ts';

/** USER_HZ of x86 and ARM: ticks in a second. */
const ticksPerSecond = 100;

const maxCommandBytes = 4096;

/** Major numbers of Unix98 terminals, devices.txt. */
const [firstPts, lastPts] = [136, 143];

/** Undefined for one that has just ended. */
export function processDetails(pid: number): ProcessDetails | undefined {
  try {
    return parseProcess(pid, {
      stat: readFileSync(`/proc/${pid}/stat`, 'utf8'),
      status: readFileSync(`/proc/${pid}/status`, 'utf8'),
      cmdline: readFileSync(`/proc/${pid}/cmdline`).subarray(0, maxCommandBytes).toString(),
      bootTimeMs: bootTimeMs(readFileSync('/proc/stat', 'utf8')),
    });
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ESRCH') return undefined;
    throw error;
  }
}

interface ProcessFiles {
  readonly stat: string;
  readonly status: string;
  readonly cmdline: string;
  readonly bootTimeMs: number;
}

export function parseProcess(pid: number, { stat, status, cmdline, bootTimeMs: boot }: ProcessFiles): ProcessDetails {
  // Its name may hold blanks and brackets.
  const nameEnd = stat.lastIndexOf(')');
  const name = stat.slice(stat.indexOf('(') + 1, nameEnd);
  // The third field is the first of these.
  const fields = stat
    .slice(nameEnd + 2)
    .trim()
    .split(' ')
    .map(Number);
  const field = (number: number) => fields[number - 3] ?? 0;
  const command = cmdline.replace(/\0+$/, '').replaceAll('\0', ' ');
  return {
    pid,
    ppid: field(4),
    uid: Number(/^Uid:\s+\d+\s+(\d+)/m.exec(status)?.[1] ?? 0),
    startedMs: BigInt(boot + toMs(field(22))),
    cpuMs: BigInt(toMs(field(14) + field(15))),
    tty: terminalName(field(7)),
    command: command === '' ? `[${name}]` : command,
  };
}

/** CLOCK_REALTIME of the boot. */
export function bootTimeMs(stat: string): number {
  return Number(/^btime (\d+)$/m.exec(stat)?.[1] ?? 0) * 1000;
}

function toMs(ticks: number): number {
  return Math.floor((ticks * 1000) / ticksPerSecond);
}

/** tty_nr: bits 31 to 20 and 7 to 0 are the minor number. */
function terminalName(number: number): string {
  if (number === 0) return '';
  const major = (number >> 8) & 0xfff;
  const minor = (number & 0xff) | ((number >> 12) & 0xfff00);
  if (major >= firstPts && major <= lastPts) return `pts/${(major - firstPts) * 256 + minor}`;
  return `${major}:${minor}`;
}
