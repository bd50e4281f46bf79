/**
 * A value that is set once and awaited by many: the exit of a process, seen by Wait, State and Delete alike.
 * (The idea is runwasi's WaitableCell.)
 */
export class WaitableCell<T> {
  readonly #resolvers = Promise.withResolvers<T>();
  #state: { set: false } | { set: true; value: T } = { set: false };

  /** Sets the value; a second call changes nothing, and says so by returning false. */
  set(value: T): boolean {
    if (this.#state.set) return false;
    this.#state = { set: true, value };
    this.#resolvers.resolve(value);
    return true;
  }

  /** The value, or undefined while it is not set. */
  peek(): T | undefined {
    return this.#state.set ? this.#state.value : undefined;
  }

  wait(): Promise<T> {
    return this.#resolvers.promise;
  }
}
