import { describe, expect, it } from 'vitest';
import type { KilnError } from '../../../src/errors.ts';
import { type CurrentLimits, parseLimitResources, toLimitFiles } from '../../../src/oci/limits.ts';
import { promisedMemory, requireCpus } from '../../../src/oci/limits-check.ts';

const mib = 2 ** 20;
const current: CurrentLimits = {
  memoryUsageBytes: BigInt(20 * mib),
  memoryLimitBytes: BigInt(64 * mib),
  cpuQuotaUs: 50_000n,
  cpuPeriodUs: 100_000n,
};

/** `file=content` of each, in order. */
function files(resources: object, now: Partial<CurrentLimits> = {}): string[] {
  const parsed = parseLimitResources(JSON.stringify(resources));
  return toLimitFiles('c1', parsed, { ...current, ...now }).files.map(({ name, content }) => `${name}=${content}`);
}

function errorOf(action: () => unknown): string {
  try {
    action();
    return 'no error';
  } catch (error) {
    const { code, message } = error as KilnError;
    return `${code}: ${message}`;
  }
}

describe('limits of cgroup v1 as files of cgroup v2', () => {
  it.each([
    [{}, []],
    // Go writes what was not set as 0, "" and empty structs.
    [{ memory: { limit: 0, swap: 0 }, cpu: { shares: 0, quota: 0, period: 0, cpus: '' }, pids: { limit: 0 } }, []],
    [{ memory: { limit: 1048576 } }, ['memory.max=1048576']],
    [
      { memory: { limit: -1, swap: -1, reservation: 4096 } },
      ['memory.max=max', 'memory.swap.max=max', 'memory.low=4096'],
    ],
    [{ memory: { limit: 96 * mib, swap: 100 * mib } }, [`memory.max=${96 * mib}`, `memory.swap.max=${4 * mib}`]],
    [{ memory: { swap: 65 * mib } }, [`memory.swap.max=${mib}`]],
    [{ memory: { swap: 64 * mib } }, ['memory.swap.max=0']],
    [{ cpu: { shares: 2 } }, ['cpu.weight=1']],
    [{ cpu: { shares: 1024 } }, ['cpu.weight=39']],
    [{ cpu: { shares: 262144 } }, ['cpu.weight=10000']],
    [{ cpu: { shares: 999999 } }, ['cpu.weight=10000']],
    [{ cpu: { idle: 1 } }, ['cpu.idle=1']],
    [{ cpu: { idle: 0 } }, ['cpu.idle=0']],
    [{ cpu: { quota: 20000 } }, ['cpu.max=20000 100000']],
    [{ cpu: { quota: -1 } }, ['cpu.max=max 100000']],
    [{ cpu: { period: 50000 } }, ['cpu.max=50000 50000']],
    [{ cpu: { quota: 10, period: 20 } }, ['cpu.max=10 20']],
    [{ cpu: { burst: 500 } }, ['cpu.max.burst=500']],
    [{ cpu: { cpus: '0-1', mems: '0' } }, ['cpuset.cpus=0-1', 'cpuset.mems=0']],
    [{ pids: { limit: 12 } }, ['pids.max=12']],
    [{ pids: { limit: -1 } }, ['pids.max=max']],
    [{ blockIO: { weight: 10 } }, ['io.weight=1']],
    [{ blockIO: { weight: 1000 } }, ['io.weight=10000']],
    [{ unified: { 'memory.high': '7', 'io.max': '8:0 rbps=1' } }, ['memory.high=7', 'io.max=8:0 rbps=1']],
    // containerd's CRI sends the whole of what the container was made with.
    [{ devices: [{ allow: false, access: 'rwm' }], hugepageLimits: [{ pageSize: '2MB', limit: 0 }] }, []],
    [
      {
        hugepageLimits: [
          { pageSize: '2MB', limit: 4194304 },
          { pageSize: '1GB', limit: 0 },
        ],
      },
      ['hugetlb.2MB.max=4194304'],
    ],
  ])('%j', (resources, expected) => {
    expect(files(resources)).toEqual(expected);
  });

  it('that are as wanted already are left alone', () => {
    expect(files({ memory: { limit: 64 * mib }, cpu: { quota: 50_000, period: 100_000 }, pids: { limit: 5 } })).toEqual(
      ['pids.max=5'],
    );
    const none = { memoryLimitBytes: null, cpuQuotaUs: null };
    expect(files({ memory: { limit: -1 }, cpu: { quota: -1 } }, none)).toEqual([]);
  });

  it('keep an absent quota absent when only the period changes', () => {
    expect(files({ cpu: { period: 50_000 } }, { cpuQuotaUs: null })).toEqual(['cpu.max=max 50000']);
  });

  it.each([
    [
      { memory: { limit: 8 * mib, swap: mib } },
      'invalid-argument: a limit of 1048576 bytes for memory and swap is less',
    ],
    [
      { memory: { limit: -1, swap: mib } },
      'invalid-argument: a limit of 1048576 bytes for memory and swap needs a limit',
    ],
    [
      { memory: { limit: 8 * mib, checkBeforeUpdate: true } },
      'failed-precondition: a memory limit of 8388608 bytes is less than the 20971520 bytes in use',
    ],
    [{ memory: { kernel: 5 } }, 'unimplemented: resources.memory.kernel: cgroup v2'],
    [{ cpu: { realtimePeriod: 5 } }, 'unimplemented: resources.cpu.realtimePeriod: cgroup v2'],
    [
      { hugepageLimits: [{ pageSize: '64KB', limit: 1 }] },
      'invalid-argument: resources.hugepageLimits[0].pageSize: the guest has no huge pages of 64KB',
    ],
    [{ unified: { 'cgroup.procs': '1' } }, 'invalid-argument: resources.unified: "cgroup.procs" is no limit'],
    [{ unified: { '../x.y': '1' } }, 'invalid-argument: resources.unified: "../x.y" is no limit'],
  ])('that cannot be is refused: %j', (resources, expected) => {
    expect(errorOf(() => files(resources))).toContain(expected);
  });

  it('of memory may be below the use when nobody asks for a check', () => {
    expect(files({ memory: { limit: 8 * mib } })).toEqual([`memory.max=${8 * mib}`]);
  });

  it('of swap need a limit of memory', () => {
    expect(errorOf(() => files({ memory: { swap: mib } }, { memoryLimitBytes: null }))).toContain(
      'needs a limit of memory',
    );
  });

  it('keep every digit of a number beyond 2^53', () => {
    const { files: written } = toLimitFiles(
      'c1',
      parseLimitResources('{"memory":{"limit":9223372036854771712}}'),
      current,
    );
    expect(written).toEqual([{ name: 'memory.max', content: '9223372036854771712' }]);
  });

  it('that are no limits are refused with the place', () => {
    expect(errorOf(() => parseLimitResources('{'))).toContain('invalid-argument: the resources are not valid JSON');
    expect(errorOf(() => parseLimitResources('[]'))).toMatch(/^invalid-argument: resources: \$: /);
    expect(errorOf(() => parseLimitResources('{"hugepageLimits":7}'))).toMatch(
      /^invalid-argument: resources: hugepageLimits: /,
    );
    expect(errorOf(() => parseLimitResources('{"memory":{"limit":"1g"}}'))).toBe(
      'invalid-argument: resources: memory.limit: expected an integer',
    );
  });
});

