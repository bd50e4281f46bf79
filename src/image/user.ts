/** Who an image's User is: image-spec, config.md: `user`, `uid`, `user:group`, `uid:gid` and mixtures, by the image's own lists. */
import { closeSync, constants, fstatSync, openSync, readFileSync } from 'node:fs';
import { KilnError } from '../errors.ts';
import { SysError } from '../sys/error.ts';
import { openat2, RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS } from '../sys/openat2.ts';

export interface User {
  readonly uid: number;
  readonly gid: number;
  /** Of a user that is known by name. */
  readonly additionalGids: readonly number[];
}

/** A list of users that is longer is none. */
const maxListBytes = 4 * 1024 * 1024;

/** @throws KilnError invalid-argument for a name that the image's lists do not have */
export function userOf(root: string, text: string): User {
  const [name = '', group] = text.split(':');
  const users = linesOf(root, 'etc/passwd');
  const groups = linesOf(root, 'etc/group');
  const wanted = name === '' ? '0' : name;
  const found = users.find((fields) => fields[0] === wanted) ?? users.find((fields) => fields[2] === wanted);
  const uid = numberOf(found?.[2]) ?? numberOf(wanted);
  if (uid === undefined) throw unknown('user', wanted, 'etc/passwd');
  if (group !== undefined && group !== '') {
    const gid = numberOf(groups.find((fields) => fields[0] === group)?.[2]) ?? numberOf(group);
    if (gid === undefined) throw unknown('group', group, 'etc/group');
    return { uid, gid, additionalGids: [] };
  }
  const gid = numberOf(found?.[3]) ?? 0;
  const isMember = (fields: readonly string[]) => found?.[0] !== undefined && fields[3]?.split(',').includes(found[0]);
  const gids = groups.filter(isMember).flatMap((fields) => numberOf(fields[2]) ?? []);
  return { uid, gid, additionalGids: [...new Set(gids)] };
}

function unknown(what: string, name: string, list: string): KilnError {
  return new KilnError(
    'invalid-argument',
    `the image wants to run as the ${what} ${JSON.stringify(name)}, which its /${list} does not have`,
  );
}

function numberOf(text: string | undefined): number | undefined {
  return text !== undefined && /^\d{1,10}$/.test(text) && Number(text) < 2 ** 32 - 1 ? Number(text) : undefined;
}

function linesOf(root: string, list: string): string[][] {
  const fd = openList(root, list);
  if (fd === undefined) return [];
  try {
    const stats = fstatSync(fd);
    if (!stats.isFile() || stats.size > maxListBytes) return [];
    return readFileSync(fd, 'utf8')
      .split('\n')
      .map((line) => line.split(':'));
  } finally {
    closeSync(fd);
  }
}

/** Links lead where they would in a container. Undefined where there is none. */
function openList(root: string, list: string): number | undefined {
  const top = openSync(root, constants.O_DIRECTORY | constants.O_RDONLY);
  try {
    // O_NONBLOCK: it may be a FIFO.
    const flags = constants.O_RDONLY | constants.O_NONBLOCK;
    return openat2(top, Buffer.from(list), flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS);
  } catch (cause) {
    if (cause instanceof SysError && (cause.code === 'ENOENT' || cause.code === 'ENOTDIR')) return undefined;
    throw new KilnError('invalid-argument', `cannot read /${list} of the image: ${(cause as Error).message}`, {
      cause,
    });
  } finally {
    closeSync(top);
  }
}
