import { describe, expect, it } from 'vitest';
import { toMetrics } from '../../../src/shim/metrics.ts';
import { taskStatsOf } from '../../../src/shim/runtime-stats.ts';
import { errorOf } from '../oci/specs.ts';
import { containerStats } from './stats.ts';

const unlimited = 2n ** 64n - 1n;
const unlimitedV1 = 9_223_372_036_854_771_712n;
const cpu = {
  usage: { total: 3_000_001_000n, kernel: 1_000_001_000n, user: 2_000_000_000n },
  throttling: { periods: 40n, throttledPeriods: 7n, throttledTime: 90_000_000n },
};
const traffic = (read: bigint, write: bigint) => [
  { op: 'Read', major: 254n, minor: 16n, value: read },
  { op: 'Write', major: 254n, minor: 16n, value: write },
];

describe('statistics as `runc events` prints them', () => {
  it('come of cgroup v2’s numbers', () => {
    const { stats, oomKills } = taskStatsOf(toMetrics(containerStats, 'unified'));
    expect(oomKills).toBe(5n);
    expect(stats.cpu).toEqual(cpu);
    expect(stats.pids).toEqual({ current: 3n, limit: 50n });
    expect(stats.memory).toMatchObject({
      cache: 102n,
      usage: { limit: 67_108_864n, usage: 4096n, max: 8192n, failcnt: 3n },
      swap: { limit: unlimited, usage: 4096n },
      raw: { anon: 101n, file_mapped: 108n, pgfault: 118n, thp_collapse_alloc: 120n },
    });
    expect(stats.memory.raw).not.toHaveProperty('usage_limit');
    expect(stats.blkio).toEqual({
      ioServiceBytesRecursive: traffic(1024n, 2048n),
      ioServicedRecursive: traffic(2n, 5n),
    });
  });

  it('come of cgroup v1’s numbers, under v1’s names', () => {
    const { stats, oomKills } = taskStatsOf(toMetrics(containerStats, 'legacy'));
    expect(oomKills).toBe(5n);
    expect(stats.cpu).toEqual(cpu);
    expect(stats.memory).toMatchObject({
      cache: 102n,
      usage: { limit: 67_108_864n, usage: 4096n, max: 8192n },
      swap: { limit: unlimitedV1, usage: 4096n },
      raw: { rss: 101n, pgfault: 118n, pgmajfault: 119n, hierarchical_memsw_limit: unlimitedV1, total_rss_huge: 111n },
    });
    expect(stats.blkio.ioServiceBytesRecursive).toContainEqual({ op: 'Total', major: 254n, minor: 16n, value: 3072n });
  });

  it('have no limit of processes as 0', () => {
    const without = { ...containerStats, pids: { current: 3n, limit: null } };
    for (const mode of ['unified', 'legacy'] as const) {
      expect(taskStatsOf(toMetrics(without, mode)).stats.pids.limit).toBe(0n);
    }
  });

  it('are refused in another form', () => {
    expect(errorOf(() => taskStatsOf({ typeUrl: 'x', value: Buffer.from('') })).message).toMatch(/type "x"/);
    expect(errorOf(() => taskStatsOf(undefined)).code).toBe('internal');
  });
});
