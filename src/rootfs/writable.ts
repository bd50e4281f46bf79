import {
  closeSync,
  constants,
  fstatSync,
  fsync,
  mkdirSync,
  openSync,
  readdirSync,
  realpathSync,
  renameSync,
  rmSync,
} from 'node:fs';
import { readdir, readFile, rename, writeFile } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { promisify } from 'node:util';
import type { Logger } from 'pino';
import { KilnError } from '../errors.ts';
import type { BlankFilesystems } from './blank.ts';
import { isExt4 } from './ext4.ts';
import { errnoCode, fileError } from './file-error.ts';
import { type DirectoryIdentity, identifyDirectory, isStillThere, snapshotKey } from './identity.ts';
import { type Lease, lease } from './lease.ts';
import { removeStaleParts, uniqueSuffix } from './owner.ts';
import type { WritableSource } from './plan.ts';

/** The file in a snapshot's work directory. overlayfs itself uses only `work` and `index` in there. */
const fileName = 'kiln-rw.ext4';

/** Below this the file could not hold its journal and inode tables. */
const minSizeBytes = 64 * 1024 * 1024;

export interface WritableOptions {
  /** Size limit of the layer when it is made; an existing one keeps its own. */
  readonly sizeBytes: number;
  readonly signal: AbortSignal;
}

const synchronize = promisify(fsync);

/**
 * The writable layers: sparse ext4 files, one per container, which only guests ever mount. One is made at the
 * container's first start and found again at the next. At most one user at a time.
 *
 * They are looked at and made here and now, but for fsync(2): a thread for each of these steps takes longer, and they lie in
 * our own folder or where overlayfs writes, which is never a network filesystem (filesystems/overlayfs.rst).
 */
export class WritableLayers {
  readonly #directory: string;
  readonly #blanks: BlankFilesystems;
  readonly #logger: Logger | undefined;
  /** Real paths of the files that a sandbox uses. */
  readonly #inUse = new Set<string>();

  constructor(directory: string, blanks: BlankFilesystems, logger: Logger | undefined) {
    this.#directory = directory;
    this.#blanks = blanks;
    this.#logger = logger;
    mkdirSync(directory, { recursive: true, mode: 0o700 });
    removeStaleParts(directory, readdirSync(directory));
  }

