/** Counters of many, added up by their names. */
export class CounterSums {
  readonly #maxNames: number;
  readonly #sums = new Map<string, number>();

  /** @param maxNames further ones are left out: they may be the choice of somebody else */
  constructor(maxNames: number) {
    this.#maxNames = maxNames;
  }

  readonly add = (name: string, by: number): void => {
    const sum = this.#sums.get(name);
    if (sum === undefined && this.#sums.size >= this.#maxNames) return;
    this.#sums.set(name, (sum ?? 0) + by);
  };

  get sums(): Readonly<Record<string, number>> {
    return Object.fromEntries(this.#sums);
  }
}
