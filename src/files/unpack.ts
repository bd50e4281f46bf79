import {
  chmodSync,
  chownSync,
  closeSync,
  constants,
  fstatSync,
  lchownSync,
  linkSync,
  lstatSync,
  mkdirSync,
  openSync,
  rmSync,
  symlinkSync,
  unlinkSync,
} from 'node:fs';
import { open } from 'node:fs/promises';
import { SysError } from '../sys/error.ts';
import { setFileTimes } from '../sys/file-times.ts';
import { makeNode, S_IFBLK, S_IFCHR, S_IFIFO } from '../sys/mknod.ts';
import { O_PATH } from '../sys/openat2.ts';
import { lsetxattr } from '../sys/xattr.ts';
import { Place, splitPath, type Walk } from './place.ts';
import { type BinaryString, FilesError, shown, type TarEntry } from './tar-entry.ts';
import { type ReadOptions, readTar, type TarFile } from './tar-read.ts';

/** Marks that are files by their names, as images have them. */
export interface NamedMarks {
  /** Does what a file's name asks for in its directory. @returns false for one that is no mark, and is to be made */
  obey(directory: Place, name: BinaryString): boolean;
  /** Told of each file that is made. */
  made(directory: Place, name: BinaryString): void;
}

export interface UnpackOptions {
  /** How directories on the way to a file are found. */
  readonly walk: Walk;
  /**
   * What happens to a file whose name is taken. "refuse": nothing may be there. "same-kind": a directory stays, any other
   * file is replaced, but not the one by the other. "replace": whatever is there makes room.
   */
  readonly taken: 'refuse' | 'same-kind' | 'replace';
  /**
   * overlayfs's marks, which are the character device 0 for a file that is gone, and an extended attribute for a directory
   * that hides what is below it. "keep": made as they are. "obey": what they say is done. "refuse": they are devices like any.
   */
  readonly marks: 'keep' | 'obey' | 'refuse';
  readonly namedMarks?: NamedMarks;
  /** What becomes of devices, marks aside: it matters to whoever may open them where they are made. */
  readonly devices: 'make' | 'leave-out';
  /** Under which name an extended attribute is set; undefined leaves it out. */
  readonly xattr: (name: string, value: Buffer, path: BinaryString) => string | undefined;
  /** Told of an extended attribute that the filesystem cannot keep. Absent: that is an error. */
  readonly unkept?: (name: string, path: BinaryString) => void;
  /** The most bytes of content, and the most files; absent: as many as there is room for. */
  readonly limits?: { readonly bytes: number; readonly files: number };
  /** Makes directories on the way to a file that the stream does not have; absent: they must be there. */
  readonly makesParents?: boolean;
  /** Absent: required. */
  readonly end?: ReadOptions['end'];
  /** What a path of the stream is called where it is made, also as what a hard link names. */
  readonly rename?: ((path: BinaryString) => BinaryString) | undefined;
  /** The bits of a mode that count; absent: all. */
  readonly modeMask?: number | undefined;
  /** Whose the files become; absent: whose the stream says. */
  readonly owner?: { readonly uid: number; readonly gid: number } | undefined;
  /** Where a file that has not changed since the last time is found, by the same path. Absent: there must be none. */
  readonly previous?: Place | undefined;
}

/** What was left out of what the stream has. */
export interface Unpacked {
  readonly files: number;
  readonly bytes: number;
  /** Paths of devices, which nobody makes for a stream. At most a few; `leftOutCount` is their number. */
  readonly leftOut: readonly BinaryString[];
  readonly leftOutCount: number;
}

const namedLeftOut = 10;

/** For a message. */
export function describeLeftOut({ leftOut, leftOutCount }: Unpacked): string {
  const names = leftOut.map(shown).join(', ');
  return leftOutCount > leftOut.length ? `${names} and ${leftOutCount - leftOut.length} more` : names;
}

/** overlayfs's mark of a directory that hides what is below it. */
export const opaqueXattr = 'trusted.overlay.opaque';

/**
 * Makes the files of a tar stream below a directory. Each way is walked by the kernel under rules that no link and no
 * change meanwhile gets around (see Walk), and the last step of each never follows a link. What the stream says is not trusted.
 *
 * @throws FilesError for what the stream must not say, SysError and Node's for what the filesystem refuses; what was made
 *   by then stays
 */
export async function unpackFiles(
  source: AsyncIterable<Buffer>,
  top: Place,
  options: UnpackOptions,
): Promise<Unpacked> {
  using unpacker = new Unpacker(top, options);
  for await (const file of readTar(source, { end: options.end ?? 'required' })) await unpacker.make(file);
  return unpacker.finish();
}

class Unpacker implements Disposable {
  readonly #top: Place;
  readonly #options: UnpackOptions;
  /** The directory of the file before. */
  #last: { readonly path: BinaryString; readonly place: Place } | undefined;
  /** Directories get their times when all that is in them is made. */
  readonly #times: { readonly path: BinaryString; readonly mtimeNs: bigint }[] = [];
  #files = 0;
  #bytes = 0;
  readonly #leftOut: BinaryString[] = [];
  #leftOutCount = 0;

