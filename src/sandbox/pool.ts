/**
 * Sandboxes that wait for a container: clones of a template, restored and connected, in which nothing of a user's has run
 * or ever will but the one container that takes it.
 *
 * How many wait follows what is asked for: as many as were taken in the busiest second of the last minute, between two
 * limits. There is a shelf for each template.
 */
import { randomUUID } from 'node:crypto';
import { mkdirSync } from 'node:fs';
import { mkdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { TimeLimit } from '../host/time-limit.ts';
import type { Logger } from '../observe/logger.ts';
import { type MakeBlank, prime } from '../template/prime.ts';
import type { Template, TemplateRequest, TemplateStore } from '../template/store.ts';
import type { BootSlots } from './boot-slots.ts';
import { restoreSandbox } from './bring-up.ts';
import type { Sandbox } from './sandbox.ts';

/** For how long what was taken counts, in ms. */
const demandMs = 60_000;

/** What is taken within this time counts as taken at once, in ms. */
const atOnceMs = 1000;

/** How often shelves are looked through for what is too much, in ms. */
const reviewMs = 10_000;

/**
 * How long after a take, and after the last container was created, another one is made ready, in ms, where clones are cold:
 * that takes the CPU for so long that the container would start later for it.
 */
const coldRefillMs = 1000;

/** How many are made ready at a time where clones are cold: a container that comes meanwhile finds the other CPUs free. */
const coldRefills = 1;

/** How long a guest may take to answer before it counts as dead, in ms: nobody had it do anything. */
const answerMs = 2000;

/** How long a shelf is left as it is after a sandbox could not be put there, in ms. */
const retryAfterMs = 60_000;

export interface PoolLimits {
  /** Sandboxes that wait in any case. */
  readonly min: number;
  /** Sandboxes that wait at most; 0 for no pool. */
  readonly max: number;
}

export interface PoolOptions {
  /** For the directories of sandboxes. */
  readonly directory: string;
  readonly templates: Pick<TemplateStore, 'provide' | 'noteRestored' | 'noteFailure'>;
  readonly bootSlots: BootSlots;
  readonly makeBlank: MakeBlank;
  readonly logger: Logger;
}

/** The sandboxes of one template, as `kiln pool` shows them. */
export interface ShelfStatus {
  readonly template: string;
  readonly memoryMib: number;
  readonly vcpus: number;
  readonly waiting: number;
  readonly wanted: number;
  /** Containers that got a sandbox here. */
  readonly hits: number;
  /** Containers that found none, and were restored or booted. */
  readonly misses: number;
  /** Sandboxes that ended while they waited. */
  readonly died: number;
}

class Shelf {
  readonly key: string;
  readonly waiting: Sandbox[] = [];
  /** When sandboxes were asked for, `performance.now()`, oldest first. */
  readonly takes: number[] = [];
  request: TemplateRequest;
  limits: PoolLimits;
  /** The least number waits even if nobody has asked for a while. */
  kept = false;
  /** See TemplateDriver.clonesAreCold. */
  cold = false;
  refill: NodeJS.Timeout | undefined;
  filling = 0;
  hits = 0;
  misses = 0;
  died = 0;
  blockedUntil = 0;

  constructor(key: string, request: TemplateRequest, limits: PoolLimits) {
    this.key = key;
    this.request = request;
    this.limits = limits;
  }

  /** How many should wait. */
  get wanted(): number {
    const { min, max } = this.limits;
    const least = this.kept || this.takes.length > 0 ? min : 0;
    return Math.min(max, Math.max(least, busiest(this.takes)));
  }

  get isForgotten(): boolean {
    return !this.kept && this.takes.length === 0 && this.waiting.length === 0 && this.filling === 0;
  }

  /** Forgets what was taken long ago. */
  forget(now: number): void {
    while (this.takes[0] !== undefined && this.takes[0] < now - demandMs) this.takes.shift();
  }
}

/** The largest number of times that lie close together. */
function busiest(times: readonly number[]): number {
  let most = 0;
  let first = 0;
  for (const [index, time] of times.entries()) {
    while ((times[first] as number) < time - atOnceMs) first += 1;
    most = Math.max(most, index - first + 1);
  }
  return most;
}

export class SandboxPool implements AsyncDisposable {
  readonly #options: PoolOptions;
  readonly #shelves = new Map<string, Shelf>();
  readonly #closed = new AbortController();
  readonly #working = new Set<Promise<void>>();
  /** Containers that are being created. */
  #creating = 0;
  readonly #timer: NodeJS.Timeout;

  /** Makes the directory. */
  constructor(options: PoolOptions) {
    this.#options = options;
    mkdirSync(options.directory, { recursive: true, mode: 0o700 });
    this.#timer = setInterval(() => this.#review(), reviewMs);
    this.#timer.unref();
  }

  /** A sandbox that answers; undefined when none waits. It is the caller's then, and another one is made ready. */
  async take(template: Template, request: TemplateRequest, limits: PoolLimits): Promise<Sandbox | undefined> {
    if (limits.max === 0 || this.#closed.signal.aborted) return undefined;
    const shelf = this.#shelf(template, request, limits);
    shelf.takes.push(performance.now());
    try {
      for (let sandbox = shelf.waiting.shift(); sandbox !== undefined; sandbox = shelf.waiting.shift()) {
        if (await this.#answers(sandbox)) {
          shelf.hits += 1;
          sandbox.vm.leavePool();
          return sandbox;
        }
        shelf.died += 1;
      }
      shelf.misses += 1;
      return undefined;
    } finally {
      this.#fillAfter(shelf, shelf.cold ? coldRefillMs : 0);
    }
  }

  /** Until it is disposed of, a container is being created, which needs the CPU more than cold clones do that nobody waits for. */
  creating(): Disposable {
    this.#creating += 1;
    return {
      [Symbol.dispose]: () => {
        this.#creating -= 1;
        if (this.#creating > 0) return;
        for (const shelf of this.#shelves.values()) if (shelf.cold) this.#fillAfter(shelf, coldRefillMs);
      },
    };
  }

  /** Makes the least number of sandboxes ready that the limits name, and keeps it so. */
  keep(template: Template, request: TemplateRequest, limits: PoolLimits): void {
    const shelf = this.#shelf(template, request, limits);
    shelf.kept = true;
    this.#fill(shelf);
  }

  status(): ShelfStatus[] {
    return Array.from(this.#shelves.values(), ({ key, request, waiting, wanted, hits, misses, died }) => {
      const { memoryMib, vcpus } = request.shape;
      return { template: key, memoryMib, vcpus, waiting: waiting.length, wanted, hits, misses, died };
    });
  }

  #shelf({ key, driver }: Template, request: TemplateRequest, limits: PoolLimits): Shelf {
    const shelf = this.#shelves.get(key) ?? new Shelf(key, request, limits);
    this.#shelves.set(key, shelf);
    // The configuration may have changed.
    Object.assign(shelf, { request, limits, cold: driver.clonesAreCold });
    return shelf;
  }

  /** Whether the guest answers; its clock is right then, too. One that does not is ended. */
  async #answers(sandbox: Sandbox): Promise<boolean> {
    try {
      await sandbox.guest.checkClock(answerMs);
      return true;
    } catch (error) {
      this.#options.logger.warn({ err: error, vmmPid: sandbox.vm.pid }, 'a waiting virtual machine does not answer');
      await this.#end(sandbox);
      return false;
    }
  }

  #fillAfter(shelf: Shelf, ms: number): void {
    if (shelf.refill !== undefined) return;
    shelf.refill = setTimeout(() => {
      shelf.refill = undefined;
      this.#fill(shelf);
    }, ms);
    shelf.refill.unref();
  }

  #fill(shelf: Shelf): void {
    if (shelf.cold && this.#creating > 0) return;
    const most = shelf.cold ? coldRefills : Number.POSITIVE_INFINITY;
    while (shelf.filling < most && shelf.waiting.length + shelf.filling < shelf.wanted) {
      if (this.#closed.signal.aborted || performance.now() < shelf.blockedUntil) return;
      shelf.filling += 1;
      this.#work(this.#add(shelf));
    }
  }

  /** Notes what has to be over before the pool is closed. */
  #work(step: Promise<void>): void {
    this.#working.add(step);
    void step.finally(() => this.#working.delete(step));
  }

  /** Puts one sandbox on the shelf. Never rejects. */
  async #add(shelf: Shelf): Promise<void> {
    const { signal } = this.#closed;
    try {
      const sandbox = await this.#restore(shelf.request, signal);
      shelf.waiting.push(sandbox);
      void sandbox.vm.wait().then(() => this.#onEnd(shelf, sandbox));
    } catch (error) {
      if (signal.aborted) return;
      shelf.blockedUntil = performance.now() + retryAfterMs;
      this.#options.logger.warn(
        { err: error, template: shelf.key },
        'cannot make a virtual machine ready for the pool',
      );
    } finally {
      shelf.filling -= 1;
    }
    // More may be wanted meanwhile, or less.
    this.#fill(shelf);
  }

  async #restore(request: TemplateRequest, signal: AbortSignal): Promise<Sandbox> {
    const { templates, bootSlots, makeBlank, logger } = this.#options;
    const template = await templates.provide(request, signal);
    if (template === undefined) throw new Error('there is no template');
    const { vmm, shape, bootTimeoutMs } = request;
    using _slot = await bootSlots.take(signal);
    const directory = path.join(this.#options.directory, randomUUID().slice(0, 8));
    await using stack = new AsyncDisposableStack();
    stack.defer(() => rm(directory, { recursive: true, force: true }));
    await mkdir(directory, { mode: 0o700 });
    const vm = { ...shape, id: 'pool', directory, pooled: true };
    const options = { vmm, vm, ownsDirectory: true, bootTimeoutMs, logger, mark: () => {} };
    let sandbox: Sandbox;
    try {
      sandbox = stack.use(await restoreSandbox(template, options, signal));
      templates.noteRestored(sandbox.guest.facts.bootId);
    } catch (error) {
      if (!signal.aborted) templates.noteFailure(template, error);
      throw error;
    }
    if (template.driver.clonesAreCold) {
      const { guest, vm: restored } = sandbox;
      using limit = new TimeLimit(bootTimeoutMs, signal);
      await prime({ guest, vm: restored, directory, makeBlank }, limit.signal);
      await guest.checkClock(bootTimeoutMs);
    }
    signal.throwIfAborted();
    stack.move();
    return sandbox;
  }

  /** A VM has ended, maybe while it waited. */
  #onEnd(shelf: Shelf, sandbox: Sandbox): void {
    const at = shelf.waiting.indexOf(sandbox);
    if (at === -1) return;
    shelf.waiting.splice(at, 1);
    shelf.died += 1;
    this.#options.logger.warn(
      { vmmPid: sandbox.vm.pid },
      'a virtual machine has ended while it waited for a container',
    );
    this.#work(this.#end(sandbox));
    this.#fill(shelf);
  }

  /** Ends what is more than wanted, and forgets shelves that nobody asks for. */
  #review(): void {
    for (const shelf of this.#shelves.values()) {
      shelf.forget(performance.now());
      while (shelf.waiting.length > shelf.wanted) this.#work(this.#end(shelf.waiting.shift() as Sandbox));
      this.#fill(shelf);
      if (shelf.isForgotten) this.#shelves.delete(shelf.key);
    }
  }

  async #end(sandbox: Sandbox): Promise<void> {
    try {
      await sandbox[Symbol.asyncDispose]();
    } catch (error) {
      this.#options.logger.error({ err: error }, 'cannot end a virtual machine of the pool');
    }
  }

  /** Ends all that wait. */
  async [Symbol.asyncDispose](): Promise<void> {
    clearInterval(this.#timer);
    this.#closed.abort(new Error('the pool is closed'));
    await Promise.all(this.#working);
    const waiting = [...this.#shelves.values()].flatMap((shelf) => shelf.waiting.splice(0));
    await Promise.all(waiting.map((sandbox) => this.#end(sandbox)));
  }
}
