import { readFileSync } from 'node:fs';
import { z } from 'zod';

/** A ProcessIdentity as it is written down. */
export const identityRecord = z.object({
  pid: z.int().positive(),
  /** Clock ticks between the host's boot and the process's start. proc_pid_stat(5), field 22. */
  startTime: z.string(),
  /** Of the host's boot: start times begin anew with each. random(4). */
  bootId: z.string(),
});

/** A process that can be told from any other that has had the same pid, or will. */
export type ProcessIdentity = Readonly<z.infer<typeof identityRecord>>;

/** Flag of a process that has begun to end; set before its descriptors are closed. Linux include/linux/sched.h. */
const PF_EXITING = 0x4;

interface ProcessStat {
  readonly startTime: string;
  readonly ending: boolean;
  /** It has ended, and its parent has not taken notice. */
  readonly ended: boolean;
  /** As wait(2) has it; of one that has ended. */
  readonly waitStatus: number;
}

/** Undefined when there is no such process, or it has ended. */
export function identityOf(pid: number): ProcessIdentity | undefined {
  const stat = statOf(pid);
  return stat === undefined || stat.ended ? undefined : { pid, startTime: stat.startTime, bootId: bootId() };
}

/** False once the process has ended, also before its parent took notice. */
export function isAlive(identity: ProcessIdentity): boolean {
  return statOfSame(identity)?.ended === false;
}

/** How a process has ended, as the status of wait(2), while its parent has not taken notice; else undefined. */
export function waitStatusOf(identity: ProcessIdentity): number | undefined {
  const stat = statOfSame(identity);
  return stat?.ended ? stat.waitStatus : undefined;
}

/** Whether the process has ended, or is past the point where it closes its descriptors. */
export function isEnding(pid: number): boolean {
  const stat = statOf(pid);
  return stat === undefined || stat.ended || stat.ending;
}

let ownBootId: string | undefined;

/** It stays as it is for as long as we run. */
function bootId(): string {
  ownBootId ??= readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim();
  return ownBootId;
}

function statOfSame(identity: ProcessIdentity): ProcessStat | undefined {
  const stat = identity.bootId === bootId() ? statOf(identity.pid) : undefined;
  return stat?.startTime === identity.startTime ? stat : undefined;
}

/** proc_pid_stat(5). */
function statOf(pid: number): ProcessStat | undefined {
  let text: string;
  try {
    text = readFileSync(`/proc/${pid}/stat`, 'utf8');
  } catch {
    return undefined;
  }
  // The name may hold spaces and brackets; state, the third field, follows the last bracket.
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
  const field = (number: number): string => fields[number - 3] ?? '';
  return {
    startTime: field(22),
    ending: (Number(field(9)) & PF_EXITING) !== 0,
    ended: field(3) === 'Z' || field(3) === 'X',
    waitStatus: Number(field(52)),
  };
}
