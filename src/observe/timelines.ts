import { Timeline } from './timeline.ts';

/** The timelines of the containers that were created last, whatever has become of them. */
export class Timelines {
  readonly #kept = new Map<string, Timeline>();
  readonly #limit: number;
  readonly #onStarted: (timeline: Timeline) => void;

  /**
   * @param limit how many are kept
   * @param onStarted called when the process of a container runs
   */
  constructor(limit: number, onStarted: (timeline: Timeline) => void = () => {}) {
    this.#limit = limit;
    this.#onStarted = onStarted;
  }

  /** A new one, which takes the place of that of an earlier container of this name. */
  begin(namespace: string, id: string): Timeline {
    const name = nameOf(namespace, id);
    const timeline = new Timeline((mark) => {
      if (mark === 'started') this.#onStarted(timeline);
    });
    // Last in the order of insertion, which is the order in which they go.
    this.#kept.delete(name);
    this.#kept.set(name, timeline);
    const [oldest] = this.#kept.keys();
    if (this.#kept.size > this.#limit && oldest !== undefined) this.#kept.delete(oldest);
    return timeline;
  }

  find(namespace: string, id: string): Timeline | undefined {
    return this.#kept.get(nameOf(namespace, id));
  }
}

/** Neither part can hold a slash (control/request.ts, isIdentifier). */
function nameOf(namespace: string, id: string): string {
  return `${namespace}/${id}`;
}
