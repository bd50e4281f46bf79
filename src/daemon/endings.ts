/** How many are remembered; a relay that was not told comes within seconds. */
const limit = 10_000;

/**
 * Which endpoints have ended, and when: a relay of one may come later, because it was just connecting, or had lost kilnd.
 * It is then told to end, not taken for a new one. The time is that of the launcher (CLOCK_REALTIME, ns), so that a
 * `start` of the same container after the end is not meant.
 */
export class Endings {
  readonly #endedAt = new Map<string, bigint>();

  add(key: string, at: bigint): void {
    this.#endedAt.delete(key);
    this.#endedAt.set(key, at);
    const [oldest] = this.#endedAt.keys();
    if (this.#endedAt.size > limit && oldest !== undefined) this.#endedAt.delete(oldest);
  }

  /** For a new `start`: relays that were started earlier are then known by the endpoint's own start. */
  forget(key: string): void {
    this.#endedAt.delete(key);
  }

  /** Whether a relay whose launcher was started at `startedAt` belongs to an endpoint that has ended. */
  covers(key: string, startedAt: bigint): boolean {
    return startedAt <= (this.#endedAt.get(key) ?? -1n);
  }
}
