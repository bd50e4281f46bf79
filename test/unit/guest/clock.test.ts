import { describe, expect, test } from 'vitest';
import { type ClockReading, findCorrection, seemsRight, setClock } from '../../../src/guest/clock.ts';

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
    expect(seemsRight({ askedAt: 0, answeredAt: 100, guestMs })).toBe(right);
  });

  test('that took long says nothing of a clock', () => {
    expect(seemsRight({ askedAt: 0, answeredAt: 8000, guestMs: 100 })).toBe(false);
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
      expect(Math.abs(clocks.errorMs)).toBeLessThanOrEqual(20);
    }
  });

  test('that may be wrong by no more than a start allows keeps nobody waiting', async () => {
    const clocks = new Clocks(0, [7, 13]);
    await clocks.set();
    expect(clocks.moves).toEqual([0]);
  });

  test('that may be wrong by more is asked for again', async () => {
    const clocks = new Clocks(0, [0, 21], [7, 13]);
    await clocks.set();
    expect(Math.abs(clocks.errorMs)).toBeLessThanOrEqual(20);
    expect(clocks.moves).toHaveLength(2);
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
    expect(Math.abs(clocks.errorMs)).toBeLessThanOrEqual(20);
  });
});

describe('the correction of a clock', () => {
  const of = (errorMs: number, ...trips: (readonly [number, number])[]) => {
    const clocks = new Clocks(errorMs, ...trips);
    return findCorrection(async () => clocks.ask(0));
  };

  test.each([
    ['is right', 0],
    ['is almost right', -4],
  ])('that %s is none', async (_what, errorMs) => {
    expect(await of(errorMs)).toEqual({ byMs: 0, stepped: false });
  });

  test.each([
    ['slow by little', 30, false],
    ['fast by little', -30, false],
    ['slow by much', 5 * 3_600_000, true],
    ['fast by much', -60, true],
  ])('that is %s: step %d ms', async (_what, errorMs, stepped) => {
    const correction = await of(errorMs, [80, 80], [2, 2]);
    expect(correction.stepped).toBe(stepped);
    expect(Math.abs(correction.byMs - errorMs)).toBeLessThanOrEqual(5);
  });

  test('is none where no answer was quick enough to tell', async () => {
    expect(await of(30, [60, 0], [60, 0], [60, 0], [60, 0])).toEqual({ byMs: 0, stepped: false });
  });

  test('is, by slow answers, as good as they tell', async () => {
    const correction = await of(200, [60, 60], [60, 60], [60, 60], [60, 60]);
    expect(Math.abs(correction.byMs - 200)).toBeLessThanOrEqual(60);
  });

  test('is of the clock that the host has when it is set meanwhile', async () => {
    const clocks = new Clocks(0, [20, 20], [20, 20], [1, 1]);
    let asked = 0;
    const { byMs } = await findCorrection(async () => {
      asked += 1;
      if (asked === 2) {
        clocks.hostMs += 60_000;
        clocks.errorMs += 60_000;
      }
      return clocks.ask(0);
    });
    expect(Math.abs(byMs - 60_000)).toBeLessThanOrEqual(5);
  });
});