  constructor(top: Place, options: UnpackOptions) {
    this.#top = top;
    this.#options = options;
  }

  async make({ entry: given, content }: TarFile): Promise<void> {
    const { files: most = Infinity } = this.#options.limits ?? {};
    const entry = this.#renamed(given);
    this.#files += 1;
    if (this.#files > most) throw new FilesError('resource-exhausted', `the tar stream has more than ${most} files`);
    const { directory, name } = splitPath(entry.path);
    if (name === '') {
      if (entry.type !== 'directory')
        throw new FilesError('invalid-argument', 'the tar stream has a file in place of the top directory');
      this.#attributes(Buffer.from(`/proc/self/fd/${this.#top.fd}/.`), entry);
      return;
    }
    const place = this.#directory(directory);
    const { namedMarks } = this.#options;
    if (namedMarks?.obey(place, name)) return;
    await this.#makeFile(place.at(name), entry, content);
    namedMarks?.made(place, name);
  }

  async #makeFile(file: Buffer, entry: TarEntry, content: TarFile['content']): Promise<void> {
    switch (entry.type) {
      case 'directory':
        return this.#makeDirectory(file, entry);
      case 'file':
        return this.#makeRegular(file, entry, content);
      case 'symlink':
        this.#makeRoom(file, entry);
        symlinkSync(Buffer.from(entry.target, 'latin1'), file);
        this.#attributes(file, entry);
        return;
      case 'link':
        return this.#makeLink(file, entry);
      case 'fifo':
        this.#makeRoom(file, entry);
        makeNode(file, S_IFIFO | 0o600);
        this.#attributes(file, entry);
        return;
      default:
        return this.#makeDevice(file, entry);
    }
  }

