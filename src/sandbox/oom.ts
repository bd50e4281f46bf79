/**
 * Who was killed for want of memory, from two sources: the guest tells while the container runs, and its count is read
 * once more at the exit. Either may come first, so what counts is that the number grows.
 *
 * A guest may say what it likes, and as often: what is told is bounded in time.
 */
export class OomReport {
  readonly #intervalMs: number;
  readonly #onTold: () => void;
  #kills = 0;
  #listener: (() => void) | undefined;
  #timer: NodeJS.Timeout | undefined;
  /** It has grown again since the listener was told. */
  #pending = false;
  #closed = false;

  /**
   * @param options.intervalMs the least time from one call of the listener to the next
   * @param options.onTold called after the listener
   */
  constructor({ intervalMs = 1000, onTold = () => {} }: { intervalMs?: number; onTold?: () => void } = {}) {
    this.#intervalMs = intervalMs;
    this.#onTold = onTold;
  }

  /**
   * Calls `listener` when memory has run out, however many processes that has cost: at once, then once for all that came
   * within the interval. One listener.
   */
  listen(listener: () => void): void {
    this.#listener = listener;
  }

  /** Processes killed so far. */
  get kills(): number {
    return this.#kills;
  }

  /** @param kills processes killed so far */
  count(kills: number): void {
    if (this.#closed || !Number.isSafeInteger(kills) || kills <= this.#kills) return;
    this.#kills = kills;
    if (this.#timer === undefined) this.#tell();
    else this.#pending = true;
  }

  /** Tells what is still to be told, now; afterwards nothing. */
  close(): void {
    clearTimeout(this.#timer);
    this.#closed = true;
    if (this.#pending) this.#callListener();
    this.#pending = false;
  }

  #tell(): void {
    this.#pending = false;
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      if (this.#pending) this.#tell();
    }, this.#intervalMs).unref();
    this.#callListener();
  }

  #callListener(): void {
    this.#listener?.();
    this.#onTold();
  }
}
