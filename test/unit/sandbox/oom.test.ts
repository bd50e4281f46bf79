import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { OomReport } from '../../../src/sandbox/oom.ts';

describe('the report of processes killed for want of memory', () => {
  let told = 0;
  let report: OomReport;
  beforeEach(() => {
    vi.useFakeTimers();
    told = 0;
    report = new OomReport({ intervalMs: 1000 });
    report.listen(() => {
      told += 1;
    });
  });
  afterEach(() => vi.useRealTimers());

  it('tells at once, and of a number once', () => {
    report.count(0);
    expect(told).toBe(0);
    report.count(2);
    report.count(2);
    report.count(1);
    expect(told).toBe(1);
    vi.advanceTimersByTime(5000);
    expect(told).toBe(1);
  });

  it('tells once of all that comes within a second, and goes on so', () => {
    for (let kills = 1; kills <= 100; kills += 1) report.count(kills);
    expect(told).toBe(1);
    vi.advanceTimersByTime(1000);
    expect(told).toBe(2);
    report.count(101);
    expect(told).toBe(2);
    vi.advanceTimersByTime(1000);
    expect(told).toBe(3);
    vi.advanceTimersByTime(1000);
    report.count(102);
    expect(told).toBe(4);
  });

  it('tells what it still has when it is closed, and nothing after that', () => {
    report.count(1);
    report.count(2);
    report.close();
    expect(told).toBe(2);
    report.count(3);
    vi.advanceTimersByTime(5000);
    expect(told).toBe(2);
  });

  it('closes silently when all has been told', () => {
    report.count(1);
    report.close();
    expect(told).toBe(1);
  });

  it('takes nothing for a number that is none', () => {
    report.count(Number.NaN);
    expect(told).toBe(0);
  });
});
