import { randomUUID } from 'node:crypto';
import { mkdirSync, readdirSync, renameSync, rmSync, statSync } from 'node:fs';
import { mkdir, open, readFile, rm, writeFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import type { Logger } from 'pino';
import { KilnError } from '../errors.ts';
import { SingleFlight } from '../host/single-flight.ts';
import { convertToErofs, type Tree } from './convert.ts';
import { fileError } from './file-error.ts';
import { chainKey, type DirectoryIdentity, identifyDirectory, isStillThere } from './identity.ts';
import { type Lease, lease } from './lease.ts';
import { submountBelow } from './mountinfo.ts';
import { ownerIsGone, ownerTag, uniqueSuffix } from './owner.ts';
import type { LowerSource } from './plan.ts';

/** What lies beside each image as `<name>.json`. */
interface LayerRecord {
  readonly sources: readonly DirectoryIdentity[];
  /** Set for an image that is for one container only: who made it. */
  readonly owner?: string;
}

export interface LayerCacheOptions {
  readonly directory: string;
  readonly mkfsErofs: string;
  readonly logger: Logger | undefined;
}

const scratchPrefix = 'tmp-';

/** Begins the name of an image that is for one container only. */
const freshPrefix = 'fresh-';

/**
 * The folder of erofs images. An image of committed snapshots is made once and shared; one of directories that somebody
 * may write to is made for one container, and removed with its last lease.
 *
 * Every file appears under its name by rename(2), complete and flushed to the disk.
 */
export class LayerCache {
  readonly #directory: string;
  readonly #mkfsErofs: string;
  readonly #logger: Logger | undefined;
  readonly #conversions = new SingleFlight();
  /** How many leases each image has. */
  readonly #leases = new Map<string, number>();

  constructor({ directory, mkfsErofs, logger }: LayerCacheOptions) {
    this.#directory = directory;
    this.#mkfsErofs = mkfsErofs;
    this.#logger = logger;
    mkdirSync(directory, { recursive: true, mode: 0o700 });
    this.#removeScratch();
  }

  /** The image of a source; converts it if there is none. */
  async acquire(source: LowerSource, signal: AbortSignal): Promise<Lease> {
    const { tree, sources, shared } = await inspect(source);
    const key = shared ? chainKey(sources, source.kind === 'overlay' && source.userxattr) : freshPrefix + randomUUID();
    const file = join(this.#directory, `${key}.erofs`);
    // Before the first look at the file, or collectGarbage could remove it in between.
    const taken = this.#lease(file, !shared);
    try {
      const record: LayerRecord = shared ? { sources } : { sources, owner: ownerTag() };
      await this.#conversions.run(key, signal, async (either) => {
        if (!exists(file)) await this.#convert(key, { tree, record, signal: either });
      });
      return taken;
    } catch (error) {
      taken.release();
      throw error;
    }
  }

  /** The image that a container of an earlier kilnd has. */
  adopt(file: string): Lease {
    return this.#lease(file, basename(file).startsWith(freshPrefix));
  }

  /** Removes the images without lease whose sources are gone or were made anew; returns the removed files. */
  async collectGarbage(): Promise<string[]> {
    this.#removeScratch();
    const names = new Set(readdirSync(this.#directory));
    const removed: string[] = [];
    for (const name of names) {
      if (name.endsWith('.json') && !names.has(name.replace(/json$/, 'erofs'))) this.#removeImage(name);
      if (!name.endsWith('.erofs')) continue;
      const file = join(this.#directory, name);
      if (this.#leases.has(file) || !(await this.#isGarbage(file))) continue;
      // Somebody may have asked for it meanwhile; from here to the removal nothing is awaited.
      if (this.#leases.has(file)) continue;
      this.#removeImage(name);
      removed.push(file);
    }
    return removed;
  }

  async #convert(key: string, job: { tree: Tree; record: LayerRecord; signal: AbortSignal }): Promise<void> {
    const imageName = join(this.#directory, `${key}.erofs`);
    const scratch = join(this.#directory, scratchPrefix + uniqueSuffix());
    const started = performance.now();
    try {
      await mkdir(scratch, { mode: 0o700 });
      const uuid = uuidOf(key);
      const { tree, signal } = job;
      const image = await convertToErofs({ tree, scratch, uuid, mkfsErofs: this.#mkfsErofs, imageName, signal });
      const size = await flush(image);
      const record = join(scratch, 'record');
      await writeFile(record, JSON.stringify(job.record));
      renameSync(record, imageName.replace(/erofs$/, 'json'));
      renameSync(image, imageName);
      const ms = Math.round(performance.now() - started);
      this.#logger?.info({ image: imageName, bytes: size, ms }, 'converted a root filesystem');
    } catch (error) {
      throw fileError(error, `cannot make the image ${imageName}`);
    } finally {
      await rm(scratch, { recursive: true, force: true });
    }
  }

  #lease(file: string, removeAfterwards: boolean): Lease {
    this.#leases.set(file, (this.#leases.get(file) ?? 0) + 1);
    return lease(file, () => {
      const left = (this.#leases.get(file) ?? 1) - 1;
      if (left > 0) this.#leases.set(file, left);
      else this.#leases.delete(file);
      if (left === 0 && removeAfterwards) this.#removeImage(file);
    });
  }

  async #isGarbage(file: string): Promise<boolean> {
    const record = await this.#record(file);
    if (record === undefined) return true;
    if (record.owner !== undefined) return record.owner === ownerTag() || ownerIsGone(record.owner);
    for (const source of record.sources) if (!(await isStillThere(source, 'with-device'))) return true;
    return false;
  }

  async #record(image: string): Promise<LayerRecord | undefined> {
    try {
      return JSON.parse(await readFile(image.replace(/erofs$/, 'json'), 'utf8')) as LayerRecord;
    } catch {
      // An image that nobody can say the origin of is as good as none: it can be made again.
      return undefined;
    }
  }

  /** Removes an image and its record, named by either. */
  #removeImage(name: string): void {
    const stem = join(this.#directory, name.split('/').at(-1) ?? '').replace(/\.(erofs|json)$/, '');
    rmSync(`${stem}.erofs`, { force: true });
    rmSync(`${stem}.json`, { force: true });
  }

  /** Removes what conversions left behind whose kilnd was killed. */
  #removeScratch(): void {
    for (const name of readdirSync(this.#directory)) {
      if (!name.startsWith(scratchPrefix) || !ownerIsGone(name.slice(scratchPrefix.length))) continue;
      const path = join(this.#directory, name);
      this.#logger?.warn({ path }, 'removing what an interrupted conversion left');
      // The conversion's own programs may be at it still, and make a file meanwhile.
      rmSync(path, { recursive: true, force: true, maxRetries: 10, retryDelay: 10 });
    }
  }
}

/** What there is to convert, and whether the result can be shared by all containers with the same sources. */
async function inspect(source: LowerSource): Promise<{ tree: Tree; sources: DirectoryIdentity[]; shared: boolean }> {
  if (source.kind === 'directory') {
    const { path, immutable } = source;
    const sources = [await identifyDirectory(path, 'the root filesystem')];
    const submount = await submountBelow(path);
    if (submount !== undefined) {
      throw new KilnError('unimplemented', `another filesystem is mounted in the root filesystem, at ${submount}`, {
        hint: 'unmount it, or pass it to the container as a volume',
      });
    }
    return { tree: { kind: 'directory', path }, sources, shared: immutable };
  }
  const { layers, userxattr } = source;
  const sources = await Promise.all(layers.map((path) => identifyDirectory(path, 'the image layer')));
  return { tree: { kind: 'layers', paths: layers, userxattr }, sources, shared: true };
}

function exists(file: string): boolean {
  return statSync(file, { throwIfNoEntry: false })?.isFile() ?? false;
}

/** fsync(2); returns the size in bytes. */
async function flush(file: string): Promise<number> {
  await using handle = await open(file, 'r');
  await handle.sync();
  return (await handle.stat()).size;
}

/** The same UUID for the same image: version 8 of RFC 9562, made of the key's first hexadecimal digits. */
function uuidOf(key: string): string {
  const hex = key.replaceAll(/[^0-9a-f]/g, '');
  return [hex.slice(0, 8), hex.slice(8, 12), `8${hex.slice(13, 16)}`, `8${hex.slice(17, 20)}`, hex.slice(20, 32)].join(
    '-',
  );
}
