import {
  type BigIntStats,
  closeSync,
  constants,
  fstatSync,
  lstatSync,
  openSync,
  read as readCallback,
  readdirSync,
  readlinkSync,
} from 'node:fs';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { promisify } from 'node:util';
import { nextExtent } from '../sys/sparse.ts';
import { lgetxattr, llistxattr } from '../sys/xattr.ts';
import { Place } from './place.ts';
import { type BinaryString, FilesError, type Piece, shown, type TarEntry, type TarType } from './tar-entry.ts';
import { padding, sparseMap, tarEnd, tarHeader } from './tar-write.ts';

const read = promisify(readCallback);

/** How much is read of a file at a time. */
const chunkBytes = 128 * 1024;

/** How many files are looked at in one turn of the event loop: a large tree must not hold up what else there is to do. */
const looksPerTurn = 256;

/** stat(2). */
const S_IFMT = 0o170000n;
const types = new Map<bigint, TarType>([
  [0o100000n, 'file'],
  [0o120000n, 'symlink'],
  [0o040000n, 'directory'],
  [0o020000n, 'character'],
  [0o060000n, 'block'],
  [0o010000n, 'fifo'],
]);

export interface PackOptions {
  /** What an extended attribute is called in the stream; undefined leaves it out. */
  readonly xattr: (name: string) => string | undefined;
  /**
   * Files that have not changed since (ctime, in ns since the epoch) come without their content. Absent: all content comes.
   */
  readonly changedSinceNs?: bigint | undefined;
  /** Leaves files out, but not what is below a directory. */
  readonly include?: (stats: BigIntStats) => boolean;
}

/** What is to be packed: a file or directory by its name in a directory, or all that is in a directory. */
export interface PackSource {
  readonly place: Place;
  /** Absent for the directory itself. */
  readonly name?: BinaryString;
  /** What it is called in the stream. */
  readonly as: BinaryString;
  /** Only what is in the directory comes. */
  readonly withoutTop?: boolean;
}

/**
 * Files as a tar stream, each directory before what is in it, the whole tree on one filesystem or not. No link is
 * followed, whatever somebody changes meanwhile. Sockets are left out: they mean nothing elsewhere.
 *
 * @throws FilesError, SysError; what disappears meanwhile is left out, what grows or shrinks is an error
 */
export async function* packFiles(source: PackSource, options: PackOptions): AsyncGenerator<Buffer> {
  const packer = new Packer(options);
  const { place, name, as, withoutTop = false } = source;
  const path = name === undefined ? Buffer.from(`/proc/self/fd/${place.fd}/.`) : place.at(name);
  const stats = lstatSync(path, { bigint: true });
  if (!withoutTop) yield* packer.one(path, as, stats);
  if (stats.isDirectory()) {
    using top = name === undefined ? undefined : Place.open(place.fd, name, 'beneath');
    yield* packer.below(top ?? place, as);
  }
  yield tarEnd;
}

class Packer {
  readonly #options: PackOptions;
  /** The paths of files that have several names, by inode. */
  readonly #linked = new Map<string, BinaryString>();

  constructor(options: PackOptions) {
    this.#options = options;
  }

  /** All that is in a directory; one of them is open at a time. */
  async *below(top: Place, as: BinaryString): AsyncGenerator<Buffer> {
    let looked = 0;
    const waiting: BinaryString[] = [''];
    for (let directory = waiting.pop(); directory !== undefined; directory = waiting.pop()) {
      using place = Place.openIfThere(top.fd, directory, 'beneath');
      if (place === undefined) continue;
      const children: BinaryString[] = [];
      for (const name of readdirSync(`/proc/self/fd/${place.fd}`, 'latin1').sort()) {
        looked += 1;
        if (looked % looksPerTurn === 0) await nextTurn();
        const stats = lstatSync(place.at(name), { bigint: true, throwIfNoEntry: false });
        if (stats === undefined || stats.isSocket()) continue;
        const path = directory === '' ? name : `${directory}/${name}`;
        yield* this.one(place.at(name), `${as}/${path}`, stats);
        if (stats.isDirectory()) children.push(path);
      }
      waiting.push(...children.reverse());
    }
  }

