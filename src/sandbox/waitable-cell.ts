/**
 * A value that is set once and awaited by many: the exit of a process, seen by Wait, State and Delete alike.
 * (The idea is runwasi's WaitableCell.)
 */
export class WaitableCell<T> {
  // Not the reactions of one promise: those cannot be taken back, and a container that runs for a year sees many
  // clients come and go.
  readonly #waiting = new Set<(value: T) => void>();
  #state: { set: false } | { set: true; value: T } = { set: false };

  /** How many wait now. */
  get waiting(): number {
    return this.#waiting.size;
  }

  /** Sets the value; a second call changes nothing, and says so by returning false. */
  set(value: T): boolean {
    if (this.#state.set) return false;
    this.#state = { set: true, value };
    for (const resolve of this.#waiting) resolve(value);
    return true;
  }

  /** The value, or undefined while it is not set. */
  peek(): T | undefined {
    return this.#state.set ? this.#state.value : undefined;
  }

  /** The value, as soon as it is set. An aborted signal rejects with its reason, unless the value is there already. */
  async wait(signal?: AbortSignal): Promise<T> {
    if (this.#state.set) return this.#state.value;
    signal?.throwIfAborted();
    const { promise, resolve, reject } = Promise.withResolvers<T>();
    const abort = () => reject(signal?.reason);
    this.#waiting.add(resolve);
    signal?.addEventListener('abort', abort, { once: true });
    try {
      return await promise;
    } finally {
      this.#waiting.delete(resolve);
      signal?.removeEventListener('abort', abort);
    }
  }
}
