import { closeSync } from 'node:fs';
import { constants } from 'node:os';
import { setTimeout as delay } from 'node:timers/promises';
import type { HelperProcess, ProcessExit } from '../../host/helper-process.ts';
import { exitStatusOf, pidfdOpen } from '../../sys/pidfd.ts';

/** init reaps within a millisecond; in a container there may be none that does, and then nobody learns the status. */
const reapLimitMs = 200;
const reapIntervalMs = 2;

const unknown: ProcessExit = { code: null, signal: null };

/** The same process, which is not our child, with how it ended where the kernel tells (Linux 6.15). */
export function withExitStatus(helper: HelperProcess): HelperProcess {
  const pidfd = pidfdOpen(helper.pid);
  return pidfd === undefined ? helper : { ...helper, exited: helper.exited.then(() => statusOf(pidfd)) };
}

async function statusOf(pidfd: number): Promise<ProcessExit> {
  try {
    for (let waited = 0; waited < reapLimitMs; waited += reapIntervalMs) {
      const exit = exitStatusOf(pidfd);
      if (exit === undefined) return unknown;
      if (exit !== 'unreaped') {
        return exit.kind === 'exited' ? { code: exit.code, signal: null } : { code: null, signal: nameOf(exit.signal) };
      }
      await delay(reapIntervalMs);
    }
    return unknown;
  } finally {
    closeSync(pidfd);
  }
}

function nameOf(number: number): NodeJS.Signals | null {
  const [name] = Object.entries(constants.signals).find(([, each]) => each === number) ?? [];
  return (name as NodeJS.Signals | undefined) ?? null;
}
