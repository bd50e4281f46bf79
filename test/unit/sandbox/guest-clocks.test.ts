import { setImmediate as turn } from 'node:timers/promises';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { type ClockOwner, GuestClocks } from '../../../src/sandbox/guest-clocks.ts';

/** A guest that is asked, and answers when the test lets it. */
class Owner implements ClockOwner {
  asked = 0;
  readonly ended = Promise.withResolvers<void>();
  answer: () => Promise<{ byMs: number; stepped: boolean }> = async () => ({ byMs: 0, stepped: false });

  readonly guest = {
    correctClock: () => {
      this.asked += 1;
      return this.answer();
    },
  };
  readonly vm = {
    pid: 42,
    wait: async () => {
      await this.ended.promise;
      return { code: 0, signal: null, guestStopped: false, consoleTail: '' };
    },
  };
}

describe('the clocks of guests', () => {
  let steadyMs: number;
  /** What the host's wall clock was set by. */
  let setByMs: number;
  let lines: { level: string; msg: string }[];
  let clocks: GuestClocks;

  beforeEach(() => {
    vi.useFakeTimers({ toFake: ['setInterval', 'clearInterval'] });
    [steadyMs, setByMs, lines] = [1000, 0, []];
    const destination = { write: (line: string) => void lines.push(JSON.parse(line)) };
    const logger = pino({ level: 'debug', formatters: { level: (level) => ({ level }) } }, destination);
    clocks = new GuestClocks({ logger, wallMs: () => 1e12 + setByMs + steadyMs, steadyMs: () => steadyMs });
  });
  afterEach(() => {
    clocks[Symbol.dispose]();
    vi.useRealTimers();
  });

  const pass = async (ms: number): Promise<void> => {
    for (let left = ms; left > 0; left -= 1000) {
      steadyMs += 1000;
      vi.advanceTimersByTime(1000);
      await turn();
    }
  };
  const kept = (count: number): Owner[] => {
    const owners = Array.from({ length: count }, () => new Owner());
    for (const owner of owners) clocks.keep(owner);
    return owners;
  };

  it('are looked at once a minute, and not before', async () => {
    const [owner] = kept(1) as [Owner];
    await pass(55_000);
    expect(owner.asked).toBe(0);
    await pass(10_000);
    expect(owner.asked).toBe(1);
    await pass(180_000);
    expect(owner.asked).toBe(4);
    expect(lines).toEqual([]);
  });

  it.each([3_600_000, -3_600_000, 150])('are looked at at once when the host sets its own by %d ms', async (byMs) => {
    const owners = kept(10);
    await pass(10_000);
    setByMs = byMs;
    await pass(5000);
    expect(owners.map(({ asked }) => asked)).toEqual(Array(10).fill(1));
    expect(lines).toMatchObject([{ level: 'info', byMs, guests: 10 }]);
    // Not again, and a minute later again.
    await pass(50_000);
    expect(owners.map(({ asked }) => asked)).toEqual(Array(10).fill(1));
    await pass(15_000);
    expect(owners.map(({ asked }) => asked)).toEqual(Array(10).fill(2));
  });

  it('are left alone when the host only slews its own', async () => {
    const [owner] = kept(1) as [Owner];
    for (let times = 0; times < 10; times += 1) {
      setByMs += 15;
      await pass(5000);
    }
    expect(owner.asked).toBe(0);
  });

  it('are looked at a few at a time, however slow the guests are, and each once', async () => {
    const owners = kept(10);
    const { promise, resolve } = Promise.withResolvers<{ byMs: number; stepped: boolean }>();
    for (const owner of owners) owner.answer = () => promise;
    setByMs = 60_000;
    await pass(5000);
    const asked = () => owners.reduce((sum, owner) => sum + owner.asked, 0);
    expect(asked()).toBe(4);
    await pass(120_000);
    expect(asked()).toBe(4);
    resolve({ byMs: 0, stepped: false });
    await pass(5000);
    expect(owners.map((owner) => owner.asked)).toEqual(Array(10).fill(1));
  });

  it('that do not answer are asked again a minute later, and hold up no other', async () => {
    const [deaf, other] = kept(2) as [Owner, Owner];
    deaf.answer = () => Promise.reject(new Error('no answer'));
    await pass(65_000);
    expect([deaf.asked, other.asked]).toEqual([1, 1]);
    await pass(65_000);
    expect([deaf.asked, other.asked]).toEqual([2, 2]);
    expect(lines).toMatchObject([{ level: 'debug' }, { level: 'debug' }]);
  });

  it('that were wrong are told of: what was set, and quietly what catches up', async () => {
    const [set, slewed] = kept(2) as [Owner, Owner];
    set.answer = async () => ({ byMs: 7000, stepped: true });
    slewed.answer = async () => ({ byMs: 20, stepped: false });
    await pass(60_000);
    expect(lines).toMatchObject([
      { level: 'info', byMs: 7000, vmmPid: 42 },
      { level: 'debug', byMs: 20, vmmPid: 42 },
    ]);
  });

  it('are forgotten with their VMs, and with the last one the timer', async () => {
    const [one, other] = kept(2) as [Owner, Owner];
    one.ended.resolve();
    await pass(65_000);
    expect([one.asked, other.asked]).toEqual([0, 1]);
    other.ended.resolve();
    await turn();
    expect(vi.getTimerCount()).toBe(0);
    // One that comes later is looked after as the first was, whatever the host did meanwhile.
    setByMs = 60_000;
    const [late] = kept(1) as [Owner];
    await pass(55_000);
    expect(late.asked).toBe(0);
    await pass(5000);
    expect(late.asked).toBe(1);
  });
});
