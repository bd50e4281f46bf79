/**
 * So many lines a minute, and no more: a guest can make its VMM complain without end.
 */
export class LineLimit {
  readonly #perMinute: number;
  #minute = 0;
  #count = 0;

  constructor(perMinute: number) {
    this.#perMinute = perMinute;
  }

  /**
   * Asks for one line more.
   *
   * @param nowMs of any clock that only goes forward
   * @returns 'last' for the one after which there is none until the next minute
   */
  take(nowMs: number): 'yes' | 'last' | 'no' {
    const minute = Math.floor(nowMs / 60_000);
    if (minute !== this.#minute) {
      this.#minute = minute;
      this.#count = 0;
    }
    this.#count += 1;
    if (this.#count === this.#perMinute) return 'last';
    return this.#count < this.#perMinute ? 'yes' : 'no';
  }
}
