import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, symlinkSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { mountPoints, mountsNow } from '../../../src/rootfs/mountinfo.ts';
import { ownerIsGone, uniqueSuffix } from '../../../src/rootfs/owner.ts';

test('a temporary name of this process is its own, and no two are equal', () => {
  expect(ownerIsGone(uniqueSuffix())).toBe(false);
  expect(uniqueSuffix()).not.toBe(uniqueSuffix());
});

test('a temporary name of a process that has ended is nobody’s', () => {
  const { pid } = spawnSync('true');
  expect(ownerIsGone(`${pid}-1-1`)).toBe(true);
});

test('a process id that is in use again does not keep the names of its former holder', () => {
  expect(ownerIsGone(`${process.pid}-1-1`)).toBe(true);
});

test('mount points are read with their escapes', () => {
  const table = [
    '22 1 0:21 / / rw,relatime - ext4 /dev/vda rw',
    String.raw`36 35 98:0 /mnt1 /mnt/with\040space\134 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`,
    '',
  ].join('\n');
  expect(mountPoints(table)).toEqual(['/', '/mnt/with space\\']);
});

test('whether anything is mounted below a path is told of the path behind its links', () => {
  const folder = mkdtempSync(join(tmpdir(), 'kiln-mounts-'));
  try {
    symlinkSync('/', join(folder, 'root'));
    const hasMountsBelow = mountsNow();
    expect(['/', join(folder, 'root'), folder, join(folder, 'missing')].map(hasMountsBelow)).toEqual([
      true,
      true,
      false,
      false,
    ]);
  } finally {
    rmSync(folder, { recursive: true });
  }
});
