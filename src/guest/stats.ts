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

export function toContainerStats(response: ReadStatsResponse): ContainerStats {
  const { cpu, memory, memoryEvents, values, io, cpuQuotaUs, cpuPeriodUs } = response;
  return {
    cpu,
    cpuMax: { quotaUs: cpuQuotaUs ?? null, periodUs: cpuPeriodUs },
    memory: {
      stat: memory,
      events: memoryEvents,
      usageBytes: values['memory.current'] ?? 0n,
      limitBytes: values['memory.max'] ?? null,
      peakBytes: values['memory.peak'] ?? 0n,
      swapUsageBytes: values['memory.swap.current'] ?? 0n,
      swapLimitBytes: values['memory.swap.max'] ?? null,
    },
    pids: { current: values['pids.current'] ?? 0n, limit: values['pids.max'] ?? null },
    io: io.map(({ major, minor, rbytes, wbytes, rios, wios }) => {
      return { major, minor, readBytes: rbytes, writtenBytes: wbytes, reads: rios, writes: wios };
    }),
  };
}
