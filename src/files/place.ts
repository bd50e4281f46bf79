import { closeSync, constants, lstatSync, mkdirSync, readlinkSync } from 'node:fs';
import { SysError } from '../sys/error.ts';
import {
  openat2,
  RESOLVE_BENEATH,
  RESOLVE_IN_ROOT,
  RESOLVE_NO_MAGICLINKS,
  RESOLVE_NO_SYMLINKS,
} from '../sys/openat2.ts';
import { type BinaryString, FilesError, shown } from './tar-entry.ts';

/**
 * How a path is walked. "beneath": no symbolic link is followed, and nothing leads out. "in-root": links are followed as a
 * process would whose root the directory is. Both hold while somebody changes the directories on the way; openat2(2).
 */
export type Walk = 'beneath' | 'in-root';

const rules: Readonly<Record<Walk, number>> = {
  beneath: RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS,
  'in-root': RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
};

/** As many links as Linux follows in one path (path_resolution(7)). */
const maxLinks = 40;

/** A directory that is held open, so that it stays the same whatever becomes of its name. */
export class Place implements Disposable {
  readonly fd: number;

  constructor(fd: number) {
    this.fd = fd;
  }

  /** The directory that a path below another one names; "" is that one itself. @throws SysError */
  static open(rootFd: number, path: BinaryString, walk: Walk): Place {
    const flags = constants.O_DIRECTORY | constants.O_RDONLY;
    return new Place(openat2(rootFd, Buffer.from(path === '' ? '.' : path, 'latin1'), flags, rules[walk]));
  }

  /** The same; undefined where there is none, or something else by now. @throws SysError */
  static openIfThere(rootFd: number, path: BinaryString, walk: Walk): Place | undefined {
    try {
      return Place.open(rootFd, path, walk);
    } catch (error) {
      if (error instanceof SysError && (error.code === 'ENOENT' || error.code === 'ENOTDIR')) return undefined;
      throw error;
    }
  }

  /**
   * The same, as `mkdir -p` makes it where it is missing; also what a symbolic link leads to.
   *
   * @param links how many such links may lead to others
   * @throws FilesError invalid-argument for more of them, SysError and Node's for what the filesystem refuses
   */
  static make(rootFd: number, path: BinaryString, walk: Walk, links = maxLinks): Place {
    const there = Place.openIfThere(rootFd, path, walk);
    if (there !== undefined) return there;
    const [, directory = '', name = ''] = /^(.*?)([^/]*)$/s.exec(path) ?? [];
    using above = Place.make(rootFd, directory.replace(/(?<!^)\/+$/, ''), walk, links);
    const file = above.at(name);
    const stats = lstatSync(file, { throwIfNoEntry: false });
    if (stats?.isSymbolicLink()) {
      if (links === 0) throw new FilesError('invalid-argument', `${shown(path)} has too many symbolic links`);
      const target = readlinkSync(file, 'latin1').replace(/(?<!^)\/+$/, '');
      Place.make(rootFd, target.startsWith('/') ? target : `${directory}${target}`, walk, links - 1)[Symbol.dispose]();
    } else if (stats === undefined) mkdirSync(file, { mode: 0o755 });
    return Place.open(rootFd, path, walk);
  }

  /** The path by which the kernel finds a name in this directory, and only there. */
  at(name: BinaryString): Buffer {
    return Buffer.from(`/proc/self/fd/${this.fd}/${name}`, 'latin1');
  }

  [Symbol.dispose](): void {
    closeSync(this.fd);
  }
}

/**
 * Directory and name of a path in a stream, which may begin with "./".
 *
 * @returns the empty name for the top itself
 * @throws FilesError invalid-argument for an absolute path, and for one with ".." or nothing between two slashes
 */
export function splitPath(path: BinaryString): { readonly directory: BinaryString; readonly name: BinaryString } {
  const plain = path.replace(/^(\.\/+)+/, '');
  if (plain === '.' || plain === '') return { directory: '', name: '' };
  const parts = plain.split('/');
  if (parts.some((part) => part === '' || part === '.' || part === '..' || part.includes('\0'))) {
    throw new FilesError('invalid-argument', `the tar stream names ${shown(path)}, which may lead elsewhere`);
  }
  const name = parts.pop() ?? '';
  if (name.length > 255)
    throw new FilesError('invalid-argument', `the tar stream names ${shown(path)}, which is too long`);
  return { directory: parts.join('/'), name };
}
