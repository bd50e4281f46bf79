import type { TaskEvent } from './topics.ts';

export interface AnnouncerOptions {
  /** `onSent` is to be called when containerd has the event. */
  readonly publish: (event: TaskEvent, onSent: () => void) => void;
  /** Called when containerd has got one more event. */
  readonly onChange: () => void;
}

/**
 * A task's events, each once: also when the kilnd that has sent one was killed before it could answer the request that
 * the event belongs to, and the request comes again.
 */
export class Announcer {
  readonly #options: AnnouncerOptions;
  /** Names of the events that containerd has. */
  readonly #sent: Set<string>;
  /** Names of the events that are on their way to containerd, each with what tells it from an earlier one of this name. */
  readonly #due = new Map<string, symbol>();

  /** @param sent what an earlier kilnd has written down of `sent` */
  constructor(options: AnnouncerOptions, sent: readonly string[] = []) {
    this.#options = options;
    this.#sent = new Set(sent);
  }

  /** The names of the events that containerd has. */
  get sent(): string[] {
    return [...this.#sent];
  }

  /** The names of the events that are published, and that containerd has not taken yet. */
  get due(): string[] {
    return [...this.#due.keys()];
  }

  /**
   * Publishes an event, unless containerd has it already, or it is on its way.
   *
   * @param name among the task's events
   */
  announce(name: string, event: TaskEvent): void {
    if (this.#sent.has(name) || this.#due.has(name)) return;
    const announcement = Symbol(name);
    this.#due.set(name, announcement);
    this.#options.publish(event, () => {
      // Forgotten meanwhile: the name is another process's.
      if (this.#due.get(name) !== announcement) return;
      this.#due.delete(name);
      this.#sent.add(name);
      this.#options.onChange();
    });
  }

  /** The names may be used again. */
  forget(...names: string[]): void {
    for (const name of names) {
      this.#sent.delete(name);
      this.#due.delete(name);
    }
  }
}
