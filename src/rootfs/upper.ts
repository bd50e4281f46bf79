/**
 * A container's own directory on the host: the upper directory of its snapshot.
 *
 * The container writes to a disk that only the guest mounts. What reads a snapshot on the host (commit, diff, a copy from a
 * stopped container) looks here. So what the guest says it has written is made here, whole and in one step, whenever that is
 * asked for; and what somebody on the host has changed here since is told, so that the guest gets it. A file in the work
 * directory, by its time of change, tells the one from the other.
 */
import { constants, lstatSync, openSync } from 'node:fs';
import { mkdir, open, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { KilnError } from '../errors.ts';
import { packFiles } from '../files/pack.ts';
import { Place } from '../files/place.ts';
import { FilesError } from '../files/tar-entry.ts';
import { tarEnd } from '../files/tar-write.ts';
import { opaqueXattr, type Unpacked, unpackFiles } from '../files/unpack.ts';
import { exchange } from '../sys/rename.ts';
import { fileError } from './file-error.ts';
import type { UpperDirectory } from './plan.ts';

/** In the work directory; overlayfs itself uses only `work` and `index` in there. */
const markName = 'kiln-upper';
const partName = 'kiln-upper.part';

/** The mark of a directory that hides what is below it, where containerd runs in a user namespace. */
const userOpaqueXattr = 'user.overlay.opaque';

/** The smallest file that a guest's filesystem has room for, in bytes: so many files can a disk have, and names of them. */
const bytesPerFile = 4096;
const leastFiles = 16_384;

/** Extended attributes that are a file's own. Nothing else of a guest's becomes an attribute on the host. */
const ownXattr = /^(user\.(?!overlay\.)|security\.capability$|system\.posix_acl_(access|default)$)/;

export interface ReplaceOptions {
  /** The most bytes of content: what the guest's disk holds. */
  readonly maxBytes: number;
  readonly signal?: AbortSignal;
}

/** What the host has put into the directory: a tar stream, to be read before this is disposed of. */
export interface Edits extends Disposable {
  readonly stream: AsyncGenerator<Buffer>;
}

export class SnapshotUpper {
  readonly directory: UpperDirectory;

  constructor(directory: UpperDirectory) {
    this.directory = directory;
  }

  get #mark(): string {
    return join(this.directory.work, markName);
  }

  /**
   * What somebody on the host has put here since the last `noteTaken` or `replace`, undefined for nothing.
   * What is unchanged does not come; what was removed here is not seen.
   *
   * @throws KilnError
   */
  async edits(): Promise<Edits | undefined> {
    const { path, userxattr } = this.directory;
    const sinceNs = this.#markedAtNs();
    const opaque = userxattr ? userOpaqueXattr : opaqueXattr;
    const place = openPlace(path);
    const stream = packFiles(
      { place, as: '.' },
      {
        xattr: (name) => (name === opaque ? opaqueXattr : ownXattr.test(name) ? name : undefined),
        // The directory itself says nothing until something is in it.
        include: ({ ctimeNs }) => ctimeNs > sinceNs,
      },
    );
    try {
      const first = await stream.next();
      const second = await stream.next();
      if (first.value === tarEnd || (sinceNs === 0n && second.value === tarEnd)) {
        place[Symbol.dispose]();
        return undefined;
      }
      return { stream: joined([first, second], stream), [Symbol.dispose]: () => place[Symbol.dispose]() };
    } catch (error) {
      place[Symbol.dispose]();
      throw toKilnError(error, `cannot read the snapshot's directory ${path}`);
    }
  }

  /** The guest has what was here until now. */
  async noteTaken(): Promise<void> {
    try {
      await using mark = await open(this.#mark, 'a', 0o600);
      const now = new Date();
      await mark.utimes(now, now);
    } catch (error) {
      throw fileError(error, `cannot write ${this.#mark}`);
    }
  }

  /**
   * Puts a stream's files in the place of all that is here, in one step: where it fails, all stays as it was. Files that have
   * not changed since the last time may come without their content. A guest's devices are left out.
   *
   * @throws KilnError invalid-argument for a stream that says what it must not, resource-exhausted for too much of it, and
   *   when the disk is full; failed-precondition when a file is not what the stream takes it for
   */
  async replace(stream: AsyncIterable<Buffer>, { maxBytes, signal }: ReplaceOptions): Promise<Unpacked> {
    const { path, work, userxattr } = this.directory;
    const part = join(work, partName);
    try {
      await rm(part, { recursive: true, force: true });
      await mkdir(part, { mode: 0o700 });
      let unpacked: Unpacked;
      {
        using top = openPlace(part);
        using previous = openPlace(path);
        unpacked = await unpackFiles(limited(stream, maxBytes, signal), top, {
          walk: 'beneath',
          taken: 'refuse',
          marks: 'keep',
          devices: 'leave-out',
          xattr: (name, value) => {
            if (name === opaqueXattr)
              return value.toString() === 'y' ? (userxattr ? userOpaqueXattr : name) : undefined;
            return ownXattr.test(name) ? name : undefined;
          },
          limits: { bytes: maxBytes, files: Math.max(leastFiles, Math.floor(maxBytes / bytesPerFile)) },
          previous,
        });
      }
      exchange(part, path);
      await this.noteTaken();
      return unpacked;
    } catch (error) {
      throw toKilnError(error, `cannot put what the container has written into ${path}`);
    } finally {
      await rm(part, { recursive: true, force: true });
    }
  }

  #markedAtNs(): bigint {
    try {
      return lstatSync(this.#mark, { bigint: true }).ctimeNs;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return 0n;
      throw fileError(error, `cannot read ${this.#mark}`);
    }
  }
}

/** The size of the disk that a guest writes to. */
export async function sizeOf(disk: string): Promise<number> {
  return (await stat(disk)).size;
}

/** An error of the files' own, or the system's, as a KilnError. */
export function toKilnError(error: unknown, what: string): KilnError {
  if (error instanceof FilesError) return new KilnError(error.code, `${what}: ${error.message}`, { cause: error });
  return KilnError.from(fileError(error, what));
}

/** A guest may send as much as it likes, also of what is no file. */
async function* limited(stream: AsyncIterable<Buffer>, maxBytes: number, signal: AbortSignal | undefined) {
  let bytes = 0;
  for await (const piece of stream) {
    signal?.throwIfAborted();
    bytes += piece.length;
    // Headers take 512 bytes and more for each file.
    if (bytes > 2 * maxBytes + 64 * 2 ** 20) {
      throw new FilesError('resource-exhausted', `the tar stream does not end after ${bytes} bytes`);
    }
    yield piece;
  }
}

async function* joined(first: readonly IteratorResult<Buffer, unknown>[], rest: AsyncGenerator<Buffer>) {
  for (const { done, value } of first) if (!done) yield value;
  yield* rest;
}

function openPlace(path: string): Place {
  return new Place(openSync(path, constants.O_DIRECTORY | constants.O_RDONLY | constants.O_NOFOLLOW));
}
