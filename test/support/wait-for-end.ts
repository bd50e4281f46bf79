import { readFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';

/**
 * Waits until a process that is not our child has ended: there is no event for that short of pidfd_open(2). A zombie has
 * ended; how soon its parent, often init, looks after it is nobody's business here.
 */
export async function waitForEnd(pid: number, timeout: number): Promise<void> {
  const deadline = performance.now() + timeout;
  while (signal(pid, 0) && !(await isZombie(pid))) {
    if (performance.now() > deadline) throw new Error(`process ${pid} does not end within ${timeout} ms`);
    await sleep(10);
  }
}

async function isZombie(pid: number): Promise<boolean> {
  const stat = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => '');
  return /^\d+ \(.*\) Z/s.test(stat);
}

/** False when there is no such process. */
export function signal(pid: number, name: NodeJS.Signals | 0): boolean {
  try {
    return process.kill(pid, name);
  } catch {
    return false;
  }
}
