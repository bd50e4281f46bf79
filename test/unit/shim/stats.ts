import type { ContainerStats } from '../../../src/sandbox/container.ts';

/** A container's numbers, every one different. */
export const containerStats: ContainerStats = {
  cpu: {
    usage_usec: 3_000_001n,
    user_usec: 2_000_000n,
    system_usec: 1_000_001n,
    nr_periods: 40n,
    nr_throttled: 7n,
    throttled_usec: 90_000n,
  },
  cpuMax: { quotaUs: 50_000n, periodUs: 100_000n },
  memory: {
    stat: {
      anon: 101n,
      file: 102n,
      kernel: 103n,
      kernel_stack: 104n,
      slab: 105n,
      sock: 106n,
      shmem: 107n,
      file_mapped: 108n,
      file_dirty: 109n,
      file_writeback: 110n,
      anon_thp: 111n,
      inactive_anon: 112n,
      active_anon: 113n,
      inactive_file: 114n,
      active_file: 115n,
      unevictable: 116n,
      slab_reclaimable: 117n,
      pgfault: 118n,
      pgmajfault: 119n,
      thp_collapse_alloc: 120n,
      // A later kernel's.
      zswapped: 121n,
    },
    events: { low: 1n, high: 2n, max: 3n, oom: 4n, oom_kill: 5n, oom_group_kill: 6n },
    usageBytes: 4096n,
    limitBytes: 67_108_864n,
    peakBytes: 8192n,
    swapUsageBytes: 0n,
    swapLimitBytes: null,
  },
  pids: { current: 3n, limit: 50n },
  io: [{ major: 254, minor: 16, readBytes: 1024n, writtenBytes: 2048n, reads: 2n, writes: 5n }],
};
