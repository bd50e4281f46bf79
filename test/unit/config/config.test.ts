import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { defaultConfig, loadConfig, parseConfig } from '../../../src/config/config.ts';
import { closestMatch } from '../../../src/config/suggest.ts';
import type { KilnError } from '../../../src/errors.ts';

const guestDir = '/opt/kiln/guest';
let folder: string;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'kiln-config-'));
});

afterEach(() => {
  rmSync(folder, { recursive: true });
});

function errorOf(action: () => unknown): KilnError {
  try {
    action();
  } catch (error) {
    return error as KilnError;
  }
  throw new Error('no error was thrown');
}

const messageFor = (text: string): string => {
  const error = errorOf(() => parseConfig(text, '/etc/kiln/config.toml'));
  expect(error.code).toBe('invalid-argument');
  return error.message;
};

describe('the configuration file', () => {
  test('may be empty: everything has a default', () => {
    expect(parseConfig('', 'x')).toEqual(defaultConfig);
    expect(defaultConfig).toEqual({
      vm: {
        vmm: 'auto',
        memoryMib: 512,
        memoryMaxMib: 0,
        vcpus: 1,
        kernel: 'default',
        initrd: undefined,
        networkCards: 2,
        networkMibPerS: 0,
        bootTimeoutS: 60,
        accelerator: 'auto',
        translationMib: 0,
        translationIdleS: 60,
        qemu: 'qemu-system-x86_64',
        firecracker: 'firecracker',
        jail: 'auto',
        jailer: 'jailer',
        jailUidFirst: 1_900_000_000,
        jailUids: 65_536,
        hugePages: false,
        bootTimer: false,
        channel: 'auto',
      },
      template: { enabled: true, keepDays: 7, maxTotalMib: 4096 },
      pool: { min: 0, max: 0 },
      storage: { writableSizeGib: 10, changes: 'auto', diskMibPerS: 0, diskOpsPerS: 0, volumeCache: 'mmap' },
      daemon: { idleTimeoutS: 300, metricsAddress: '', logLevel: 'info' },
    });
  });

  test('sets every key', () => {
    const text = `
      [vm]
      vmm = "firecracker"
      memory_mib = 128
      memory_max_mib = 2048
      vcpus = 4
      kernel = "/boot/vmlinux"
      initrd = "/boot/initrd"
      network_cards = 4
      network_mib_per_s = 10
      boot_timeout_s = 5
      accelerator = "tcg"
      translation_mib = 16
      translation_idle_s = 30
      qemu = "/opt/qemu"
      firecracker = "/opt/firecracker"
      jail = "on"
      jailer = "/opt/jailer"
      jail_uid_first = 7000
      jail_uids = 8
      huge_pages = true
      boot_timer = true
      channel = "kernel-vsock"
      [template]
      enabled = false
      keep_days = 30
      max_total_mib = 1000
      [pool]
      min = 1
      max = 8
      [storage]
      writable_size_gib = 1
      disk_mib_per_s = 20
      disk_ops_per_s = 300
      volume_cache = "none"
      [daemon]
      idle_timeout_s = 0
      metrics_address = "127.0.0.1:9464"
      log_level = "debug"`;
    expect(parseConfig(text, 'x')).toEqual({
      vm: {
        vmm: 'firecracker',
        memoryMib: 128,
        memoryMaxMib: 2048,
        vcpus: 4,
        kernel: '/boot/vmlinux',
        initrd: '/boot/initrd',
        networkCards: 4,
        networkMibPerS: 10,
        bootTimeoutS: 5,
        accelerator: 'tcg',
        translationMib: 16,
        translationIdleS: 30,
        qemu: '/opt/qemu',
        firecracker: '/opt/firecracker',
        jail: 'on',
        jailer: '/opt/jailer',
        jailUidFirst: 7000,
        jailUids: 8,
        hugePages: true,
        bootTimer: true,
        channel: 'kernel-vsock',
      },
      template: { enabled: false, keepDays: 30, maxTotalMib: 1000 },
      pool: { min: 1, max: 8 },
      storage: { writableSizeGib: 1, changes: 'auto', diskMibPerS: 20, diskOpsPerS: 300, volumeCache: 'none' },
      daemon: { idleTimeoutS: 0, metricsAddress: '127.0.0.1:9464', logLevel: 'debug' },
    });
  });

  test('as shipped has every line commented out, and the comments show the defaults', () => {
    const shipped = readFileSync(join(import.meta.dirname, '../../../config/kiln.toml'), 'utf8');
    expect(parseConfig(shipped, 'kiln.toml')).toEqual(defaultConfig);
    const settings = shipped.match(/^# [a-z_]+ = .*$/gm) ?? [];
    const uncommented = shipped.replaceAll(/^# ([a-z_]+ = )/gm, '$1');
    expect(parseConfig(uncommented, 'kiln.toml')).toEqual({
      ...defaultConfig,
      vm: { ...defaultConfig.vm, initrd: '/path/to/initrd' },
    });
    const keys = Object.values(defaultConfig).flatMap((section) => Object.keys(section));
    expect(settings).toHaveLength(keys.length);
  });

  test('with a misspelt key is refused, with the key that was probably meant', () => {
    expect(messageFor('[vm]\nmemory_mb = 64')).toBe(
      '/etc/kiln/config.toml: unknown key vm.memory_mb = 64, did you mean memory_mib?; keys of [vm] are ' +
        'vmm, memory_mib, memory_max_mib, vcpus, kernel, initrd, network_cards, network_mib_per_s, boot_timeout_s, ' +
        'accelerator, translation_mib, translation_idle_s, qemu, firecracker, jail, jailer, jail_uid_first, jail_uids, huge_pages, boot_timer, channel',
    );
    expect(messageFor('[storage]\ncolour = "red"')).toBe(
      '/etc/kiln/config.toml: unknown key storage.colour = "red"; keys of [storage] are writable_size_gib, changes, ' +
        'disk_mib_per_s, disk_ops_per_s, volume_cache',
    );
  });

  test('with a key outside its section is refused, with the section it belongs to', () => {
    expect(messageFor('memory_mib = 512')).toBe(
      '/etc/kiln/config.toml: unknown key memory_mib, did you mean vm.memory_mib?; sections are vm, template, pool, storage, daemon',
    );
    expect(messageFor('[deamon]')).toContain('unknown section deamon, did you mean daemon?');
  });

  test.each([
    [
      '[pool]\nmin = 2\nmax = 1',
      'pool.max = 1: must be an integer from 0 (no pool) to 1000, and not less than pool.min',
    ],
    ['[vm]\nmemory_mib = "512"', 'vm.memory_mib = "512": must be an integer from 128 to 16777216 (MiB)'],
    ['[vm]\njail = true', 'vm.jail = true: must be "auto", "on" or "off"'],
    ['[vm]\njail_uid_first = 0', 'vm.jail_uid_first = 0: must be an integer from 1 to 2147483647'],
    ['[vm]\njail_uids = 0', 'vm.jail_uids = 0: must be an integer from 1 to 1000000'],
    ['[vm]\nmemory_mib = 64', 'vm.memory_mib = 64: must be an integer from 128 to 16777216 (MiB)'],
    ['[vm]\nmemory_mib = 512.5', 'vm.memory_mib = 512.5: must be an integer from 128 to 16777216 (MiB)'],
    ['[vm]\nvcpus = 0', 'vm.vcpus = 0: must be an integer from 1 to 255'],
    ['[vm]\nvmm = "xen"', 'vm.vmm = "xen": must be "auto", "qemu" or "firecracker"'],
    ['[vm]\nkernel = "fast"', 'vm.kernel = "fast": must be "default", "minimal" or the absolute path of a kernel'],
    ['[vm]\ninitrd = "initrd.img"', 'vm.initrd = "initrd.img": must be an absolute path'],
    ['[vm]\nqemu = "bin/qemu"', 'vm.qemu = "bin/qemu": must be the name of a program on PATH or an absolute path'],
    ['[vm]\nqemu = ""', 'vm.qemu = "": must be the name of a program on PATH or an absolute path'],
    ['[daemon]\nlog_level = true', 'daemon.log_level = true: must be "trace", "debug", "info", "warn" or "error"'],
    ['[daemon]\nidle_timeout_s = -1', 'daemon.idle_timeout_s = -1: must be an integer from 0 (never) to 604800'],
    ['storage = 10', 'storage = 10: must be a table'],
  ])('%j is refused: the message names the key, the value and what is allowed', (text, expected) => {
    expect(messageFor(text)).toContain(`/etc/kiln/config.toml: ${expected}`);
  });

  test('that is not TOML is refused with line and column', () => {
    expect(messageFor('[vm]\nmemory_mib = = 3')).toMatch(/^\/etc\/kiln\/config\.toml:2:14: not valid TOML: \S/);
  });
});

describe('loadConfig', () => {
  test('uses the default places when the environment says nothing', () => {
    const { paths } = loadConfig({ env: { KILN_STATE_DIR: '' }, guestDir });
    expect(paths).toEqual({
      configFile: '/etc/kiln/config.toml',
      configFileIsExplicit: false,
      stateDir: '/run/kiln',
      cacheDir: '/var/lib/kiln',
      guestDir,
    });
  });

  test('takes every place from the environment', () => {
    const configFile = join(folder, 'kiln.toml');
    writeFileSync(configFile, '[vm]\nvcpus = 3\n');
    const env = { KILN_CONFIG: configFile, KILN_STATE_DIR: '/s/', KILN_CACHE_DIR: '/c//d', KILN_GUEST_DIR: '/g' };
    const { config, paths } = loadConfig({ env, guestDir });
    expect(config.vm.vcpus).toBe(3);
    expect(paths).toEqual({
      configFile,
      configFileIsExplicit: true,
      stateDir: '/s',
      cacheDir: '/c/d',
      guestDir: '/g',
    });
  });

  test('refuses a relative path, naming the variable', () => {
    const error = errorOf(() => loadConfig({ env: { KILN_STATE_DIR: 'run' }, guestDir }));
    expect(error.message).toBe('KILN_STATE_DIR="run": must be an absolute path');
  });

  test('refuses an explicit file that is missing', () => {
    const error = errorOf(() => loadConfig({ env: { KILN_CONFIG: join(folder, 'none.toml') }, guestDir }));
    expect(error.code).toBe('not-found');
    expect(error.message).toBe(`${folder}/none.toml: no such configuration file`);
  });

  test('refuses a directory in the place of the file', () => {
    mkdirSync(join(folder, 'dir'));
    const error = errorOf(() => loadConfig({ env: { KILN_CONFIG: join(folder, 'dir') }, guestDir }));
    expect(error.message).toBe(`${folder}/dir: cannot be read: EISDIR`);
  });
});

describe('closestMatch', () => {
  test('sees through case and separators', () => {
    expect(closestMatch('memoryMiB', ['memory_mib', 'vcpus'])).toBe('memory_mib');
  });

  test('suggests nothing for another word', () => {
    expect(closestMatch('colour', ['memory_mib', 'vcpus'])).toBeUndefined();
  });
});