  #renamed(entry: TarEntry): TarEntry {
    const { rename } = this.#options;
    if (rename === undefined) return entry;
    const target = entry.type === 'link' ? rename(entry.target) : entry.target;
    return { ...entry, path: rename(entry.path), target };
  }

  finish(): Unpacked {
    for (const { path, mtimeNs } of this.#times.reverse()) {
      const { directory, name } = splitPath(path);
      // What came later may have removed it, or be in its place.
      using place = Place.openIfThere(this.#top.fd, directory, this.#options.walk);
      const file = place?.at(name === '' ? '.' : name);
      if (file !== undefined && lstatSync(file, { throwIfNoEntry: false })?.isDirectory()) setFileTimes(file, mtimeNs);
    }
    return { files: this.#files, bytes: this.#bytes, leftOut: this.#leftOut, leftOutCount: this.#leftOutCount };
  }

  #makeDirectory(file: Buffer, entry: TarEntry): void {
    const { marks } = this.#options;
    if (marks === 'obey' && entry.xattrs.get(opaqueXattr)?.toString() === 'y')
      rmSync(file, { recursive: true, force: true });
    if (!this.#makeRoom(file, entry)) mkdirSync(file, { mode: 0o700 });
    this.#attributes(file, entry);
  }

  async #makeRegular(file: Buffer, entry: TarEntry, content: TarFile['content']): Promise<void> {
    this.#makeRoom(file, entry);
    if (entry.unchanged) return this.#makeUnchanged(file, entry);
    const flags = constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW;
    await using handle = await open(file, flags, 0o600);
    for await (const { offset, data } of content) {
      this.#bytes += data.length;
      const { bytes = Infinity } = this.#options.limits ?? {};
      if (this.#bytes > bytes)
        throw new FilesError('resource-exhausted', `the tar stream has more than ${bytes} bytes of content`);
      await writeAll(handle, data, offset);
    }
    // Holes at the end.
    await handle.truncate(entry.size);
    this.#attributes(file, entry);
  }

  /** The file that was made the last time gets one more name. */
  #makeUnchanged(file: Buffer, { path, size }: TarEntry): void {
    const missing = () =>
      new FilesError(
        'failed-precondition',
        `the tar stream says that ${shown(path)} has not changed, but it is not as it says`,
      );
    const { previous } = this.#options;
    if (previous === undefined) throw missing();
    const { directory, name } = splitPath(path);
    using place = Place.openIfThere(previous.fd, directory, 'beneath');
    if (place === undefined) throw missing();
    const stats = lstatSync(place.at(name), { bigint: true, throwIfNoEntry: false });
    if (stats === undefined || !stats.isFile() || stats.size !== BigInt(size)) throw missing();
    linkSync(place.at(name), file);
  }

  #makeLink(file: Buffer, entry: TarEntry): void {
    const { directory, name } = splitPath(entry.target);
    if (name === '')
      throw new FilesError('invalid-argument', `the tar stream links ${shown(entry.path)} to a directory`);
    // Not #directory, which the file's own place may have to stay open in.
    using place = Place.open(this.#top.fd, directory, this.#options.walk);
    const stats = lstatSync(place.at(name));
    if (stats.isDirectory())
      throw new FilesError('invalid-argument', `the tar stream links ${shown(entry.path)} to a directory`);
    this.#makeRoom(file, entry);
    // link(2) follows no link at the end.
    linkSync(place.at(name), file);
  }

  #makeDevice(file: Buffer, entry: TarEntry): void {
    const { marks } = this.#options;
    if (entry.type === 'character' && entry.major === 0 && entry.minor === 0 && marks !== 'refuse') {
      if (marks === 'obey') {
        rmSync(file, { recursive: true, force: true });
        return;
      }
      this.#makeRoom(file, entry);
      makeNode(file, S_IFCHR);
      setFileTimes(file, entry.mtimeNs);
      return;
    }
    if (this.#options.devices === 'make') {
      this.#makeRoom(file, entry);
      makeNode(file, (entry.type === 'character' ? S_IFCHR : S_IFBLK) | 0o600, deviceNumber(entry));
      this.#attributes(file, entry);
      return;
    }
    this.#leftOutCount += 1;
    if (this.#leftOut.length < namedLeftOut) this.#leftOut.push(entry.path);
  }

  /** @returns true when a directory is there already, and is to stay */
  #makeRoom(file: Buffer, { path, type }: TarEntry): boolean {
    const { taken } = this.#options;
    const stats = lstatSync(file, { bigint: true, throwIfNoEntry: false });
    if (stats === undefined) return false;
    if (taken === 'refuse') throw new FilesError('invalid-argument', `the tar stream has ${shown(path)} twice`);
    if (stats.isDirectory() && type === 'directory') return true;
    if (stats.isDirectory() !== (type === 'directory') && taken !== 'replace') {
      const [there, new_] = stats.isDirectory() ? ['a directory', 'another file'] : ['no directory', 'a directory'];
      throw new FilesError(
        'failed-precondition',
        `cannot put ${new_} in the place of ${shown(path)}, which is ${there}`,
      );
    }
    if (stats.isDirectory()) rmSync(file, { recursive: true });
    else unlinkSync(file);
    return false;
  }

  #attributes(file: Buffer, entry: TarEntry): void {
    const { mtimeNs, type } = entry;
    const mode = entry.mode & (this.#options.modeMask ?? 0o7777);
    const { uid, gid } = this.#options.owner ?? entry;
    if (type === 'symlink') {
      lchownSync(file, uid, gid);
      setFileTimes(file, mtimeNs);
      return;
    }
    // By a descriptor of the very file: its name may mean another one by now.
    const fd = openSync(file, O_PATH | constants.O_NOFOLLOW);
    try {
      if (fstatSync(fd).isSymbolicLink())
        throw new FilesError('failed-precondition', `${shown(entry.path)} was replaced`);
      const itself = `/proc/self/fd/${fd}`;
      chownSync(itself, uid, gid);
      // Afterwards: chown(2) takes setuid and setgid away.
      chmodSync(itself, mode);
      for (const [name, value] of entry.xattrs) this.#attribute(file, entry.path, name, value);
      if (type === 'directory') this.#times.push({ path: entry.path, mtimeNs });
      else setFileTimes(file, mtimeNs);
    } finally {
      closeSync(fd);
    }
  }

  #attribute(file: Buffer, path: BinaryString, name: string, value: Buffer): void {
    const { xattr, unkept } = this.#options;
    const wanted = xattr(name, value, path);
    if (wanted === undefined) return;
    try {
      lsetxattr(file, wanted, value);
    } catch (error) {
      if (unkept === undefined || !(error instanceof SysError) || error.code !== 'EOPNOTSUPP') throw error;
      unkept(name, path);
    }
  }

  #directory(path: BinaryString): Place {
    if (this.#last?.path === path) return this.#last.place;
    this.#last?.place[Symbol.dispose]();
    this.#last = undefined;
    const { walk, makesParents = false } = this.#options;
    const place = makesParents ? Place.make(this.#top.fd, path, walk) : Place.open(this.#top.fd, path, walk);
    this.#last = { path, place };
    return place;
  }

  [Symbol.dispose](): void {
    this.#last?.place[Symbol.dispose]();
  }
}

/** glibc's gnu_dev_makedev. */
function deviceNumber({ major, minor }: TarEntry): bigint {
  const [high, low] = [BigInt(major), BigInt(minor)];
  return ((high & 0xfffff000n) << 32n) | ((high & 0xfffn) << 8n) | ((low & 0xffffff00n) << 12n) | (low & 0xffn);
}

async function writeAll(handle: Awaited<ReturnType<typeof open>>, data: Buffer, offset: number): Promise<void> {
  for (let at = 0; at < data.length; ) {
    const { bytesWritten } = await handle.write(data, at, data.length - at, offset + at);
    at += bytesWritten;
  }
}
