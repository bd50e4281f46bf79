/**
 * Keeps the wall clocks of running guests right. A guest sets its clock at its start, and counts on by itself: away from the
 * host's clock where that is slewed (by up to 30 ms a minute, adjtime(3)), and without notice where that is set, or the host
 * was suspended.
 *
 * A question costs kilnd some half millisecond and wakes the guest; one a minute keeps a clock within those 30 ms, and of a
 * thousand guests costs less than one hundredth of a CPU. Whether the host's own clock was set is seen without any guest: the
 * distance between its wall clock and the one that is never set (CLOCK_MONOTONIC, which is slewed along, and stands still in
 * a suspended host). Then all guests are asked at once.
 */
import type { Guest } from '../guest/guest.ts';
import type { Logger } from '../observe/logger.ts';
import type { Vm } from '../vmm/vmm.ts';

/** How often a guest is asked, in ms. */
const checkMs = 60_000;

/** How often the host's clocks are compared, in ms. */
const lookMs = 5000;

/**
 * The host's clock was set when the distance has changed by more, in ms. What is less waits for the next minute: on a busy host
 * the two clocks are not read in the same moment.
 */
const stepMs = 100;

/** How long a guest may take to answer, in ms. One that takes longer is asked again a minute later. */
const answerMs = 5000;

/** Guests that are asked at a time: an answer that waits in kilnd tells less. */
const atOnce = 4;

/** What has a clock of its own: a sandbox. */
export interface ClockOwner {
  readonly guest: Pick<Guest, 'correctClock'>;
  readonly vm: Pick<Vm, 'pid' | 'wait'>;
}

export interface GuestClocksOptions {
  readonly logger: Logger;
  /** The host's clocks, in ms, for tests. */
  readonly wallMs?: () => number;
  readonly steadyMs?: () => number;
}

export class GuestClocks implements Disposable {
  readonly #logger: Logger;
  readonly #wallMs: () => number;
  readonly #steadyMs: () => number;
  /** Each with when it is to be asked next, by the steady clock. */
  readonly #dueAt = new Map<ClockOwner, number>();
  /** Those that are asked, or are to be. */
  readonly #asking = new Set<ClockOwner>();
  #queue: ClockOwner[] = [];
  #lanes = 0;
  /** Between the host's two clocks. */
  #distanceMs = 0;
  #timer: NodeJS.Timeout | undefined;

  constructor({ logger, wallMs = Date.now, steadyMs = () => performance.now() }: GuestClocksOptions) {
    this.#logger = logger;
    this.#wallMs = wallMs;
    this.#steadyMs = steadyMs;
  }

  /** From now on, until its VM ends, its clock is looked after. It must be right now. */
  keep(owner: ClockOwner): void {
    this.#dueAt.set(owner, this.#steadyMs() + checkMs);
    void owner.vm.wait().then(() => this.#forget(owner));
    if (this.#timer !== undefined) return;
    this.#distanceMs = this.#wallMs() - this.#steadyMs();
    this.#timer = setInterval(() => this.#look(), lookMs);
    this.#timer.unref();
  }

  #forget(owner: ClockOwner): void {
    this.#dueAt.delete(owner);
    if (this.#dueAt.size === 0) this[Symbol.dispose]();
  }

  #look(): void {
    const now = this.#steadyMs();
    const distanceMs = this.#wallMs() - now;
    const wasSet = Math.abs(distanceMs - this.#distanceMs) > stepMs;
    if (wasSet) {
      const byMs = Math.round(distanceMs - this.#distanceMs);
      this.#logger.info({ byMs, guests: this.#dueAt.size }, "the host's clock was set: so are those of the guests");
    }
    this.#distanceMs = distanceMs;
    for (const [owner, dueAt] of this.#dueAt) {
      if ((!wasSet && now < dueAt) || this.#asking.has(owner)) continue;
      this.#asking.add(owner);
      this.#queue.push(owner);
    }
    while (this.#lanes < atOnce && this.#lanes < this.#queue.length) void this.#askOneAfterAnother();
  }

  /** Never rejects. */
  async #askOneAfterAnother(): Promise<void> {
    this.#lanes += 1;
    for (let owner = this.#queue.shift(); owner !== undefined; owner = this.#queue.shift()) {
      if (this.#dueAt.has(owner)) await this.#ask(owner);
      this.#asking.delete(owner);
      if (this.#dueAt.has(owner)) this.#dueAt.set(owner, this.#steadyMs() + checkMs);
    }
    this.#lanes -= 1;
  }

  /** Never rejects. */
  async #ask({ guest, vm }: ClockOwner): Promise<void> {
    try {
      const { byMs, stepped } = await guest.correctClock(answerMs);
      if (stepped) this.#logger.info({ vmmPid: vm.pid, byMs }, "a guest's clock was wrong, and is set");
      else if (byMs !== 0) this.#logger.debug({ vmmPid: vm.pid, byMs }, "a guest's clock is made to catch up");
    } catch (error) {
      // A guest that is lost is noticed elsewhere.
      this.#logger.debug({ err: error, vmmPid: vm.pid }, "a guest's clock cannot be checked");
    }
  }

  /** Asks nobody any more, until there is somebody again. */
  [Symbol.dispose](): void {
    clearInterval(this.#timer);
    this.#timer = undefined;
    this.#dueAt.clear();
    this.#queue = [];
  }
}
