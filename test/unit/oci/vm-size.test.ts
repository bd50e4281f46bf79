import { describe, expect, test } from 'vitest';
import { defaultConfig, parseConfig } from '../../../src/config/config.ts';
import { podVmSize, thisHost, vmSize } from '../../../src/oci/vm-size.ts';
import { ctrSpec, errorOf, withLinux } from './specs.ts';

const host = { memoryMib: 8192, cpus: 4 };
const mib = 1024 * 1024;
const limits = (resources: object) => withLinux({ resources });
const annotated = (annotations: Record<string, string>, resources: object = {}) => ({
  ...limits(resources),
  annotations,
});

describe("the virtual machine's memory", () => {
  test.each<[string, object, number]>([
    ['as configured without a limit', {}, 512],
    ['as configured for a small limit', { memory: { limit: 64 * mib } }, 512],
    ['the next power of two for limit and overhead', { memory: { limit: 1024 * mib } }, 2048],
    ['that, rounded up to whole MiB first', { memory: { limit: 896 * mib } }, 1024],
    ['more than that for a byte more', { memory: { limit: 896 * mib + 1 } }, 2048],
    ['as configured for -1, no limit', { memory: { limit: -1 } }, 512],
    ["as configured for v1's number for no limit", { memory: { limit: 9223372036854771712n } }, 512],
  ])('is %s', (_name, resources, expected) => {
    expect(vmSize(defaultConfig, limits(resources), host).memoryMib).toBe(expected);
  });

  test.each<[string, object, number]>([
    ['as configured without a limit', {}, 512],
    ['limit and overhead', { memory: { limit: 256 * mib } }, 384],
    ['that, rounded up a little', { memory: { limit: 256 * mib + 1 } }, 448],
    ['not too small for the guest', { memory: { limit: 10 * mib } }, 192],
  ])('of a pod is %s', (_name, resources, expected) => {
    expect(podVmSize(defaultConfig, limits(resources), host).memoryMib).toBe(expected);
    const spec = annotated({ 'io.kiln.memory_mib': '1000' }, resources);
    expect(podVmSize(defaultConfig, spec, host).memoryMib).toBe(1000);
  });

  test('is limit and overhead where the host has less than the power of two', () => {
    const spec = limits({ memory: { limit: 5000 * mib } });
    expect(vmSize(defaultConfig, spec, { memoryMib: 8000, cpus: 4 }).memoryMib).toBe(5128);
  });

  test('is limit and overhead, rounded up to whole MiB, without templates', () => {
    const config = parseConfig('[template]\nenabled = false', 'x');
    expect(vmSize(config, limits({ memory: { limit: 1024 * mib } }), host).memoryMib).toBe(1152);
    expect(vmSize(config, limits({ memory: { limit: 1024 * mib + 1 } }), host).memoryMib).toBe(1153);
  });

  test('is what the annotation says, whatever the limit', () => {
    const spec = annotated({ 'io.kiln.memory_mib': '256' }, { memory: { limit: 1024 * mib } });
    expect(vmSize(defaultConfig, spec, host).memoryMib).toBe(256);
  });

  test('beyond the host is refused, with who asked for it', () => {
    const refusal = (spec: Parameters<typeof vmSize>[1], config = defaultConfig): string => {
      const error = errorOf(() => vmSize(config, spec, host));
      expect(error.code).toBe('resource-exhausted');
      return error.message;
    };
    expect(refusal(limits({ memory: { limit: 8100 * mib } }))).toBe(
      "the memory limit of 8100 MiB and 128 MiB for the guest itself: more than the host's 8192 MiB of memory",
    );
    expect(refusal(annotated({ 'io.kiln.memory_mib': '9000' }))).toBe(
      "annotation io.kiln.memory_mib=9000: more than the host's 8192 MiB of memory",
    );
    expect(refusal(ctrSpec(), parseConfig('[vm]\nmemory_mib = 10000', 'x'))).toBe(
      "vm.memory_mib = 10000 in Kiln's configuration: more than the host's 8192 MiB of memory",
    );
  });
});

describe("the virtual machine's CPUs", () => {
  test.each<[string, object, number]>([
    ['as configured without a quota', {}, 1],
    ['as configured for quota -1', { cpu: { quota: -1, period: 100000 } }, 1],
    ['rounded up', { cpu: { quota: 150000, period: 100000 } }, 2],
    ['of the default period when none is given', { cpu: { quota: 300000 } }, 3],
    ["not more than the host's", { cpu: { quota: 6400000, period: 100000 } }, 4],
  ])('are %s', (_name, resources, expected) => {
    expect(vmSize(defaultConfig, limits(resources), host).vcpus).toBe(expected);
  });

  test('are what the annotation says, unless the host has fewer', () => {
    const spec = annotated({ 'io.kiln.vcpus': '3' }, { cpu: { quota: 100000 } });
    expect(vmSize(defaultConfig, spec, host).vcpus).toBe(3);
    expect(errorOf(() => vmSize(defaultConfig, annotated({ 'io.kiln.vcpus': '5' }), host)).message).toBe(
      'annotation io.kiln.vcpus=5: the host has 4 CPUs',
    );
  });
});

test('a bad annotation is refused', () => {
  expect(errorOf(() => vmSize(defaultConfig, annotated({ 'io.kiln.cpus': '1' }), host)).message).toContain(
    'did you mean io.kiln.vcpus?',
  );
});

test('this host has a CPU and memory', () => {
  expect(thisHost().cpus).toBeGreaterThan(0);
  expect(thisHost().memoryMib).toBeGreaterThan(100);
});
