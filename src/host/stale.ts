import { readdirSync, readFileSync } from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';

/**
 * Ends every process that was started for something under `directory`, whoever started it: a kilnd that was killed
 * leaves its VMs, backends and stand-ins running, and each of them has a path below its sandbox's directory among its
 * arguments. That needs no record on disk, so nothing can be out of date, and a pid that was used again is never hit.
 * Resolves with the pids when they are gone.
 */
export async function killProcessesOf(directory: string): Promise<readonly number[]> {
  const pids = processesOf(directory);
  for (const pid of pids) killIfAlive(pid);
  // They are not our children, so there is no event for their end; a killed process is gone within milliseconds.
  for (let tries = 0; tries < 500 && pids.some((pid) => processesOf(directory).includes(pid)); tries++) await delay(10);
  return pids;
}

function processesOf(directory: string): number[] {
  const prefix = `${directory}/`;
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => pid !== process.pid && argumentsOf(pid).some((argument) => argument.includes(prefix)));
}

function argumentsOf(pid: number): string[] {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0');
  } catch {
    return []; // It ended meanwhile.
  }
}

function killIfAlive(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}
