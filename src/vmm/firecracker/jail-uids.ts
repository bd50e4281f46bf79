/*
 * A user id of its own for each jailed VM of the host. A claim on one is a symbolic link, named as the id, to the VM's
 * directory: link and owner are made in one step that fails for all but the first (symlink(2)), it outlives kilnd, holds
 * between the kilnds of several state folders, and goes with a reboot as the VMs do. So there is nothing else to write
 * down, and nothing that could be out of date.
 */
import { createHash } from 'node:crypto';
import { mkdirSync, readdirSync, readlinkSync, rmSync, symlinkSync } from 'node:fs';
import path from 'node:path';
import { KilnError } from '../../errors.ts';

/** The ids from `first` on, so many. The group ids are the same. */
export interface UidRange {
  readonly first: number;
  readonly count: number;
}

/** One for the whole host, whatever the state folder. */
export const hostClaims = '/run/kiln-jails';

/**
 * Claims a free id: the one that the directory's name gives by its hash, or else the next one.
 *
 * @throws KilnError resource-exhausted when every id has been claimed
 */
export function claimUid({ first, count }: UidRange, directory: string, claims: string): number {
  mkdirSync(claims, { recursive: true, mode: 0o700 });
  const start = createHash('sha256').update(directory).digest().readUInt32BE();
  for (let tried = 0; tried < count; tried += 1) {
    const uid = first + ((start + tried) % count);
    if (claimed(path.join(claims, String(uid)), directory)) return uid;
  }
  const range = `${first} to ${first + count - 1}`;
  throw new KilnError('resource-exhausted', `every user id for jailed VMs is in use: ${range}`, {
    hint: `raise vm.jail_uids in the config file; ${claims} shows what has which`,
  });
}

function claimed(link: string, directory: string): boolean {
  try {
    symlinkSync(directory, link);
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') return false;
    throw error;
  }
}

/** The ids that were claimed for a directory; more than one only after a failure. */
export function uidsOf(directory: string, claims: string): number[] {
  return namesIn(claims)
    .filter((name) => targetOf(path.join(claims, name)) === directory)
    .map(Number);
}

/** For when nothing runs under the id any more. */
export function releaseUid(uid: number, claims: string): void {
  rmSync(path.join(claims, String(uid)), { force: true });
}

function namesIn(claims: string): string[] {
  try {
    return readdirSync(claims).filter((name) => /^\d+$/.test(name));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
}

function targetOf(link: string): string | undefined {
  try {
    return readlinkSync(link);
  } catch {
    return undefined; // It was released meanwhile.
  }
}
