/**
 * Takes back what a container was made of, in reverse order. A guest that ends with its container takes most of that with it: only
 * what has to reach the host's disks is done there.
 */
export class Undo implements AsyncDisposable {
  readonly #guestEnds: () => boolean;
  #stack = new AsyncDisposableStack();

  /** @param guestEnds whether the guest ends next; asked when it is time to take things back */
  constructor(guestEnds: () => boolean) {
    this.#guestEnds = guestEnds;
  }

  /** A step that is always done. */
  defer(step: () => void | Promise<void>): void {
    this.#stack.defer(step);
  }

  /** A step that leaves nothing to be done to a guest which ends. */
  deferWithin(step: () => void | Promise<void>): void {
    this.#stack.defer(() => (this.#guestEnds() ? undefined : step()));
  }

  use<T extends Disposable>(value: T): T {
    return this.#stack.use(value);
  }

  /** Hands all steps over to another one. */
  move(): Undo {
    const moved = new Undo(this.#guestEnds);
    moved.#stack = this.#stack.move();
    return moved;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#stack.disposeAsync();
  }
}
