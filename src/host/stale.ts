import { readdirSync, readFileSync } from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';
import { sandboxVariable } from './helper-process.ts';
import { readLoggerRecords } from './logger-record.ts';
import { isAlive, type ProcessIdentity } from './process-identity.ts';

/** Ends of killed processes are looked for so often, and for so long. */
const checkIntervalMs = 10;
const checkLimitMs = 5_000;

/** What a logger gets to write down the rest after the end of its streams. Less than at a Delete: a launcher waits. */
const loggerGraceMs = 2_000;

/**
 * Ends every helper that was started for a sandbox whose directory is `directory`, or is below it: a kilnd that was killed leaves
 * its VMs, backends and stand-ins running. They are known by their environment, proc_pid_environ(5), so there is no
 * record on disk that could be out of date, a pid that was used again is never hit, and neither is somebody's
 * `tail -f` on a log in that directory.
 * Loggers are the exception: theirs is containerd's, so they have a record, with which the same holds. Each of their two
 * steps, the end of their streams and SIGTERM, gets `graceMs`.
 * Resolves with the pids when they are gone, or with those that the kernel still holds after some seconds.
 */
export async function killProcessesOf(directory: string, graceMs = loggerGraceMs): Promise<readonly number[]> {
  const loggers = readLoggerRecords(directory).filter(isAlive);
  const pids = helpersOf(directory);
  for (const pid of pids) signalIfAlive(pid, 'SIGKILL');
  await waitUntilGone(pids, (pid) => isHelperOf(pid, directory), checkLimitMs);
  // After the helpers, which hold the loggers' streams open: most loggers end with that, if no relay holds them, too.
  await endLoggers(loggers, graceMs);
  return [...pids, ...loggers.map(({ pid }) => pid)];
}

async function endLoggers(loggers: readonly ProcessIdentity[], graceMs: number): Promise<void> {
  const slow = await waitUntilGone(loggers, isAlive, graceMs);
  for (const { pid } of slow) signalIfAlive(pid, 'SIGTERM');
  const stubborn = await waitUntilGone(slow, isAlive, graceMs);
  // Each leads a process group, of a script's children too.
  for (const { pid } of stubborn) signalIfAlive(-pid, 'SIGKILL');
  await waitUntilGone(stubborn, isAlive, checkLimitMs);
}

/**
 * Resolves with those that are still there after `limitMs`. They are not our children, so there is no event for their
 * end; a killed process is gone within milliseconds.
 */
async function waitUntilGone<T>(processes: readonly T[], isThere: (one: T) => boolean, limitMs: number): Promise<T[]> {
  let left = processes.filter(isThere);
  for (let waited = 0; left.length > 0 && waited < limitMs; waited += checkIntervalMs) {
    await delay(checkIntervalMs);
    left = left.filter(isThere);
  }
  return left;
}

function helpersOf(directory: string): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => isHelperOf(pid, directory));
}

/** False for a process that has ended, also before its parent took notice: a zombie has no environment any more. */
function isHelperOf(pid: number, directory: string): boolean {
  const own = `${sandboxVariable}=${directory}`;
  return environmentOf(pid).some((variable) => variable === own || variable.startsWith(`${own}/`));
}

function environmentOf(pid: number): string[] {
  try {
    return readFileSync(`/proc/${pid}/environ`, 'utf8').split('\0');
  } catch {
    return []; // It ended meanwhile, or is the kernel's.
  }
}

function signalIfAlive(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}
