import { readdirSync, readFileSync } from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';
import { sandboxVariable } from './helper-process.ts';

/** Ends of killed processes are looked for so often, and for so long. */
const checkIntervalMs = 10;
const checkLimitMs = 5_000;

/**
 * Ends every helper that was started for a sandbox whose directory is below `directory`: a kilnd that was killed leaves
 * its VMs, backends and stand-ins running. They are known by their environment, proc_pid_environ(5), so there is no
 * record on disk that could be out of date, a pid that was used again is never hit, and neither is somebody's
 * `tail -f` on a log in that directory.
 * Resolves with the pids when they are gone, or with those that the kernel still holds after some seconds.
 */
export async function killProcessesOf(directory: string): Promise<readonly number[]> {
  const pids = helpersOf(directory);
  for (const pid of pids) killIfAlive(pid);
  // They are not our children, so there is no event for their end; a killed process is gone within milliseconds.
  let left = pids;
  for (let waited = 0; left.length > 0 && waited < checkLimitMs; waited += checkIntervalMs) {
    await delay(checkIntervalMs);
    left = left.filter((pid) => isHelperOf(pid, directory));
  }
  return pids;
}

function helpersOf(directory: string): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => isHelperOf(pid, directory));
}

/** False for a process that has ended, also before its parent took notice: a zombie has no environment any more. */
function isHelperOf(pid: number, directory: string): boolean {
  const prefix = `${sandboxVariable}=${directory}/`;
  return environmentOf(pid).some((variable) => variable.startsWith(prefix));
}

function environmentOf(pid: number): string[] {
  try {
    return readFileSync(`/proc/${pid}/environ`, 'utf8').split('\0');
  } catch {
    return []; // It ended meanwhile, or is the kernel's.
  }
}

function killIfAlive(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}
