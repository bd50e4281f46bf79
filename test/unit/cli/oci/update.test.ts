import { describe, expect, it } from 'vitest';
import { resourcesOf } from '../../../../src/cli/oci/update-command.ts';
import { parseLimitResources } from '../../../../src/oci/limits.ts';
import { errorOf } from '../../oci/specs.ts';

describe('flags of `kiln update`', () => {
  it.each([
    [{ memory: '256m' }, { memory: { limit: 268_435_456 } }],
    [{ memory: '1.5GiB' }, { memory: { limit: 1_610_612_736 } }],
    [{ memory: '100' }, { memory: { limit: 100 } }],
    [{ memory: '-1', memorySwap: '-1' }, { memory: { limit: -1, swap: -1 } }],
    [{ memoryReservation: '64kb' }, { memory: { reservation: 65_536 } }],
    [{ cpuQuota: '50000', cpuPeriod: '100000' }, { cpu: { quota: 50_000, period: 100_000 } }],
    [{ cpuShare: '512', cpuBurst: '10', cpuIdle: '1' }, { cpu: { shares: 512, burst: 10, idle: 1 } }],
    [{ cpusetCpus: '0-1', cpusetMems: '0' }, { cpu: { cpus: '0-1', mems: '0' } }],
    [{ pidsLimit: '-1' }, { pids: { limit: -1 } }],
    [{ blkioWeight: '500' }, { blockIO: { weight: 500 } }],
    [{ kernelMemory: '1m', kernelMemoryTcp: '1m' }, {}],
    [{ memory: '' }, {}],
    [{}, {}],
  ])('%j become resources', (options, resources) => {
    expect(JSON.parse(resourcesOf(options))).toEqual(resources);
    parseLimitResources(resourcesOf(options));
  });

  it.each([
    [{ memory: 'zz' }, 'invalid value for memory: zz'],
    [{ memory: '1q' }, 'invalid value for memory: 1q'],
    [{ memoryReservation: '-2' }, 'invalid value for memory-reservation: -2'],
    [{ cpuQuota: '1.5' }, 'invalid value for cpu-quota: 1.5'],
    [{ pidsLimit: '99999999999999999999' }, 'invalid value for pids-limit: 99999999999999999999'],
  ])('%j are refused in runc’s words', (options, message) => {
    expect(errorOf(() => resourcesOf(options)).message).toBe(message);
  });

  it('that speak of what only the host has are refused by their names', () => {
    expect(errorOf(() => resourcesOf({ l3CacheSchema: 'L3:0=f' })).message).toMatch(/^--l3-cache-schema: /);
    expect(errorOf(() => resourcesOf({ memBwSchema: 'MB:0=10' })).message).toMatch(/^--mem-bw-schema: /);
  });
});
