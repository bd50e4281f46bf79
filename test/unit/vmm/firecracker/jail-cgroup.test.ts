import { existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { cgroupArguments, removeCgroups } from '../../../../src/vmm/firecracker/jail-cgroup.ts';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'kiln-g'));
});
afterEach(() => rmSync(folder, { recursive: true }));

const limits = { memoryBytes: 1000, pids: 20 };

/** A table of mounts, each at a folder that is made: "cgroup memory" or "cgroup2". */
function table(...mounts: readonly string[]): string {
  const lines = mounts.map((mount) => {
    const [type = '', options = 'nsdelegate'] = mount.split(' ');
    const directory = path.join(folder, options);
    mkdirSync(directory);
    return `${type} ${directory} ${type} rw,nosuid,${options} 0 0`;
  });
  const file = path.join(folder, 'mounts');
  writeFileSync(file, ['tmpfs /run tmpfs rw 0 0', ...lines, ''].join('\n'));
  return file;
}

function controllers(names: string): void {
  writeFileSync(path.join(folder, 'nsdelegate', 'cgroup.controllers'), `${names}\n`);
}

describe('the jailer gets limits', () => {
  const common = (version: string) => ['--cgroup-version', version, '--parent-cgroup', 'kiln-7'];

  test('of version 2 on a host with that alone', () => {
    const mounts = table('cgroup2');
    controllers('cpuset cpu io memory pids');
    expect(cgroupArguments(7, limits, mounts)).toEqual([
      ...common('2'),
      ...['--cgroup', 'memory.max=1000', '--cgroup', 'pids.max=20'],
    ]);
  });

  test('of version 1 on a host with that, also when the unified hierarchy is there without controllers', () => {
    const mounts = table('cgroup cpu,cpuacct', 'cgroup memory', 'cgroup pids', 'cgroup2');
    controllers('hugetlb');
    expect(cgroupArguments(7, limits, mounts)).toEqual([
      ...common('1'),
      ...['--cgroup', 'memory.limit_in_bytes=1000', '--cgroup', 'pids.max=20'],
    ]);
  });

  test('only for the controllers that are there, and none on a host without cgroups', () => {
    const mounts = table('cgroup2');
    controllers('pids');
    expect(cgroupArguments(7, limits, mounts)).toEqual([...common('2'), '--cgroup', 'pids.max=20']);
    controllers('');
    expect(cgroupArguments(7, limits, mounts)).toEqual([]);
    expect(cgroupArguments(7, limits, '/dev/null')).toEqual([]);
  });
});

describe('the groups of a VM', () => {
  test('are removed from every hierarchy, and nothing else', async () => {
    const mounts = table('cgroup memory', 'cgroup pids');
    for (const name of ['memory/kiln-7/one-7', 'pids/kiln-7/one-7', 'pids/kiln-77/two-77']) {
      mkdirSync(path.join(folder, name), { recursive: true });
    }
    await removeCgroups(7, mounts);
    for (const name of ['memory', 'pids']) expect(existsSync(path.join(folder, name, 'kiln-7'))).toBe(false);
    expect(existsSync(path.join(folder, 'pids/kiln-77/two-77'))).toBe(true);
    await removeCgroups(7, mounts);
  });

  test('that cannot be removed are an error', async () => {
    const mounts = table('cgroup memory');
    mkdirSync(path.join(folder, 'memory/kiln-7'), { recursive: true });
    // A folder with a file that is not the kernel's answers so.
    writeFileSync(path.join(folder, 'memory/kiln-7/file'), '');
    await expect(removeCgroups(7, mounts)).rejects.toThrow('ENOTEMPTY');
  });
});