  /**
   * The layer of a source; makes it if there is none.
   *
   * @throws KilnError failed-precondition when a sandbox uses it, or when something else has its name
   */
  async acquire(source: WritableSource, options: WritableOptions): Promise<Lease> {
    const { file, snapshot } = await this.#locate(source);
    const claim = this.#claim(file);
    try {
      if (isWritableLayer(file)) return claim;
      if (snapshot !== undefined) await this.#writeRecord(file, snapshot);
      await makeWritable(file, this.#blanks, options);
      return claim;
    } catch (error) {
      claim.release();
      throw fileError(error, `cannot make the writable layer ${file}`);
    }
  }

  /** The layer that a container of an earlier kilnd has. Throws `failed-precondition` when somebody uses it already. */
  adopt(file: string): Lease {
    return this.#claim(file);
  }

  /** Removes the layers in the cache folder whose snapshot is gone and that nobody uses; returns the removed files. */
  async collectGarbage(): Promise<string[]> {
    const names = await readdir(this.#directory);
    removeStaleParts(this.#directory, names);
    const removed: string[] = [];
    for (const name of names.filter((name) => name.endsWith('.json'))) {
      const file = join(this.#directory, name.replace(/json$/, 'ext4'));
      if (this.#inUse.has(file) || !(await this.#isGarbage(file))) continue;
      // Somebody may have asked for it meanwhile; from here to the removal nothing is awaited.
      if (this.#inUse.has(file)) continue;
      rmSync(file, { force: true });
      rmSync(join(this.#directory, name), { force: true });
      removed.push(file);
    }
    return removed;
  }

  async #locate(source: WritableSource): Promise<{ file: string; snapshot?: DirectoryIdentity }> {
    if (source.kind === 'of-snapshot') {
      const snapshot = await identifyDirectory(source.snapshot, 'the snapshot');
      return { file: join(this.#directory, `${snapshotKey(snapshot)}.ext4`), snapshot };
    }
    try {
      return { file: join(realpathSync.native(source.directory), fileName) };
    } catch (error) {
      throw fileError(error, `cannot use the work directory ${source.directory}`);
    }
  }

  #claim(file: string): Lease {
    if (this.#inUse.has(file)) {
      throw new KilnError('failed-precondition', `the writable layer ${file} is in use by a running sandbox`, {
        hint: 'two containers cannot run on one snapshot at a time',
      });
    }
    this.#inUse.add(file);
    return lease(file, () => this.#inUse.delete(file));
  }

  async #writeRecord(file: string, snapshot: DirectoryIdentity): Promise<void> {
    const part = `${file}.${uniqueSuffix()}.part`;
    await writeFile(part, JSON.stringify({ snapshot }), { flag: 'wx', mode: 0o600 });
    await rename(part, file.replace(/ext4$/, 'json'));
  }

  async #isGarbage(file: string): Promise<boolean> {
    let snapshot: DirectoryIdentity;
    try {
      ({ snapshot } = JSON.parse(await readFile(file.replace(/ext4$/, 'json'), 'utf8')) as {
        snapshot: DirectoryIdentity;
      });
    } catch (error) {
      this.#logger?.warn({ err: error, file }, 'cannot tell whose writable layer this is; it stays');
      return false;
    }
    // This is somebody's data. A snapshotter's folder that is gone as a whole may just not be mounted yet.
    const parent = await identifyDirectory(dirname(snapshot.path), 'the folder').catch(() => undefined);
    return parent !== undefined && !(await isStillThere(snapshot, 'without-device'));
  }
}

/**
 * Whether there is a finished layer; false when there is nothing.
 *
 * @throws KilnError failed-precondition when there is anything else
 */
function isWritableLayer(file: string): boolean {
  const foreign = (what: string) =>
    new KilnError('failed-precondition', `${file} is ${what}, not a writable layer of Kiln`, {
      hint: 'remove it if it is of no use, and start the container again',
    });
  using stack = new DisposableStack();
  let fd: number;
  try {
    // O_NONBLOCK: a FIFO of that name must not hold us.
    const flags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;
    fd = stack.adopt(openSync(file, flags), closeSync);
  } catch (error) {
    if (errnoCode(error) === 'ENOENT') return false;
    if (errnoCode(error) === 'ELOOP') throw foreign('a symbolic link');
    throw fileError(error, `cannot open the writable layer ${file}`);
  }
  if (!fstatSync(fd).isFile()) throw foreign('not a regular file');
  if (!isExt4(fd)) throw foreign('not an ext4 filesystem');
  return true;
}

/** Makes a layer beside its name and renames it, so that a half-made one never has the name. */
async function makeWritable(
  file: string,
  blanks: BlankFilesystems,
  { sizeBytes, signal }: WritableOptions,
): Promise<void> {
  if (!Number.isSafeInteger(sizeBytes) || sizeBytes < minSizeBytes) {
    throw new KilnError('invalid-argument', `a writable layer of ${sizeBytes} bytes is too small`, {
      hint: `the least is ${minSizeBytes} bytes`,
    });
  }
  const directory = dirname(file);
  removeStaleParts(directory, readdirSync(directory));
  const part = join(directory, `${basename(file)}.${uniqueSuffix()}.part`);
  using stack = new DisposableStack();
  try {
    // 'wx+' is O_CREAT|O_EXCL, which follows no symbolic link (open(2)).
    const fd = stack.adopt(openSync(part, 'wx+', 0o600), closeSync);
    await blanks.copyTo(fd, sizeBytes, signal);
    signal.throwIfAborted();
    await synchronize(fd);
    renameSync(part, file);
  } catch (error) {
    rmSync(part, { force: true });
    throw error;
  }
}
