import type * as agent from '../../gen/kiln/agent/v1/agent.ts';

/** What ps(1) shows of a process in the guest. All of it is the guest's word. */
export interface ProcessDetails {
  /** Of the guest, as `ppid`. */
  readonly pid: number;
  readonly ppid: number;
  readonly uid: number;
  readonly startedAt: Date;
  readonly cpuMs: number;
  /** As "pts/0"; empty for none. */
  readonly tty: string;
  readonly command: string;
}

/** ECMA-262, "Time Values and Time Range". */
const latestTimeMs = 8.64e15;
const maxTextChars = 4096;

export function toProcessDetails(details: agent.ProcessDetails): ProcessDetails {
  const { pid, ppid, uid, startedMs, cpuMs, tty, command } = details;
  return {
    ...{ pid, ppid, uid },
    startedAt: new Date(Math.min(Number(startedMs), latestTimeMs)),
    cpuMs: Number(cpuMs),
    tty: tty.slice(0, maxTextChars),
    command: command.slice(0, maxTextChars),
  };
}
