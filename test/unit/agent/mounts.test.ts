import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, it } from 'vitest';
import { mountOne, parseOptions } from '../../../agent/mounts.ts';
import { Undo } from '../../../agent/undo.ts';
import { MS_NODEV, MS_NOSUID, MS_RDONLY } from '../../../src/sys/mount.ts';

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'kiln-mounts-'));
});
afterEach(() => rmSync(directory, { recursive: true }));

it('splits options into flags and data, as mount(8) does', () => {
  expect(parseOptions(['ro', 'nosuid', 'nodev'])).toEqual({ flags: MS_RDONLY | MS_NOSUID | MS_NODEV, data: null });
  expect(parseOptions(['lowerdir=/a:/b', 'rw', 'upperdir=/u', 'workdir=/w'])).toEqual({
    flags: 0,
    data: 'lowerdir=/a:/b,upperdir=/u,workdir=/w',
  });
  expect(parseOptions([])).toEqual({ flags: 0, data: null });
});

it('lets the later of two contradicting flags win', () => {
  expect(parseOptions(['ro', 'rw']).flags).toBe(0);
  expect(parseOptions(['rw', 'ro']).flags).toBe(MS_RDONLY);
});

it('does not take a word that JavaScript objects know for a flag', () => {
  expect(parseOptions(['constructor'])).toEqual({ flags: 0, data: 'constructor' });
});

it('refuses a target that is not absolute, or has dots', async () => {
  await using undo = new Undo(() => false);
  const mount = { source: { $case: 'device', value: 'tmpfs' }, type: 'tmpfs', options: [], directories: [] } as const;
  for (const target of ['relative', '/a/../b', '/a/']) {
    expect(() => mountOne({ ...mount, options: [], directories: [], target }, undo)).toThrow(
      `"${target}" is not an absolute path`,
    );
  }
});
