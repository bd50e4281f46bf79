/**
 * Which process is the logger of a container, on disk.
 *
 * A logger's environment is containerd's contract, so it cannot carry the variable by which other helpers are known
 * again (helper-process.ts). Its pid, start time and boot are written down instead, in the private directory of the
 * container or exec, which nobody but root may write.
 */
import { readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { identityOf, type ProcessIdentity } from './process-identity.ts';

const recordName = 'logger.json';

/** Writes down that this process works for this directory. Does nothing when it has ended already. */
export function writeLoggerRecord(directory: string, pid: number): void {
  const identity = identityOf(pid);
  if (identity === undefined) return;
  writeFileSync(path.join(directory, recordName), JSON.stringify(identity), { mode: 0o600 });
}

export function removeLoggerRecord(directory: string): void {
  rmSync(path.join(directory, recordName), { force: true });
}

/** The logger of this very directory; undefined without one. */
export function readLoggerRecord(directory: string): ProcessIdentity | undefined {
  return parseRecord(path.join(directory, recordName));
}

/** The loggers of all directories below this one, running or not. */
export function readLoggerRecords(directory: string): ProcessIdentity[] {
  return listFiles(directory)
    .filter((file) => path.basename(file) === recordName)
    .flatMap((file) => parseRecord(file) ?? []);
}

/** All files in a directory and below; none if it is not there. */
export function listFiles(directory: string): string[] {
  try {
    return readdirSync(directory, { recursive: true, encoding: 'utf8' }).map((name) => path.join(directory, name));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
}

/** Undefined for no record, or one that a killed kilnd left half written: no signal is sent on a guess. */
function parseRecord(file: string): ProcessIdentity | undefined {
  try {
    const { pid, startTime, bootId } = JSON.parse(readFileSync(file, 'utf8')) as Partial<ProcessIdentity>;
    if (!Number.isSafeInteger(pid) || pid === undefined || pid <= 1) return undefined;
    return typeof startTime === 'string' && typeof bootId === 'string' ? { pid, startTime, bootId } : undefined;
  } catch {
    return undefined;
  }
}
