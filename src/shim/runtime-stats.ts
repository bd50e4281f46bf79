/**
 * What a task uses, in the JSON of `runc events` (runc, types/events.go): the answer to the task service's Stats, whichever
 * of the two cgroup versions' messages it is (metrics.ts). Times are in nanoseconds, sizes in bytes. As with runc, swap
 * counts memory and swap together, and 0 is no limit of processes.
 */
import * as v1 from '../../gen/containerd/metrics_v1.ts';
import * as v2 from '../../gen/containerd/metrics_v2.ts';
import type { Any } from '../../gen/google/protobuf/any.ts';
import { KilnError } from '../errors.ts';

interface MemoryEntry {
  readonly limit: bigint;
  readonly usage: bigint;
  readonly max: bigint;
  readonly failcnt: bigint;
}

interface BlkioEntry {
  readonly major: bigint;
  readonly minor: bigint;
  readonly op: string;
  readonly value: bigint;
}

export interface RuntimeStats {
  readonly cpu: {
    readonly usage: { readonly total: bigint; readonly kernel: bigint; readonly user: bigint };
    readonly throttling: {
      readonly periods: bigint;
      readonly throttledPeriods: bigint;
      readonly throttledTime: bigint;
    };
  };
  readonly cpuset: object;
  readonly memory: {
    readonly cache: bigint;
    readonly usage: MemoryEntry;
    readonly swap: MemoryEntry;
    readonly kernel: MemoryEntry;
    readonly kernelTCP: MemoryEntry;
    /** memory.stat, by the kernel's names. */
    readonly raw: Readonly<Record<string, bigint>>;
  };
  readonly pids: { readonly current: bigint; readonly limit: bigint };
  readonly blkio: {
    readonly ioServiceBytesRecursive: readonly BlkioEntry[];
    readonly ioServicedRecursive: readonly BlkioEntry[];
  };
  readonly hugetlb: object;
  readonly intel_rdt: object;
  readonly network_interfaces: null;
}

export interface TaskStats {
  readonly stats: RuntimeStats;
  /** Processes that were killed because memory ran out, since the container was made. */
  readonly oomKills: bigint;
}

/** v2's "no limit". */
const unlimited = 2n ** 64n - 1n;

/** @throws KilnError internal for an answer that is neither */
export function taskStatsOf(answer: Any | undefined): TaskStats {
  if (answer?.typeUrl === 'io.containerd.cgroups.v2.Metrics') return ofV2(v2.Metrics.decode(answer.value));
  if (answer?.typeUrl === 'io.containerd.cgroups.v1.Metrics') return ofV1(v1.Metrics.decode(answer.value));
  throw new KilnError('internal', `kilnd answered with statistics of type "${answer?.typeUrl ?? ''}"`);
}

const nothing = { cpuset: {}, hugetlb: {}, intel_rdt: {}, network_interfaces: null } as const;
const noMemory: MemoryEntry = { limit: 0n, usage: 0n, max: 0n, failcnt: 0n };

function ofV2(metrics: v2.Metrics): TaskStats {
  const cpu = v2.CPUStat.fromPartial(metrics.cpu ?? {});
  const events = v2.MemoryEvents.fromPartial(metrics.memoryEvents ?? {});
  const memory = v2.MemoryStat.fromPartial(metrics.memory ?? {});
  const { usage, usageLimit, maxUsage, swapUsage, swapLimit, swapMaxUsage: _, ...stat } = memory;
  const { current, limit } = v2.PidsStat.fromPartial(metrics.pids ?? {});
  const io = metrics.io?.usage ?? [];
  const both = swapLimit === unlimited || usageLimit === unlimited ? unlimited : usageLimit + swapLimit;
  const stats: RuntimeStats = {
    cpu: {
      usage: { total: cpu.usageUsec * 1000n, kernel: cpu.systemUsec * 1000n, user: cpu.userUsec * 1000n },
      throttling: {
        periods: cpu.nrPeriods,
        throttledPeriods: cpu.nrThrottled,
        throttledTime: cpu.throttledUsec * 1000n,
      },
    },
    memory: {
      cache: stat.file,
      usage: { limit: usageLimit, usage, max: maxUsage, failcnt: events.max },
      swap: { limit: both, usage: usage + swapUsage, max: 0n, failcnt: 0n },
      kernel: noMemory,
      kernelTCP: noMemory,
      raw: numbersOf(stat, (name) => name),
    },
    pids: { current, limit: limit === unlimited ? 0n : limit },
    blkio: {
      ioServiceBytesRecursive: io.flatMap((device) => readAndWrite(device, device.rbytes, device.wbytes)),
      ioServicedRecursive: io.flatMap((device) => readAndWrite(device, device.rios, device.wios)),
    },
    ...nothing,
  };
  return { stats, oomKills: events.oomKill };
}

function ofV1(metrics: v1.Metrics): TaskStats {
  const { usage, throttling } = v1.CPUStat.fromPartial(metrics.cpu ?? {});
  const { usage: memory, swap, kernel, kernelTcp, ...stat } = v1.MemoryStat.fromPartial(metrics.memory ?? {});
  const { ioServiceBytesRecursive, ioServicedRecursive } = v1.BlkIOStat.fromPartial(metrics.blkio ?? {});
  const stats: RuntimeStats = {
    cpu: {
      usage: { total: usage?.total ?? 0n, kernel: usage?.kernel ?? 0n, user: usage?.user ?? 0n },
      throttling: {
        periods: throttling?.periods ?? 0n,
        throttledPeriods: throttling?.throttledPeriods ?? 0n,
        throttledTime: throttling?.throttledTime ?? 0n,
      },
    },
    memory: {
      cache: stat.cache,
      usage: entry(memory),
      swap: entry(swap),
      kernel: entry(kernel),
      kernelTCP: entry(kernelTcp),
      raw: numbersOf(stat, nameInV1),
    },
    pids: v1.PidsStat.fromPartial(metrics.pids ?? {}),
    blkio: { ioServiceBytesRecursive, ioServicedRecursive },
    ...nothing,
  };
  return { stats, oomKills: metrics.memoryOomControl?.oomKill ?? 0n };
}

function entry(given: Partial<MemoryEntry> | undefined): MemoryEntry {
  const { limit = 0n, usage = 0n, max = 0n, failcnt = 0n } = given ?? {};
  return { limit, usage, max, failcnt };
}

function readAndWrite({ major, minor }: { major: bigint; minor: bigint }, read: bigint, write: bigint): BlkioEntry[] {
  return [
    { op: 'Read', major, minor, value: read },
    { op: 'Write', major, minor, value: write },
  ];
}

/** By the kernel's names: `anonThp` is anon_thp. */
function numbersOf(stat: object, rename: (name: string) => string): Record<string, bigint> {
  return Object.fromEntries(
    Object.entries(stat).flatMap(([name, value]: [string, unknown]) => {
      const snake = name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
      return typeof value === 'bigint' ? [[rename(snake), value] as const] : [];
    }),
  );
}

/** The names of the messages are nearly memory.stat's. */
function nameInV1(name: string): string {
  if (name === 'hierarchical_swap_limit') return 'hierarchical_memsw_limit';
  return name.replace(/pg_(pg_in|pg_out|fault|maj_fault)$/, (_, kind: string) => `pg${kind.replaceAll('_', '')}`);
}
