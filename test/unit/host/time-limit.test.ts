import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { TimeLimit } from '../../../src/host/time-limit.ts';

beforeEach(() => {
  vi.useFakeTimers();
});
afterEach(() => {
  vi.useRealTimers();
});

test('is over after its time', () => {
  using limit = new TimeLimit(100, new AbortController().signal);
  vi.advanceTimersByTime(99);
  expect([limit.signal.aborted, limit.expired]).toEqual([false, false]);
  vi.advanceTimersByTime(1);
  expect([limit.signal.aborted, limit.expired]).toEqual([true, true]);
  expect(limit.caused(limit.signal.reason)).toBe(true);
  expect(limit.caused(new Error('another'))).toBe(false);
});

test.each(['before', 'after'])('is over with the other signal, whose reason it has: aborted %s', (when) => {
  const other = new AbortController();
  const reason = new Error('not wanted');
  if (when === 'before') other.abort(reason);
  using limit = new TimeLimit(100, other.signal);
  if (when === 'after') other.abort(reason);
  expect(limit.signal.reason).toBe(reason);
  vi.advanceTimersByTime(100);
  expect([limit.expired, limit.caused(reason)]).toEqual([false, false]);
});

test('that was disposed of is never over, and has no timer', () => {
  const other = new AbortController();
  const limit = new TimeLimit(100, other.signal);
  limit[Symbol.dispose]();
  expect(vi.getTimerCount()).toBe(0);
  other.abort();
  expect(limit.signal.aborted).toBe(false);
});
