/**
 * What a task uses, in the words that containerd expects: of cgroup v2 where the host's cgroups are unified, else of v1.
 *
 * containerd's own metrics and CRI's statistics decode whatever belongs to the host's mode and fail for all containers
 * when one answers in the other. The guest has v2 in any case. What v1 counts and v2 does not (memory by page traffic,
 * CPU time by processor) is 0.
 */
import { statfsSync } from 'node:fs';
import * as v1 from '../../gen/containerd/metrics_v1.ts';
import * as v2 from '../../gen/containerd/metrics_v2.ts';
import type { Any } from '../../gen/google/protobuf/any.ts';
import type { ContainerStats } from '../sandbox/container.ts';

export type CgroupMode = 'unified' | 'legacy';

/** CGROUP2_SUPER_MAGIC, linux/magic.h. */
const cgroup2Magic = 0x63677270;

/** "No limit" in v2's messages. */
const unlimited = 2n ** 64n - 1n;

/** "No limit" of memory in v1: the largest int64 in whole pages of 4 KiB (PAGE_COUNTER_MAX, linux/page_counter.h). */
const unlimitedV1 = 2n ** 63n - 4096n;

/**
 * The host's mode, found as containerd finds it (containerd/cgroups, Mode): a host with v1's controllers and v2 mounted
 * beside them counts as legacy.
 */
export function hostCgroupMode(mountPoint = '/sys/fs/cgroup'): CgroupMode {
  try {
    return statfsSync(mountPoint).type === cgroup2Magic ? 'unified' : 'legacy';
  } catch {
    return 'legacy';
  }
}

export function toMetrics(stats: ContainerStats, mode: CgroupMode): Any {
  if (mode === 'unified') {
    return { typeUrl: 'io.containerd.cgroups.v2.Metrics', value: v2.Metrics.encode(toV2(stats)).finish() as Buffer };
  }
  return { typeUrl: 'io.containerd.cgroups.v1.Metrics', value: v1.Metrics.encode(toV1(stats)).finish() as Buffer };
}

type Counts = Readonly<Record<string, bigint>>;

function toV2({ cpu, memory, pids, io }: ContainerStats): v2.Metrics {
  return {
    pids: { current: pids.current, limit: pids.limit ?? unlimited },
    cpu: v2.CPUStat.fromPartial(camelCased(cpu)),
    memory: {
      ...v2.MemoryStat.fromPartial(camelCased(memory.stat)),
      usage: memory.usageBytes,
      usageLimit: memory.limitBytes ?? unlimited,
      maxUsage: memory.peakBytes,
      swapUsage: memory.swapUsageBytes,
      swapLimit: memory.swapLimitBytes ?? unlimited,
    },
    memoryEvents: v2.MemoryEvents.fromPartial(camelCased(memory.events)),
    io: {
      usage: io.map(({ major, minor, readBytes, writtenBytes, reads, writes }) => ({
        ...{ major: BigInt(major), minor: BigInt(minor) },
        ...{ rbytes: readBytes, wbytes: writtenBytes, rios: reads, wios: writes },
      })),
    },
  };
}

/** The kernel's names are the messages' names: `usage_usec` is usageUsec. */
function camelCased(counts: Counts): Record<string, bigint> {
  const camel = (name: string) => name.replace(/_([a-z])/g, (_, letter: string) => letter.toUpperCase());
  return Object.fromEntries(Object.entries(counts).map(([name, count]) => [camel(name), count]));
}

function toV1({ cpu, memory, pids, io }: ContainerStats): v1.Metrics {
  const nanoseconds = (name: string) => count(cpu, name) * 1000n;
  return {
    pids: { current: pids.current, limit: pids.limit ?? 0n },
    cpu: {
      usage: {
        total: nanoseconds('usage_usec'),
        kernel: nanoseconds('system_usec'),
        user: nanoseconds('user_usec'),
      },
      throttling: {
        periods: count(cpu, 'nr_periods'),
        throttledPeriods: count(cpu, 'nr_throttled'),
        throttledTime: nanoseconds('throttled_usec'),
      },
    },
    memory: memoryV1(memory),
    memoryOomControl: { oomKillDisable: 0n, underOom: 0n, oomKill: count(memory.events, 'oom_kill') },
    blkio: {
      ioServiceBytesRecursive: io.flatMap((use) => operations(use, use.readBytes, use.writtenBytes)),
      ioServicedRecursive: io.flatMap((use) => operations(use, use.reads, use.writes)),
    },
  };
}

function memoryV1(memory: ContainerStats['memory']): v1.MemoryStat {
  const { stat, usageBytes, swapUsageBytes, peakBytes, swapLimitBytes } = memory;
  const limit = memory.limitBytes ?? unlimitedV1;
  const swapLimit = memory.limitBytes === null || swapLimitBytes === null ? unlimitedV1 : limit + swapLimitBytes;
  const failcnt = count(memory.events, 'max');
  const own = {
    cache: count(stat, 'file'),
    rss: count(stat, 'anon'),
    rssHuge: count(stat, 'anon_thp'),
    mappedFile: count(stat, 'file_mapped'),
    dirty: count(stat, 'file_dirty'),
    writeback: count(stat, 'file_writeback'),
    pgFault: count(stat, 'pgfault'),
    pgMajFault: count(stat, 'pgmajfault'),
    inactiveAnon: count(stat, 'inactive_anon'),
    activeAnon: count(stat, 'active_anon'),
    inactiveFile: count(stat, 'inactive_file'),
    activeFile: count(stat, 'active_file'),
    unevictable: count(stat, 'unevictable'),
  };
  return v1.MemoryStat.fromPartial({
    ...own,
    ...totals(own),
    hierarchicalMemoryLimit: limit,
    hierarchicalSwapLimit: swapLimit,
    usage: { limit, usage: usageBytes, max: peakBytes, failcnt },
    swap: { limit: swapLimit, usage: usageBytes + swapUsageBytes, max: peakBytes, failcnt: 0n },
    kernel: { limit: unlimitedV1, usage: count(stat, 'kernel'), max: 0n, failcnt: 0n },
    kernelTcp: { limit: unlimitedV1, usage: count(stat, 'sock'), max: 0n, failcnt: 0n },
  });
}

/** The same numbers under v1's names for a group and all below it: `cache` is totalCache. */
function totals(own: Counts): Record<string, bigint> {
  return Object.fromEntries(
    Object.entries(own).map(([name, value]) => [`total${name.charAt(0).toUpperCase()}${name.slice(1)}`, value]),
  );
}

function operations(device: { major: number; minor: number }, read: bigint, write: bigint): v1.BlkIOEntry[] {
  const [major, minor] = [BigInt(device.major), BigInt(device.minor)];
  return [
    { op: 'Read', major, minor, value: read },
    { op: 'Write', major, minor, value: write },
    { op: 'Total', major, minor, value: read + write },
  ];
}

function count(counts: Counts, name: string): bigint {
  return counts[name] ?? 0n;
}
