/**
 * Paths of an image below the folder that it is unpacked to. What an image says is what an attacker says: its names may have
 * "..", and its symbolic links may point anywhere. Here a link means what it would mean in a container, whose root is that
 * folder, and no step leaves it. Nobody else changes the folder meanwhile, so that what was looked at is what is used.
 */
import { lstatSync, mkdirSync, readlinkSync, type Stats } from 'node:fs';
import { join } from 'node:path';
import { KilnError } from '../errors.ts';

/** As many links as Linux follows in one path (path_resolution(7)). */
const maxLinks = 40;

/** The parts of a name in an archive. @throws KilnError invalid-argument for one that climbs, or means nothing */
export function partsOf(name: string): string[] {
  const parts = name.split('/').filter((part) => part !== '' && part !== '.');
  if (parts.includes('..') || name.includes('\0')) {
    throw new KilnError(
      'invalid-argument',
      `the image has a file called ${JSON.stringify(name)}, which is no place in it`,
    );
  }
  return parts;
}

/** The file's attributes, of a link those of itself; undefined where there is none. */
export function lstatIfThere(path: string): Stats | undefined {
  return lstatSync(path, { throwIfNoEntry: false });
}

/** A file's real path, with all links followed; undefined where there is none, or no regular file. Nothing is made. */
export function fileIn(root: string, name: string): string | undefined {
  let parts = partsOf(name);
  for (let links = 0; links < maxLinks && parts.length > 0; links++) {
    const folder = walk(root, parts, () => undefined);
    const last = parts.at(-1);
    if (folder === undefined || last === undefined || last === '..') return undefined;
    const path = join(root, ...folder, last);
    const stat = lstatIfThere(path);
    if (!stat?.isSymbolicLink()) return stat?.isFile() ? path : undefined;
    const target = readlinkSync(path);
    parts = [...(target.startsWith('/') ? [] : folder), ...stepsOf(target)];
  }
  return undefined;
}

/**
 * The real folder of a name's last part, and that part. Folders on the way are made where they are missing.
 *
 * @param parts at least one
 * @returns the place, relative to the root, in parts: the last one is not followed
 * @throws KilnError invalid-argument for a way through something that is no folder, or through too many links
 */
export function placeOf(root: string, parts: readonly string[]): string[] {
  const folder = walk(root, parts, (path) => mkdirSync(path, { mode: 0o755 }));
  return [...(folder ?? []), parts.at(-1) ?? ''];
}

function stepsOf(target: string): string[] {
  return target.split('/').filter((step) => step !== '' && step !== '.');
}

/**
 * The real folder of the last part.
 *
 * @param onMissing makes a folder that is missing, or not
 * @returns undefined where one is missing
 */
function walk(root: string, parts: readonly string[], onMissing: (path: string) => void): string[] | undefined {
  const name = parts.join('/');
  const ahead = parts.slice(0, -1);
  const place: string[] = [];
  let links = 0;
  for (let part = ahead.shift(); part !== undefined; part = ahead.shift()) {
    if (part === '..') {
      place.pop();
      continue;
    }
    const path = join(root, ...place, part);
    if (lstatIfThere(path) === undefined) onMissing(path);
    const stat = lstatIfThere(path);
    if (stat === undefined) return undefined;
    if (stat.isSymbolicLink()) {
      links += 1;
      if (links > maxLinks) throw new KilnError('invalid-argument', `${name}: too many symbolic links in the image`);
      const target = readlinkSync(path);
      if (target.startsWith('/')) place.length = 0;
      ahead.unshift(...stepsOf(target));
      continue;
    }
    if (!stat.isDirectory()) throw new KilnError('invalid-argument', `${name}: ${part} is no folder of the image`);
    place.push(part);
  }
  return place;
}
