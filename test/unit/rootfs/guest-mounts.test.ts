import { expect, test } from 'vitest';
import { guestMounts, guestRootDirectory } from '../../../src/rootfs/index.ts';

const lower = { file: '/cache/layers/k.erofs', readOnly: true, format: 'erofs' } as const;
const writable = { file: '/work/kiln-rw.ext4', readOnly: false, format: 'ext4' } as const;

test('a writable root filesystem is an overlay of the two disks, mounted in this order', () => {
  const mounts = guestMounts({ lower, writable }, 'c1', { lower: 'ro0', writable: 'rw0' });
  expect(mounts.map(({ source, target, type }) => ({ source, target, type }))).toEqual([
    { source: { disk: 'ro0' }, target: '/run/kiln/roots/c1/lower', type: 'erofs' },
    { source: { disk: 'rw0' }, target: '/run/kiln/roots/c1/rw', type: 'ext4' },
    { source: { device: 'overlay' }, target: '/run/kiln/roots/c1/rootfs', type: 'overlay' },
  ]);
  expect(mounts[0]?.options).toContain('ro');
  expect(mounts[1]?.directories).toEqual(['upper', 'work']);
  expect(mounts[2]?.options).toEqual([
    'lowerdir=/run/kiln/roots/c1/lower',
    'upperdir=/run/kiln/roots/c1/rw/upper',
    'workdir=/run/kiln/roots/c1/rw/work',
  ]);
});

test('a read-only view is the image itself, at the same place', () => {
  expect(guestMounts({ lower, writable: null }, 'c1', { lower: 'ro3' })).toEqual([
    { source: { disk: 'ro3' }, target: guestRootDirectory('c1'), type: 'erofs', options: ['ro'], directories: [] },
  ]);
});
