/** Runs steps that have the same key one after the other, and others side by side. */
export class Turns {
  readonly #last = new Map<string, Promise<unknown>>();

  /** How many keys have a step under way. */
  get size(): number {
    return this.#last.size;
  }

  /** Runs `step` when all earlier ones of its key have settled; resolves or rejects as it does. */
  async take<T>(key: string, step: () => Promise<T>): Promise<T> {
    const before = this.#last.get(key);
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#last.set(key, promise);
    try {
      await before;
      return await step();
    } finally {
      resolve();
      if (this.#last.get(key) === promise) this.#last.delete(key);
    }
  }
}
