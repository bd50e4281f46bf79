/**
 * Templates: saved virtual machines that were warmed up, from which containers' VMs are cloned.
 *
 * Folder: `<key>/` (one template each: the VMM's files and template.json), `<key>.new/` (one that is being made), `lock`.
 * The key names all that a template depends on, so a template is never out of date, only unused.
 */
import {
  closeSync,
  mkdirSync,
  openSync,
  readdirSync,
  realpathSync,
  rmSync,
  statfsSync,
  statSync,
  utimesSync,
} from 'node:fs';
import { mkdir, rename, rm } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { KilnError } from '../errors.ts';
import { fileIdentity } from '../host/program.ts';
import { SingleFlight } from '../host/single-flight.ts';
import type { Logger } from '../observe/logger.ts';
import { flock } from '../sys/lock.ts';
import type { TemplateDriver, Vmm, VmShape } from '../vmm/vmm.ts';
import { buildTemplate, vmDirectoryIn } from './build.ts';
import { type HostFacts, hostFacts, type TemplateParts, templateKey, templateParts } from './key.ts';
import type { MakeBlank } from './prime.ts';
import { digestOf, readTemplateRecord, recordName, sizeOf, writeTemplateRecord } from './record.ts';

/** How long no template of a kind is made after that has failed, in ms: VMs boot meanwhile. */
const retryAfterMs = 60_000;

/** flock(2) has no event; another kilnd may hold the lock for some seconds. */
const lockCheckMs = 50;

/** Twins would come soon after each other. */
const bootIdsKept = 1000;

const mib = 2 ** 20;

export interface TemplateStoreOptions {
  /** `templates/` in it is the store's. */
  readonly cacheDir: string;
  readonly logger: Logger;
  /** A turn among the VMs that boot. */
  readonly takeTurn: (signal: AbortSignal) => Promise<Disposable>;
  /** Ends what a kilnd that was killed has left of a VM in a directory, so that this can be removed. */
  readonly endRemains: (directory: string) => Promise<unknown>;
  readonly makeBlank: MakeBlank;
  /** How a template is made; another way for tests. */
  readonly build?: typeof buildTemplate;
}

export interface TemplateRequest {
  readonly vmm: Vmm;
  readonly shape: VmShape;
  /** Time for the boot of the VM that is saved, and for each answer of its agent, in ms. */
  readonly bootTimeoutMs: number;
}

export interface TemplateLimits {
  /** Days after its last use for which a template is kept. */
  readonly keepDays: number;
  /** All templates together, in MiB on the disk. */
  readonly maxTotalMib: number;
}

/** A template that is whole. It may be removed at any time: then a restore fails, and clones that run go on. */
export interface Template {
  readonly key: string;
  readonly directory: string;
  readonly driver: TemplateDriver;
}

/** What became of starts since kilnd started. */
export interface TemplateCounts {
  /** VMs that were restored. */
  restored: number;
  /** Restores that failed; each VM was booted instead. */
  restoresFailed: number;
  /** Templates made. */
  built: number;
  /** Templates that could not be made. */
  buildsFailed: number;
  /** Templates found damaged, and removed. */
  damaged: number;
}

export class TemplateStore {
  readonly counts: TemplateCounts = { restored: 0, restoresFailed: 0, built: 0, buildsFailed: 0, damaged: 0 };
  /** As it was when kilnd started: to read it takes the longer, the more CPUs there are. */
  readonly #host = hostFacts();
  readonly #options: TemplateStoreOptions;
  readonly #directory: string;
  readonly #flights = new SingleFlight();
  /** By key, what the files were when their content was looked at last. */
  readonly #verified = new Map<string, string>();
  /** By key, until when none is made, `performance.now()`: the wall clock may jump. */
  readonly #failed = new Map<string, number>();
  /** Boot ids of clones: two of the same would be twins. */
  readonly #bootIds = new Set<string>();

  constructor(options: TemplateStoreOptions) {
    this.#options = options;
    const directory = path.join(options.cacheDir, 'templates');
    mkdirSync(directory, { recursive: true, mode: 0o700 });
    // Processes are known by it, also to another kilnd whose cache leads here by another way.
    this.#directory = realpathSync(directory);
  }

