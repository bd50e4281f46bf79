import { closeSync } from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';
import type { HelperProcess, ProcessExit } from '../../host/helper-process.ts';
import { type ProcessIdentity, waitStatusOf } from '../../host/process-identity.ts';
import { exitOf, exitStatusOf, pidfdOpen } from '../../sys/pidfd.ts';
import { signalName } from '../../sys/process.ts';

/** Between the two looks lies the moment in which init takes the process away. */
const lookLimitMs = 50;
const lookIntervalMs = 1;

const unknown: ProcessExit = { code: null, signal: null };

/**
 * The same process, which is not our child, with how it ended: the kernel tells of one that init has not waited for yet,
 * and since Linux 6.15 also afterwards. In between nobody knows.
 */
export function withExitStatus(helper: HelperProcess): HelperProcess {
  const { pid, identity } = helper;
  const pidfd = pidfdOpen(pid);
  if (pidfd === undefined || identity === undefined) return helper;
  return { ...helper, exited: helper.exited.then(() => statusOf(pidfd, identity)) };
}

async function statusOf(pidfd: number, identity: ProcessIdentity): Promise<ProcessExit> {
  try {
    for (let waited = 0; waited < lookLimitMs; waited += lookIntervalMs) {
      const waitStatus = waitStatusOf(identity);
      const exit = waitStatus === undefined ? exitStatusOf(pidfd) : exitOf(waitStatus);
      if (exit === undefined) return unknown;
      if (exit !== 'unreaped') {
        return exit.kind === 'exited'
          ? { code: exit.code, signal: null }
          : { code: null, signal: signalName(exit.signal) ?? null };
      }
      await delay(lookIntervalMs);
    }
    return unknown;
  } finally {
    closeSync(pidfd);
  }
}
