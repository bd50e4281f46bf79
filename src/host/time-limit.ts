/**
 * A signal that is aborted when a time is over, or with another signal. One of `AbortSignal.timeout` goes off whether
 * anybody still waits or not, half a minute and more after a start, which costs half a millisecond each; disposing of this
 * one clears its timer. It keeps no process alive.
 */
export class TimeLimit implements Disposable {
  readonly #controller = new AbortController();
  readonly #within: AbortSignal | undefined;
  readonly #timer: NodeJS.Timeout;
  readonly #follow = () => this.#controller.abort(this.#within?.reason);
  #expired = false;

  /** @param within also aborts it, with its reason */
  constructor(ms: number, within?: AbortSignal) {
    this.#within = within;
    this.#timer = setTimeout(() => {
      if (this.signal.aborted) return;
      this.#expired = true;
      this.#controller.abort(new Error(`${ms} ms are over`));
    }, ms);
    this.#timer.unref();
    if (within?.aborted) this.#follow();
    else within?.addEventListener('abort', this.#follow, { once: true });
  }

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  /** The time was over, and that before the other signal was aborted. */
  get expired(): boolean {
    return this.#expired;
  }

  /** Whether what was thrown is the reason of an expired limit. */
  caused(error: unknown): boolean {
    return this.#expired && error === this.signal.reason;
  }

  [Symbol.dispose](): void {
    clearTimeout(this.#timer);
    this.#within?.removeEventListener('abort', this.#follow);
  }
}
