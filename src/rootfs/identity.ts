import { createHash } from 'node:crypto';
import type { BigIntStats } from 'node:fs';
import { lstat } from 'node:fs/promises';
import { KilnError } from '../errors.ts';
import { fileError } from './file-error.ts';

/** Changes whenever an image of the same sources would come out differently. */
const formatVersion = 1;

/**
 * What tells a directory from another one that is later made at the same path. Snapshotters number their directories,
 * so after a reset the same paths come back with other content.
 */
export interface DirectoryIdentity {
  readonly path: string;
  /** st_dev. May change with a reboot on filesystems without a device number of their own. */
  readonly dev: string;
  readonly ino: string;
  /** In nanoseconds; the time of the last status change where the filesystem records no birth. */
  readonly birthtimeNs: string;
}

/**
 * @param what names the directory's role in errors
 * @throws KilnError not-found, permission-denied, or invalid-argument when it is a symbolic link or no directory
 */
export async function identifyDirectory(path: string, what: string): Promise<DirectoryIdentity> {
  let stats: BigIntStats;
  try {
    stats = await lstat(path, { bigint: true });
  } catch (error) {
    throw fileError(error, `cannot read ${what} ${path}`);
  }
  if (!stats.isDirectory()) {
    const kind = stats.isSymbolicLink() ? 'is a symbolic link' : 'is not a directory';
    throw new KilnError('invalid-argument', `${what} ${path} ${kind}`);
  }
  const birthtimeNs = stats.birthtimeNs > 0n ? stats.birthtimeNs : stats.ctimeNs;
  return { path, dev: String(stats.dev), ino: String(stats.ino), birthtimeNs: String(birthtimeNs) };
}

/** True when the directory is still the one it was; false when it is gone or was made anew. */
export async function isStillThere(identity: DirectoryIdentity, compare: 'with-device' | 'without-device') {
  try {
    const now = await identifyDirectory(identity.path, 'the source');
    const sameDevice = compare === 'without-device' || now.dev === identity.dev;
    return sameDevice && now.ino === identity.ino && now.birthtimeNs === identity.birthtimeNs;
  } catch (error) {
    const { code } = KilnError.from(error);
    // Anything else (an unreadable disk, a network filesystem that hangs) does not say that it is gone.
    return code !== 'not-found' && code !== 'invalid-argument';
  }
}

/** The key of an image: equal for equal chains, so that containers of one image share it. */
export function chainKey(chain: readonly DirectoryIdentity[], userxattr: boolean): string {
  const facts = chain.map(({ path, dev, ino, birthtimeNs }) => [path, dev, ino, birthtimeNs]);
  return sha256({ formatVersion, userxattr, facts });
}

/** The key of a snapshot's writable layer. Without the device: a number that a reboot changed must not lose data. */
export function snapshotKey({ path, ino, birthtimeNs }: DirectoryIdentity): string {
  return sha256([path, ino, birthtimeNs]);
}

function sha256(value: unknown): string {
  return createHash('sha256').update(JSON.stringify(value)).digest('hex');
}