describe('what a virtual machine can keep', () => {
  const check = (name: string, content: string, vcpus = 2) => errorOf(() => requireCpus([{ name, content }], vcpus));

  it('is the most memory that any limit promises', () => {
    expect(promisedMemory([])).toBe(0);
    expect(promisedMemory([{ name: 'memory.max', content: 'max' }])).toBe(0);
    expect(promisedMemory([{ name: 'pids.max', content: '99' }])).toBe(0);
    expect(
      promisedMemory([
        { name: 'memory.max', content: '8192' },
        { name: 'memory.low', content: '4096' },
      ]),
    ).toBe(8192);
  });

  it('is a quota of all its CPUs', () => {
    expect(check('cpu.max', '200000 100000')).toBe('no error');
    expect(check('cpu.max', 'max 100000')).toBe('no error');
    expect(check('cpu.max', '100001', 1)).toContain(
      'a CPU quota of 100001 µs in each 100000 µs is 1 CPUs, more than the 1',
    );
    expect(check('cpu.max', '250000 100000')).toContain(
      'resource-exhausted: a CPU quota of 250000 µs in each 100000 µs is 2.5 CPUs',
    );
  });

  it('are its CPUs and its one memory node', () => {
    expect(check('cpuset.cpus', '0-1')).toBe('no error');
    expect(check('cpuset.cpus', '0,1\n')).toBe('no error');
    expect(check('cpuset.cpus', '')).toBe('no error');
    expect(check('cpuset.cpus', '0,2')).toBe(
      'resource-exhausted: CPU 2 of "0,2" does not exist: the container\'s virtual machine has 2 CPUs, numbered from 0',
    );
    expect(check('cpuset.cpus', 'all')).toContain('invalid-argument: "all" is no list of CPUs');
    expect(check('cpuset.mems', '1')).toContain(
      'memory node 1 of "1" does not exist: the container\'s virtual machine has 1 memory node,',
    );
  });
});
