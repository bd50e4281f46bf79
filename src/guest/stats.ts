import type { ReadStatsResponse } from '../../gen/kiln/agent/v1/agent.ts';

/**
 * What a container uses in its guest, as cgroup v2 counts it. The keys of the records are the kernel's
 * (Documentation/admin-guide/cgroup-v2.rst); one that the guest's kernel lacks is not there.
 */
export interface ContainerStats {
  /** cpu.stat. */
  readonly cpu: Readonly<Record<string, bigint>>;
  readonly cpuMax: {
    /** Microseconds of CPU time in each period; null for no limit. */
    readonly quotaUs: bigint | null;
    readonly periodUs: bigint;
  };
  readonly memory: {
    /** memory.stat. */
    readonly stat: Readonly<Record<string, bigint>>;
    /** memory.events; `oom_kill` counts the victims of an OOM of the whole VM, too. */
    readonly events: Readonly<Record<string, bigint>>;
    readonly usageBytes: bigint;
    /** Null for no limit. */
    readonly limitBytes: bigint | null;
    /** The most that was ever used; 0 where the kernel does not know (before 5.19). */
    readonly peakBytes: bigint;
    readonly swapUsageBytes: bigint;
    readonly swapLimitBytes: bigint | null;
  };
  readonly pids: { readonly current: bigint; readonly limit: bigint | null };
  /** By the device's numbers in the guest. */
  readonly io: readonly IoUse[];
}

export interface IoUse {
  readonly major: number;
  readonly minor: number;
  readonly readBytes: bigint;
  readonly writtenBytes: bigint;
  readonly reads: bigint;
  readonly writes: bigint;
}

/**
 * The largest count that is believed: 285 years in microseconds, 8 PiB. A guest may say anything, and what is made of
 * the counts (sums, nanoseconds) has to fit 64 bits.
 */
const largestCount = 2n ** 53n;

/** Block devices that are told of. A guest has as many as its VM has disks, and can make some more. */
const maxDevices = 1024;

const bounded = (count: bigint): bigint => (count > largestCount ? largestCount : count);

function boundedAll(counts: Readonly<Record<string, bigint>>): Record<string, bigint> {
  return Object.fromEntries(Object.entries(counts).map(([name, count]) => [name, bounded(count)]));
}

export function toContainerStats(response: ReadStatsResponse): ContainerStats {
  const { cpu, memory, memoryEvents, io, cpuQuotaUs, cpuPeriodUs } = response;
  const values = boundedAll(response.values);
  return {
    cpu: boundedAll(cpu),
    cpuMax: { quotaUs: cpuQuotaUs === undefined ? null : bounded(cpuQuotaUs), periodUs: bounded(cpuPeriodUs) },
    memory: {
      stat: boundedAll(memory),
      events: boundedAll(memoryEvents),
      usageBytes: values['memory.current'] ?? 0n,
      limitBytes: values['memory.max'] ?? null,
      peakBytes: values['memory.peak'] ?? 0n,
      swapUsageBytes: values['memory.swap.current'] ?? 0n,
      swapLimitBytes: values['memory.swap.max'] ?? null,
    },
    pids: { current: values['pids.current'] ?? 0n, limit: values['pids.max'] ?? null },
    io: io.slice(0, maxDevices).map(({ major, minor, rbytes, wbytes, rios, wios }) => ({
      ...{ major, minor },
      ...{ readBytes: bounded(rbytes), writtenBytes: bounded(wbytes), reads: bounded(rios), writes: bounded(wios) },
    })),
  };
}
