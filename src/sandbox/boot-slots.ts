/**
 * Lets only so many virtual machines boot at a time; the others wait for their turn, in order. A boot is the CPU's alone, so
 * more at a time than it can do end no earlier, and with many each would take longer than a boot may.
 */
export class BootSlots {
  #free: number;
  /** Each gives the slot on to who waits; false when that one has given up. */
  readonly #waiting: (() => boolean)[] = [];

  constructor(count: number) {
    this.#free = count;
  }

  /** Resolves when it is the caller's turn, which ends with the disposal. Rejects with the signal's reason. */
  async take(signal: AbortSignal): Promise<Disposable> {
    signal.throwIfAborted();
    if (this.#free > 0) this.#free -= 1;
    else await this.#wait(signal);
    return { [Symbol.dispose]: () => this.#give() };
  }

  #wait(signal: AbortSignal): Promise<void> {
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const onAbort = () => reject(signal.reason);
    signal.addEventListener('abort', onAbort, { once: true });
    this.#waiting.push(() => {
      signal.removeEventListener('abort', onAbort);
      resolve();
      return !signal.aborted;
    });
    return promise;
  }

  #give(): void {
    for (let next = this.#waiting.shift(); next !== undefined; next = this.#waiting.shift()) if (next()) return;
    this.#free += 1;
  }
}
