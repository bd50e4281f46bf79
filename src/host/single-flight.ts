interface Flight {
  readonly done: Promise<void>;
  readonly controller: AbortController;
  waiting: number;
}

/**
 * One run of a task per key, however many ask for it at once. Each asker can give up alone; the task is aborted when
 * the last one has.
 */
export class SingleFlight {
  readonly #flights = new Map<string, Flight>();

  /**
   * Resolves when the task for `key` has, which this call starts unless it is under way.
   *
   * Rejects with the signal's reason when it is aborted; if nobody else waits, only after the task has ended, so that
   * it has cleaned up.
   */
  async run(key: string, signal: AbortSignal, task: (signal: AbortSignal) => Promise<void>): Promise<void> {
    signal.throwIfAborted();
    const flight = this.#flights.get(key) ?? this.#start(key, task);
    flight.waiting += 1;
    const aborted = Promise.withResolvers<never>();
    const onAbort = () => aborted.reject(signal.reason);
    signal.addEventListener('abort', onAbort, { once: true });
    try {
      await Promise.race([flight.done, aborted.promise]);
    } finally {
      signal.removeEventListener('abort', onAbort);
      flight.waiting -= 1;
      if (signal.aborted && flight.waiting === 0) {
        // Whoever asks from now on must not join a task that is ending.
        if (this.#flights.get(key) === flight) this.#flights.delete(key);
        flight.controller.abort(signal.reason);
        await flight.done.catch(() => {});
      }
    }
  }

  #start(key: string, task: (signal: AbortSignal) => Promise<void>): Flight {
    const controller = new AbortController();
    const done = task(controller.signal).finally(() => {
      if (this.#flights.get(key) === flight) this.#flights.delete(key);
    });
    // Each asker sees the failure in its own race.
    done.catch(() => {});
    const flight: Flight = { done, controller, waiting: 0 };
    this.#flights.set(key, flight);
    return flight;
  }
}
