import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import * as v1 from '../../../gen/containerd/metrics_v1.ts';
import * as v2 from '../../../gen/containerd/metrics_v2.ts';
import { hostCgroupMode, toMetrics } from '../../../src/shim/metrics.ts';
import { containerStats } from './stats.ts';

const unlimited = 2n ** 64n - 1n;
const unlimitedV1 = 9_223_372_036_854_771_712n;

describe('metrics on a host with unified cgroups', () => {
  const { typeUrl, value } = toMetrics(containerStats, 'unified');
  const metrics = v2.Metrics.decode(value);

  it('are of the type that containerd looks for', () => {
    expect(typeUrl).toBe('io.containerd.cgroups.v2.Metrics');
  });

  it('have every number in its place', () => {
    expect(metrics.pids).toEqual({ current: 3n, limit: 50n });
    expect(metrics.cpu).toEqual({
      ...{ usageUsec: 3_000_001n, userUsec: 2_000_000n, systemUsec: 1_000_001n },
      ...{ nrPeriods: 40n, nrThrottled: 7n, throttledUsec: 90_000n },
    });
    expect(metrics.memory).toMatchObject({
      ...{ anon: 101n, file: 102n, kernelStack: 104n, slab: 105n, sock: 106n, shmem: 107n, fileMapped: 108n },
      ...{ fileDirty: 109n, fileWriteback: 110n, anonThp: 111n, inactiveAnon: 112n, activeAnon: 113n },
      ...{ inactiveFile: 114n, activeFile: 115n, unevictable: 116n, slabReclaimable: 117n, slabUnreclaimable: 0n },
      ...{ pgfault: 118n, pgmajfault: 119n, thpCollapseAlloc: 120n },
      ...{ usage: 4096n, usageLimit: 67_108_864n, maxUsage: 8192n, swapUsage: 0n, swapLimit: unlimited },
    });
    expect(metrics.memoryEvents).toEqual({ low: 1n, high: 2n, max: 3n, oom: 4n, oomKill: 5n });
    expect(metrics.io?.usage).toEqual([{ major: 254n, minor: 16n, rbytes: 1024n, wbytes: 2048n, rios: 2n, wios: 5n }]);
  });

  it('say the largest number where there is no limit', () => {
    const without = { ...containerStats, memory: { ...containerStats.memory, limitBytes: null } };
    const decoded = v2.Metrics.decode(toMetrics({ ...without, pids: { current: 1n, limit: null } }, 'unified').value);
    expect([decoded.memory?.usageLimit, decoded.pids?.limit]).toEqual([unlimited, unlimited]);
  });
});

describe('metrics on a host with the older cgroups', () => {
  const { typeUrl, value } = toMetrics(containerStats, 'legacy');
  const metrics = v1.Metrics.decode(value);

  it('are of the type that containerd looks for', () => {
    expect(typeUrl).toBe('io.containerd.cgroups.v1.Metrics');
  });

  it('have times in nanoseconds', () => {
    expect(metrics.cpu).toEqual({
      usage: { total: 3_000_001_000n, user: 2_000_000_000n, kernel: 1_000_001_000n },
      throttling: { periods: 40n, throttledPeriods: 7n, throttledTime: 90_000_000n },
    });
  });

  it('have memory under the older names, and once more as totals', () => {
    const own = { cache: 102n, rss: 101n, rssHuge: 111n, mappedFile: 108n, dirty: 109n, writeback: 110n };
    expect(metrics.memory).toMatchObject({
      ...own,
      ...{ totalCache: 102n, totalRss: 101n, totalInactiveFile: 114n, totalPgMajFault: 119n, totalUnevictable: 116n },
      hierarchicalMemoryLimit: 67_108_864n,
      hierarchicalSwapLimit: unlimitedV1,
      usage: { limit: 67_108_864n, usage: 4096n, max: 8192n, failcnt: 3n },
      swap: { limit: unlimitedV1, usage: 4096n },
      kernel: { usage: 103n },
      kernelTcp: { usage: 106n },
    });
    expect(metrics.memoryOomControl).toEqual({ oomKillDisable: 0n, underOom: 0n, oomKill: 5n });
  });

  it('have reads and writes of each disk', () => {
    const device = { major: 254n, minor: 16n };
    expect(metrics.blkio).toEqual({
      ioServiceBytesRecursive: [
        { op: 'Read', value: 1024n, ...device },
        { op: 'Write', value: 2048n, ...device },
        { op: 'Total', value: 3072n, ...device },
      ],
      ioServicedRecursive: [
        { op: 'Read', value: 2n, ...device },
        { op: 'Write', value: 5n, ...device },
        { op: 'Total', value: 7n, ...device },
      ],
    });
  });

  it('say 0 processes, and the largest number of whole pages, where there is no limit', () => {
    const memory = { ...containerStats.memory, limitBytes: null, swapLimitBytes: 0n };
    const pids = { current: 1n, limit: null };
    const decoded = v1.Metrics.decode(toMetrics({ ...containerStats, memory, pids }, 'legacy').value);
    expect(decoded.memory?.usage?.limit).toBe(unlimitedV1);
    expect(decoded.memory?.swap?.limit).toBe(unlimitedV1);
    expect(decoded.pids?.limit).toBe(0n);
  });

  it('have a limit of memory and swap where both are limited', () => {
    const memory = { ...containerStats.memory, swapLimitBytes: 4096n };
    const decoded = v1.Metrics.decode(toMetrics({ ...containerStats, memory }, 'legacy').value);
    expect(decoded.memory?.swap?.limit).toBe(67_108_864n + 4096n);
  });
});

describe("the host's mode", () => {
  it('is legacy where something else than cgroup v2 is mounted, or nothing', () => {
    const folder = mkdtempSync(join(tmpdir(), 'kiln-mode-'));
    expect(hostCgroupMode(folder)).toBe('legacy');
    rmSync(folder, { recursive: true });
    expect(hostCgroupMode(folder)).toBe('legacy');
  });
});
