import { describe, expect, test } from 'vitest';
import { applyAnnotations, parseAnnotations } from '../../../src/config/annotations.ts';
import { defaultConfig, parseConfig } from '../../../src/config/config.ts';
import type { KilnError } from '../../../src/errors.ts';

function errorOf(annotations: Record<string, string>): KilnError {
  try {
    parseAnnotations(annotations);
  } catch (error) {
    return error as KilnError;
  }
  throw new Error('no error was thrown');
}

describe('io.kiln.* annotations', () => {
  test('override the configuration', () => {
    const config = applyAnnotations(defaultConfig, {
      'io.kiln.memory_mib': '1024',
      'io.kiln.memory_max_mib': '4096',
      'io.kiln.vcpus': '2',
      'io.kiln.kernel': 'minimal',
      'io.kiln.vmm': 'firecracker',
      'io.kiln.writable_size_gib': '3',
      'io.kiln.disk_mib_per_s': '20',
      'io.kiln.disk_ops_per_s': '300',
      'io.kiln.network_mib_per_s': '7',
      'io.kiln.volume_cache': 'loose',
    });
    expect(config.vm).toEqual({
      ...defaultConfig.vm,
      memoryMib: 1024,
      memoryMaxMib: 4096,
      vcpus: 2,
      kernel: 'minimal',
      vmm: 'firecracker',
      networkMibPerS: 7,
    });
    expect(config.storage).toEqual({
      writableSizeGib: 3,
      changes: 'auto',
      diskMibPerS: 20,
      diskOpsPerS: 300,
      volumeCache: 'loose',
    });
  });

  test('that are absent leave the configuration as it is', () => {
    expect(applyAnnotations(defaultConfig, undefined)).toEqual(defaultConfig);
    expect(applyAnnotations(defaultConfig, { 'org.example.memory': '1' })).toEqual(defaultConfig);
  });

  test('that choose a kernel leave behind the initrd of the configured one', () => {
    const config = parseConfig('[vm]\nkernel = "/k"\ninitrd = "/i"', 'x');
    expect(applyAnnotations(config, { 'io.kiln.kernel': 'default' }).vm.initrd).toBeUndefined();
    expect(applyAnnotations(config, { 'io.kiln.vcpus': '2' }).vm.initrd).toBe('/i');
  });

  test('that are unknown are refused, with the one that was probably meant', () => {
    const error = errorOf({ 'io.kiln.memory': '512' });
    expect(error.code).toBe('invalid-argument');
    expect(error.message).toBe(
      'unknown annotation io.kiln.memory="512", did you mean io.kiln.memory_mib?; known are ' +
        'io.kiln.memory_mib, io.kiln.memory_max_mib, io.kiln.vcpus, io.kiln.kernel, io.kiln.vmm, ' +
        'io.kiln.writable_size_gib, io.kiln.changes, io.kiln.disk_mib_per_s, io.kiln.disk_ops_per_s, io.kiln.volume_cache, ' +
        'io.kiln.network_mib_per_s',
    );
    expect(errorOf({ 'io.kiln.constructor': '' }).message).toContain('unknown annotation');
  });

  test.each([
    ['io.kiln.memory_mib', '64', 'an integer from 128'],
    ['io.kiln.memory_mib', '512MiB', 'an integer from 128'],
    ['io.kiln.memory_max_mib', '64', '0 (no growth) or an integer from 128'],
    ['io.kiln.memory_mib', '1e3', 'an integer from 128'],
    ['io.kiln.memory_mib', '', 'an integer from 128'],
    ['io.kiln.vcpus', '0', 'an integer from 1 to 255'],
    ['io.kiln.vcpus', '-1', 'an integer from 1 to 255'],
    ['io.kiln.vcpus', '01', 'an integer from 1 to 255'],
    ['io.kiln.network_mib_per_s', '1 MiB', 'an integer from 0 (no limit) to 1000000 (MiB per second)'],
    ['io.kiln.disk_mib_per_s', '-1', 'an integer from 0 (no limit) to 1000000 (MiB per second)'],
    ['io.kiln.volume_cache', 'fscache', '"mmap", "none" or "loose"'],
    ['io.kiln.disk_ops_per_s', '1k', 'an integer from 0 (no limit) to 100000000 (requests per second)'],
    ['io.kiln.vmm', 'xen', '"auto", "qemu" or "firecracker"'],
    ['io.kiln.writable_size_gib', '1025', 'an integer from 1 to 1024 (GiB)'],
    ['io.kiln.kernel', '/boot/vmlinux', '"default" or "minimal"; a path can only be set in the host\'s config.toml'],
  ])('%s=%j is refused', (name, value, allowed) => {
    const error = errorOf({ [name]: value });
    expect(error.code).toBe('invalid-argument');
    expect(error.message).toContain(`annotation ${name}=${JSON.stringify(value)}: must be ${allowed}`);
  });
});
