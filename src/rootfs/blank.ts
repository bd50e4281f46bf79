import { closeSync, fstatSync, ftruncateSync, mkdirSync, openSync, readSync, writeSync } from 'node:fs';
import { open, readdir, rename, rm } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { KilnError } from '../errors.ts';
import { fileIdentity } from '../host/program.ts';
import { SingleFlight } from '../host/single-flight.ts';
import { nextExtent } from '../sys/sparse.ts';
import { isExt4 } from './ext4.ts';
import { removeStaleParts, uniqueSuffix } from './owner.ts';
import { lastLine, runTool } from './tool.ts';

/** Bytes that are read at a time. */
const chunkBytes = 256 << 10;

/** What of a filesystem is kept in memory at most, in bytes: several times what there is, unless its disk knows no holes. */
const keptBytes = 1 << 20;

/** From here on the journal has the bigger size. */
const bigSizeBytes = 512 * 1024 * 1024;

/**
 * Everything that mke2fs would take from the host's mke2fs.conf is said here, so that every host makes the same
 * filesystem. `none` clears the defaults; what follows has been in every kernel since 4.x. Without resize_inode, with
 * one backup superblock and one big journal-to-come (all zeros, which a sparse file has for free), the file takes
 * 140 KiB of the host's disk whatever its size.
 */
const features =
  'none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,sparse_super2,large_file,huge_file,' +
  'dir_nlink,extra_isize,metadata_csum';

/** Another number whenever filesystems are made in another way, so that none of before is taken. */
const formatVersion = 1;

/**
 * Empty ext4 filesystems, one file of each size, of which writable layers are copies: to copy the 140 KiB is quicker than
 * to run mkfs.ext4, and takes less of the CPU. All layers of a size have one UUID; no guest ever sees two of them.
 */
export class BlankFilesystems {
  readonly #directory: string;
  readonly #flights = new SingleFlight();
  /** Of the one that was copied last: with one size for all, as hosts have it, there is nothing to read any more. */
  #content: { readonly identity: string; readonly pieces: readonly Piece[] } | undefined;

  constructor(directory: string) {
    this.#directory = directory;
    mkdirSync(directory, { recursive: true, mode: 0o700 });
  }

  /**
   * Makes an open, empty file into a filesystem of that size. Where there is one to copy, here and now, to the page cache: a
   * thread for each of these few small pieces takes longer.
   *
   * @throws KilnError resource-exhausted when a disk is full, internal when mkfs.ext4 failed; the error of a system call
   */
  async copyTo(target: number, sizeBytes: number, signal: AbortSignal): Promise<void> {
    const blank = join(this.#directory, `${sizeBytes}-${formatVersion}.ext4`);
    if (this.#copyWhole(blank, { target, sizeBytes })) return;
    await this.#flights.run(blank, signal, (flight) => this.#make(blank, sizeBytes, flight));
    if (!this.#copyWhole(blank, { target, sizeBytes })) throw new KilnError('internal', `${blank} was removed at once`);
  }

  /** False when there is no whole filesystem of that size to copy. */
  #copyWhole(blank: string, { target, sizeBytes }: { target: number; sizeBytes: number }): boolean {
    using stack = new DisposableStack();
    let identity: string;
    let pieces: Iterable<Piece>;
    try {
      identity = fileIdentity(blank);
      if (this.#content?.identity === identity) pieces = this.#content.pieces;
      else {
        const source = stack.adopt(openSync(blank, 'r'), closeSync);
        if (fstatSync(source).size !== sizeBytes || !isExt4(source)) return false;
        pieces = piecesOf(source);
      }
    } catch {
      // Whatever it is that cannot be read, it is made anew.
      return false;
    }
    ftruncateSync(target, sizeBytes);
    const copied: Piece[] = [];
    let bytes = 0;
    for (const piece of pieces) {
      writeWhole(target, piece);
      bytes += piece.data.length;
      if (bytes <= keptBytes) copied.push(piece);
    }
    if (bytes <= keptBytes) this.#content = { identity, pieces: copied };
    return true;
  }

  async #make(blank: string, sizeBytes: number, signal: AbortSignal): Promise<void> {
    removeStaleParts(this.#directory, await readdir(this.#directory));
    const part = join(this.#directory, `${basename(blank)}.${uniqueSuffix()}.part`);
    try {
      await using handle = await open(part, 'wx+', 0o600);
      await handle.truncate(sizeBytes);
      await format(part, sizeBytes, signal);
      await handle.sync();
      await rename(part, blank);
    } catch (error) {
      await rm(part, { force: true });
      throw error;
    }
  }
}

/** A piece of a file that is no hole. */
interface Piece {
  readonly at: number;
  readonly data: Buffer;
}

function* piecesOf(source: number): Generator<Piece> {
  for (let extent = nextExtent(source, 0); extent !== undefined; extent = nextExtent(source, extent.end)) {
    for (let at = extent.start; at < extent.end; ) {
      const data = Buffer.allocUnsafe(Math.min(chunkBytes, extent.end - at));
      const length = readSync(source, data, 0, data.length, at);
      if (length === 0) throw new KilnError('internal', 'an empty filesystem was cut off while it was copied');
      yield { at, data: data.subarray(0, length) };
      at += length;
    }
  }
}

/** A write may be cut short by a disk that is nearly full. */
function writeWhole(target: number, { at, data }: Piece): void {
  for (let done = 0; done < data.length; ) done += writeSync(target, data, done, data.length - done, at + done);
}

async function format(file: string, sizeBytes: number, signal: AbortSignal): Promise<void> {
  const journalMib = sizeBytes >= bigSizeBytes ? 16 : 4;
  const options = ['-F', '-q', '-t', 'ext4', '-b', '4096', '-I', '256', '-i', '16384', '-m', '0', '-O', features];
  // The file is sparse, so what mke2fs leaves for later is zero already.
  const extended = [
    '-J',
    `size=${journalMib}`,
    '-E',
    'lazy_itable_init=1,lazy_journal_init=1,nodiscard,num_backup_sb=0',
  ];
  const result = await runTool('mkfs.ext4', [...options, ...extended, file], { signal, hint: 'install e2fsprogs' });
  if (result.code === 0) return;
  const isFull = result.output.includes('No space left on device');
  const message = `cannot make the empty filesystem ${file}: mkfs.ext4: ${lastLine(result)}`;
  throw new KilnError(isFull ? 'resource-exhausted' : 'internal', message);
}