  /**
   * The template for such VMs, which is made unless it is there. Undefined where the VMM has none, and where none can be
   * made now, which is logged. Rejects with the signal's reason only.
   */
  async provide(request: TemplateRequest, signal: AbortSignal): Promise<Template | undefined> {
    const driver = request.vmm.templates;
    const parts = driver && partsOf(driver, request.shape, this.#host);
    if (driver === undefined || parts === undefined) return undefined;
    const key = templateKey(parts);
    const template = { key, directory: path.join(this.#directory, key), driver };
    if (!this.#isVerified(template)) {
      if ((this.#failed.get(key) ?? 0) > performance.now()) return undefined;
      await this.#flights.run(key, signal, (flight) => this.#verifyOrMake(template, parts, request, flight));
      if (!this.#isVerified(template)) return undefined;
    }
    this.#noteUse(template);
    return template;
  }

  /** Notes a restored VM. @throws KilnError internal when it is another one's twin */
  noteRestored(bootId: string): void {
    if (bootId === '' || this.#bootIds.has(bootId)) {
      throw new KilnError('internal', `the restored virtual machine has the boot id "${bootId}" of another one`);
    }
    this.#bootIds.add(bootId);
    if (this.#bootIds.size > bootIdsKept) this.#bootIds.delete(this.#bootIds.values().next().value as string);
    this.counts.restored += 1;
  }

  /** Notes that no VM could be restored from a template: it is not used again, and made anew some time later. */
  noteFailure({ key, directory }: Template, error: unknown): void {
    this.counts.restoresFailed += 1;
    this.#verified.delete(key);
    this.#failed.set(key, performance.now() + retryAfterMs);
    rmSync(directory, { recursive: true, force: true });
    const words = 'cannot restore from a template, which is removed: the virtual machine boots instead';
    this.#options.logger.warn({ err: error, template: key }, words);
  }

  /** Removes templates that are too old or too many, and what a killed kilnd has left half made. */
  async collectGarbage({ keepDays, maxTotalMib }: TemplateLimits): Promise<void> {
    using lock = this.#tryLock();
    if (lock === undefined) return;
    const oldest = Date.now() - keepDays * 24 * 3600 * 1000;
    let totalBytes = 0;
    for (const [index, { name, usedAtMs, bytes }] of this.#list().entries()) {
      totalBytes += bytes;
      // However large the last one is: without it, each start would make it anew.
      if (usedAtMs >= oldest && (index === 0 || totalBytes <= maxTotalMib * mib)) continue;
      this.#verified.delete(name);
      await this.#remove(path.join(this.#directory, name));
      this.#options.logger.info({ template: name }, 'removed a template that is not used');
    }
  }

  /** What is in the store, used last first; what is no template comes as never used. */
  #list() {
    const names = readdirSync(this.#directory).filter((name) => name !== lockName);
    const found = names.map((name) => {
      const directory = path.join(this.#directory, name);
      const used = name.endsWith(newSuffix)
        ? undefined
        : statSync(path.join(directory, recordName), { throwIfNoEntry: false });
      return { name, usedAtMs: used?.mtimeMs ?? 0, bytes: sizeOf(directory, readdirSync(directory)) };
    });
    return found.sort((one, other) => other.usedAtMs - one.usedAtMs);
  }

  #isVerified({ key, directory, driver }: Template): boolean {
    const known = this.#verified.get(key);
    return known !== undefined && known === identityOf(directory, driver.files);
  }

  #noteUse({ directory }: Template): void {
    const now = new Date();
    try {
      utimesSync(path.join(directory, recordName), now, now);
    } catch {
      // It was removed just now, which the restore will find.
    }
  }

  async #verifyOrMake(
    template: Template,
    parts: TemplateParts,
    request: TemplateRequest,
    signal: AbortSignal,
  ): Promise<void> {
    const { key, directory, driver } = template;
    try {
      using _lock = await this.#lock(signal);
      if (!(await this.#isWhole(template, signal))) await this.#make(template, parts, request, signal);
      const identity = identityOf(directory, driver.files);
      if (identity !== undefined) this.#verified.set(key, identity);
    } catch (error) {
      signal.throwIfAborted();
      this.counts.buildsFailed += 1;
      this.#failed.set(key, performance.now() + retryAfterMs);
      this.#options.logger.warn({ err: error, template: key }, 'cannot make a template: virtual machines boot instead');
    }
  }

  /** Whether it is there, and as it was made; one that is not is removed. */
  async #isWhole({ key, directory, driver }: Template, signal: AbortSignal): Promise<boolean> {
    try {
      const { parts, sha256 } = readTemplateRecord(directory);
      // One that was made for another host, and copied here, would crash or miscalculate, and not fail.
      if (templateKey(parts) !== key)
        throw new KilnError('invalid-argument', `${directory} was made for something else`);
      if ((await digestOf(directory, driver.files, signal)) === sha256) return true;
      throw new KilnError('invalid-argument', `the files in ${directory} are not what they were`);
    } catch (error) {
      signal.throwIfAborted();
      if (!(error instanceof KilnError && error.code === 'not-found')) {
        this.counts.damaged += 1;
        this.#options.logger.warn({ err: error, template: key }, 'a template is damaged, and made anew');
      }
      await rm(directory, { recursive: true, force: true });
      return false;
    }
  }

  async #make(
    { key, directory, driver }: Template,
    parts: TemplateParts,
    { shape, bootTimeoutMs }: TemplateRequest,
    signal: AbortSignal,
  ): Promise<void> {
    const { logger, takeTurn, makeBlank, build = buildTemplate } = this.#options;
    const fresh = `${directory}${newSuffix}`;
    await this.#remove(fresh);
    this.#requireRoom(shape.memoryMib);
    const startedAt = performance.now();
    try {
      await mkdir(fresh, { mode: 0o700 });
      {
        using _turn = await takeTurn(signal);
        await build(fresh, { driver, shape, limitMs: bootTimeoutMs, makeBlank }, signal);
      }
      const sha256 = await digestOf(fresh, driver.files, signal);
      writeTemplateRecord(fresh, { version: 1, parts, madeAt: new Date().toISOString(), sha256 });
      await rename(fresh, directory);
    } catch (error) {
      await rm(fresh, { recursive: true, force: true });
      throw error;
    }
    this.counts.built += 1;
    const ms = Math.round(performance.now() - startedAt);
    const { memoryMib, vcpus } = shape;
    logger.info({ template: key, memoryMib, vcpus, ms, bytes: sizeOf(directory, driver.files) }, 'made a template');
  }

  /** With what a kilnd that was killed has left running in it. */
  async #remove(directory: string): Promise<void> {
    await this.#options.endRemains(vmDirectoryIn(directory));
    await rm(directory, { recursive: true, force: true });
  }

  /** A file that is mapped has no other error for a full disk than the end of who writes to it. */
  #requireRoom(memoryMib: number): void {
    const { bavail, bsize } = statfsSync(this.#directory);
    const freeMib = Math.floor((bavail * bsize) / mib);
    if (freeMib >= memoryMib) return;
    throw new KilnError(
      'resource-exhausted',
      `a template of ${memoryMib} MiB of memory needs as much room in ${this.#directory}, which has ${freeMib} MiB`,
    );
  }

  async #lock(signal: AbortSignal): Promise<Disposable> {
    for (;;) {
      const lock = this.#tryLock();
      if (lock !== undefined) return lock;
      await delay(lockCheckMs, undefined, { signal });
    }
  }

  /** Whoever makes or removes templates holds it, of all kilnds that share the cache. */
  #tryLock(): Disposable | undefined {
    const fd = openSync(path.join(this.#directory, lockName), 'a', 0o600);
    if (flock(fd)) return { [Symbol.dispose]: () => closeSync(fd) };
    closeSync(fd);
    return undefined;
  }
}

const lockName = 'lock';
const newSuffix = '.new';

/** Undefined when something that a VM needs is missing, which its boot tells better. */
function partsOf(driver: TemplateDriver, shape: VmShape, host: HostFacts): TemplateParts | undefined {
  try {
    return templateParts(driver, shape, host);
  } catch {
    return undefined;
  }
}

/** What the files are, without looking into them; undefined when one is missing. */
function identityOf(directory: string, files: readonly string[]): string | undefined {
  try {
    return files.map((name) => fileIdentity(path.join(directory, name))).join('\n');
  } catch {
    return undefined;
  }
}
