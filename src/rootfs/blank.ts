import { closeSync, fstatSync, ftruncateSync, mkdirSync, openSync, readSync, writeSync } from 'node:fs';
import { open, readdir, rename, rm } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { KilnError } from '../errors.ts';
import { SingleFlight } from '../host/single-flight.ts';
import { nextExtent } from '../sys/sparse.ts';
import { isExt4 } from './ext4.ts';
import { removeStaleParts, uniqueSuffix } from './owner.ts';
import { lastLine, runTool } from './tool.ts';

/** From here on the journal has the bigger size. */
const bigSizeBytes = 512 * 1024 * 1024;

/** Bytes that are copied at a time. */
const chunkBytes = 256 << 10;

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

  constructor(directory: string) {
    this.#directory = directory;
    mkdirSync(directory, { recursive: true, mode: 0o700 });
  }

  /**
   * Makes an open, empty file into a filesystem of that size. Where there is one to copy, here and now, from page cache to
   * page cache: a thread for each of these few small pieces takes longer.
   *
   * @throws KilnError resource-exhausted when a disk is full, internal when mkfs.ext4 failed; the error of a system call
   */
  async copyTo(target: number, sizeBytes: number, signal: AbortSignal): Promise<void> {
    const blank = join(this.#directory, `${sizeBytes}-${formatVersion}.ext4`);
    if (copyWhole(blank, { target, sizeBytes })) return;
    await this.#flights.run(blank, signal, (flight) => this.#make(blank, sizeBytes, flight));
    if (!copyWhole(blank, { target, sizeBytes })) throw new KilnError('internal', `${blank} was removed at once`);
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

/** False when there is no whole filesystem of that size to copy. */
function copyWhole(blank: string, { target, sizeBytes }: { target: number; sizeBytes: number }): boolean {
  using stack = new DisposableStack();
  let source: number;
  try {
    source = stack.adopt(openSync(blank, 'r'), closeSync);
    if (fstatSync(source).size !== sizeBytes || !isExt4(source)) return false;
  } catch {
    // Whatever it is that cannot be read, it is made anew.
    return false;
  }
  ftruncateSync(target, sizeBytes);
  copyExtents(source, target);
  return true;
}

function copyExtents(source: number, target: number): void {
  const buffer = Buffer.allocUnsafe(chunkBytes);
  for (let piece = nextExtent(source, 0); piece !== undefined; piece = nextExtent(source, piece.end)) {
    for (let at = piece.start; at < piece.end; ) {
      const length = readSync(source, buffer, 0, Math.min(chunkBytes, piece.end - at), at);
      // A write may be cut short by a disk that is nearly full.
      at += writeSync(target, buffer, 0, length, at);
    }
  }
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
