import { closeSync, openSync } from 'node:fs';
import { join } from 'node:path';
import type { Logger } from 'pino';
import { BlankFilesystems } from './blank.ts';
import { LayerCache } from './layers.ts';
import type { Lease } from './lease.ts';
import type { RootfsPlan } from './plan.ts';
import { WritableLayers } from './writable.ts';

/** A file to put behind a drive slot of a VM. */
export interface Disk {
  readonly file: string;
  readonly readOnly: boolean;
  readonly format: 'erofs' | 'ext4';
}

/** The disks of one container. They stay, and the writable one is nobody else's, until they are released. */
export interface PreparedRootfs extends AsyncDisposable {
  /** null: there are none, because the guest has the host's directory itself, as a volume. */
  readonly lower: Disk | null;
  /** null: a read-only view, or a volume. */
  readonly writable: Disk | null;
  /** To be called when the VM no longer has the disks open. Safe to call twice. */
  release(): Promise<void>;
}

/** Of a container that has disks. */
export interface DiskRootfs extends PreparedRootfs {
  readonly lower: Disk;
}

/** Of a container whose root filesystem is a volume. */
export const volumeRootfs: PreparedRootfs = {
  lower: null,
  writable: null,
  release: async () => {},
  [Symbol.asyncDispose]: async () => {},
};

/** The files of a container's disks. */
export interface DiskFiles {
  readonly lower: string;
  readonly writable: string | null;
}

export interface RootfsStoreOptions {
  /**
   * Images go into `layers/` in there, writable layers without a snapshot folder of their own into `writable/`, what they
   * are copies of into `blank/`.
   */
  readonly cacheDir: string;
  readonly logger?: Logger;
  /** The program that makes erofs images; found on PATH by default. */
  readonly mkfsErofs?: string;
}

export interface PrepareOptions {
  readonly signal: AbortSignal;
  /** Size limit of the writable layer when it is made; an existing one keeps its own. */
  readonly writableSizeBytes: number;
}

/** Turns root filesystems into disks, and keeps the disks. */
export class RootfsStore {
  readonly #layers: LayerCache;
  readonly #blanks: BlankFilesystems;
  readonly #writable: WritableLayers;
  readonly #logger: Logger | undefined;
  #collecting: Promise<string[]> | undefined;

  /** Makes the folders, and removes what an earlier kilnd left unfinished in them. */
  constructor({ cacheDir, logger, mkfsErofs = 'mkfs.erofs' }: RootfsStoreOptions) {
    this.#logger = logger;
    this.#layers = new LayerCache({ directory: join(cacheDir, 'layers'), mkfsErofs, logger });
    this.#blanks = new BlankFilesystems(join(cacheDir, 'blank'));
    this.#writable = new WritableLayers(join(cacheDir, 'writable'), this.#blanks, logger);
  }

  /**
   * The disks of a plan. The image of the read-only layers is converted unless it is there; the writable layer is made
   * unless the container has one from before.
   *
   * @throws KilnError failed-precondition (the writable layer is in use), not-found and invalid-argument (a layer is
   *   missing or no directory), resource-exhausted (disk full), internal (a tool failed); the signal's reason
   */
  async prepare(plan: RootfsPlan, { signal, writableSizeBytes }: PrepareOptions): Promise<DiskRootfs> {
    signal.throwIfAborted();
    const failed = new AbortController();
    const either = AbortSignal.any([signal, failed.signal]);
    const orAbort = async (step: Promise<Lease> | null): Promise<Lease | null> => {
      try {
        return await step;
      } catch (error) {
        // The first failure ends the other step, and is the reason that both report.
        failed.abort(error);
        throw error;
      }
    };
    const writableStep =
      plan.writable && this.#writable.acquire(plan.writable, { sizeBytes: writableSizeBytes, signal: either });
    const [writable, lower] = await Promise.allSettled([
      orAbort(writableStep),
      orAbort(this.#layers.acquire(plan.lower, either)),
    ]);
    if (lower.status === 'fulfilled' && lower.value !== null && writable.status === 'fulfilled') {
      return prepared(lower.value, writable.value);
    }
    for (const step of [writable, lower]) if (step.status === 'fulfilled') step.value?.release();
    throw either.reason;
  }

  /**
   * Makes a new file that is an empty writable layer, of nobody.
   *
   * @throws KilnError as `prepare`; the error of a system call
   */
  async makeBlank(file: string, { signal, writableSizeBytes }: PrepareOptions): Promise<void> {
    using stack = new DisposableStack();
    const target = stack.adopt(openSync(file, 'wx+', 0o600), closeSync);
    await this.#blanks.copyTo(target, writableSizeBytes, signal);
  }

  /** The disks that a container of an earlier kilnd has. To be called before `collectGarbage`. */
  adopt({ lower, writable }: DiskFiles): DiskRootfs {
    const claimed = writable === null ? null : this.#writable.adopt(writable);
    return prepared(this.#layers.adopt(lower), claimed);
  }

  /**
   * Removes images and writable layers that nobody uses and whose snapshots are gone; returns the removed files. Calls
   * during a run share it.
   */
  collectGarbage(): Promise<string[]> {
    this.#collecting ??= this.#collect().finally(() => {
      this.#collecting = undefined;
    });
    return this.#collecting;
  }

  async #collect(): Promise<string[]> {
    const removed = [...(await this.#layers.collectGarbage()), ...(await this.#writable.collectGarbage())];
    if (removed.length > 0) this.#logger?.info({ removed }, 'removed disks of snapshots that are gone');
    return removed;
  }
}

function prepared(lower: Lease, writable: Lease | null): DiskRootfs {
  const release = async () => {
    lower.release();
    writable?.release();
  };
  return {
    lower: { file: lower.file, readOnly: true, format: 'erofs' },
    writable: writable && { file: writable.file, readOnly: false, format: 'ext4' },
    release,
    [Symbol.asyncDispose]: release,
  };
}