  async *one(file: Buffer, path: BinaryString, stats: BigIntStats): AsyncGenerator<Buffer> {
    const { include, changedSinceNs, xattr } = this.#options;
    if (include !== undefined && !include(stats)) return;
    const type = types.get(stats.mode & S_IFMT);
    if (type === undefined) return;
    const key = `${stats.dev}:${stats.ino}`;
    const first = this.#linked.get(key);
    const isLink = first !== undefined && type !== 'directory';
    if (stats.nlink > 1n && type !== 'directory' && first === undefined) this.#linked.set(key, path);
    const rdev = stats.rdev;
    const entry: TarEntry = {
      path,
      type: isLink ? 'link' : type,
      mode: Number(stats.mode & 0o7777n),
      uid: Number(stats.uid),
      gid: Number(stats.gid),
      mtimeNs: stats.mtimeNs,
      size: type === 'file' && !isLink ? Number(stats.size) : 0,
      target: isLink ? first : type === 'symlink' ? readlinkSync(file, 'latin1') : '',
      // glibc's gnu_dev_major and gnu_dev_minor.
      major: Number(((rdev >> 8n) & 0xfffn) | ((rdev >> 32n) & 0xfffff000n)),
      minor: Number((rdev & 0xffn) | ((rdev >> 12n) & 0xffffff00n)),
      xattrs: isLink ? new Map() : xattrsOf(file, xattr),
      unchanged: type === 'file' && !isLink && changedSinceNs !== undefined && stats.ctimeNs < changedSinceNs,
    };
    if (entry.type === 'file' && !entry.unchanged) yield* content(file, entry, stats);
    else yield tarHeader(entry);
  }
}

async function* content(file: Buffer, entry: TarEntry, stats: BigIntStats): AsyncGenerator<Buffer> {
  // O_NONBLOCK: by now it may be a FIFO.
  const fd = openSync(file, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  try {
    const now = fstatSync(fd, { bigint: true });
    if (now.ino !== stats.ino || !now.isFile())
      throw new FilesError('failed-precondition', `${shown(entry.path)} was replaced while it was read`);
    const isSparse = stats.blocks * 512n < stats.size;
    const pieces = isSparse ? piecesOf(fd, entry.size) : undefined;
    yield tarHeader(entry, pieces);
    if (pieces !== undefined) yield sparseMap(pieces);
    let total = 0;
    for (const { offset, length } of pieces ?? [{ offset: 0, length: entry.size }]) {
      for (let at = 0; at < length; ) {
        const buffer = Buffer.allocUnsafe(Math.min(chunkBytes, length - at));
        const { bytesRead } = await read(fd, buffer, 0, buffer.length, offset + at);
        if (bytesRead === 0)
          throw new FilesError('failed-precondition', `${shown(entry.path)} became shorter while it was read`);
        yield buffer.subarray(0, bytesRead);
        at += bytesRead;
      }
      total += length;
    }
    yield padding(total);
  } finally {
    closeSync(fd);
  }
}

function piecesOf(fd: number, size: number): Piece[] {
  const pieces: Piece[] = [];
  for (let from = 0; from < size; ) {
    const extent = nextExtent(fd, from);
    if (extent === undefined || extent.start >= size) break;
    const end = Math.min(extent.end, size);
    pieces.push({ offset: extent.start, length: end - extent.start });
    from = end;
  }
  return pieces;
}

function xattrsOf(file: Buffer, nameOf: PackOptions['xattr']): Map<string, Buffer> {
  const xattrs = new Map<string, Buffer>();
  for (const name of llistxattr(file)) {
    const as = nameOf(name);
    const value = as === undefined ? undefined : lgetxattr(file, name);
    if (as !== undefined && value !== undefined) xattrs.set(as, value);
  }
  return xattrs;
}
