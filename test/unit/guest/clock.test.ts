import { describe, expect, test } from 'vitest';
import { type ClockReading, mayBeRight, setClock } from '../../../src/guest/clock.ts';

/** A host and a guest whose clock is slow by `errorMs`; each question takes so long there and back. */
class Clocks {
  hostMs = 1_000_000;
  errorMs: number;
  readonly #trips: (readonly [thereMs: number, backMs: number])[];
  readonly moves: number[] = [];

  constructor(errorMs: number, ...trips: (readonly [number, number])[]) {
    this.errorMs = errorMs;
    this.#trips = trips;
  }

  ask(byMs: number): ClockReading {
    const [thereMs, backMs] = this.#trips.shift() ?? [1, 1];
    this.moves.push(byMs);
    const askedAt = this.hostMs;
    this.hostMs += thereMs;
    this.errorMs -= byMs;
    const guestMs = this.hostMs - this.errorMs;
    this.hostMs += backMs;
    return { askedAt, answeredAt: this.hostMs, guestMs };
  }

  async set(): Promise<void> {
    await setClock(this.ask(0), async (byMs) => this.ask(byMs));
  }
}

describe('a reading', () => {
  test.each([
    ['right at the answer', 100, true],
    ['right at the question', 0, true],
    ['fast by as much as an answer may take', 105, true],
    ['fast by more', 106, false],
    ['slow by more than the answer took', -6, false],
  ])('of a clock that is %s', (_what, guestMs, right) => {
    expect(mayBeRight({ askedAt: 0, answeredAt: 100, guestMs })).toBe(right);
  });
});

describe("the guest's clock", () => {
  test('that is right by a quick answer is left alone', async () => {
    const clocks = new Clocks(1, [1, 1]);
    await clocks.set();
    expect(clocks.moves).toEqual([0]);
  });

  test('that is wrong is right after it, however slow the first answer was', async () => {
    for (const trips of [[[0, 300]], [[300, 0]], [[150, 150]]] as const) {
      const clocks = new Clocks(3_600_000, ...trips);
      await clocks.set();
      expect(Math.abs(clocks.errorMs)).toBeLessThanOrEqual(5);
    }
  });

  test('is as right as slow answers tell, which are no reason to ask for ever', async () => {
    const clocks = new Clocks(250, [60, 0], [60, 0], [60, 0], [60, 0], [60, 0]);
    await clocks.set();
    expect(Math.abs(clocks.errorMs)).toBeLessThanOrEqual(30);
    expect(clocks.moves).toHaveLength(5);
  });

  test('is not made worse by an answer that is slower than one before', async () => {
    const clocks = new Clocks(100, [10, 10], [0, 400], [400, 0], [0, 400], [400, 0]);
    await clocks.set();
    expect(Math.abs(clocks.errorMs)).toBeLessThanOrEqual(10);
  });

  test("follows the host's when that is set meanwhile", async () => {
    const clocks = new Clocks(0, [20, 20], [20, 20], [1, 1]);
    let asked = 0;
    await setClock(clocks.ask(0), async (byMs) => {
      asked += 1;
      if (asked === 1) {
        clocks.hostMs += 60_000;
        clocks.errorMs += 60_000;
      }
      return clocks.ask(byMs);
    });
    expect(Math.abs(clocks.errorMs)).toBeLessThanOrEqual(5);
  });
});
