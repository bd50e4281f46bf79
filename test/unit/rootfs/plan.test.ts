import { describe, expect, test } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import { planRootfs, type SnapshotMount } from '../../../src/rootfs/index.ts';

const snapshots = '/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots';

function overlay(...options: string[]): SnapshotMount {
  return { type: 'overlay', source: 'overlay', options };
}

function refusal(mounts: readonly SnapshotMount[]): KilnError {
  try {
    planRootfs(mounts);
  } catch (error) {
    expect(error).toBeInstanceOf(KilnError);
    return error as KilnError;
  }
  throw new Error('the plan was not refused');
}

describe('planRootfs', () => {
  test("reads an overlayfs snapshot's layers top first and keeps the writable layer in its work directory", () => {
    const plan = planRootfs([
      overlay(
        'index=off',
        `workdir=${snapshots}/9/work`,
        `upperdir=${snapshots}/9/fs`,
        `lowerdir=${snapshots}/8/fs:${snapshots}/7/fs`,
      ),
    ]);
    expect(plan).toEqual({
      lower: {
        kind: 'overlay',
        layers: [`${snapshots}/8/fs`, `${snapshots}/7/fs`],
        userxattr: false,
      },
      writable: { kind: 'in-directory', directory: `${snapshots}/9/work` },
      upper: { path: `${snapshots}/9/fs`, work: `${snapshots}/9/work`, userxattr: false },
    });
  });

  test('takes an overlay without upperdir for a read-only view', () => {
    expect(planRootfs([overlay('lowerdir=/b:/a')])).toEqual({
      lower: { kind: 'overlay', layers: ['/b', '/a'], userxattr: false },
      writable: null,
      upper: null,
    });
  });

  test('takes an overlay that is mounted ro for a read-only view', () => {
    const plan = planRootfs([overlay('ro', 'lowerdir=/a', 'upperdir=/u', 'workdir=/w')]);
    expect(plan.writable).toBeNull();
    expect(plan.upper).toBeNull();
  });

  test('lets the last of ro and rw count, as mount(8) does', () => {
    expect(planRootfs([overlay('ro', 'rw', 'lowerdir=/a', 'upperdir=/u', 'workdir=/w')]).writable).not.toBeNull();
  });

  test('takes escapes out of the paths of an overlay', () => {
    const plan = planRootfs([
      overlay(String.raw`lowerdir=/with\:colon:/back\\slash`, String.raw`upperdir=/u\:p`, 'workdir=/w'),
    ]);
    expect(plan.lower).toMatchObject({ layers: ['/with:colon', String.raw`/back\slash`] });
    expect(plan.upper?.path).toBe('/u:p');
  });

  test('keeps userxattr, which decides where opaque marks are read from', () => {
    expect(planRootfs([overlay('userxattr', 'lowerdir=/a')]).lower).toMatchObject({ userxattr: true });
  });

  test('takes 200 layers', () => {
    const layers = Array.from({ length: 200 }, (_, index) => `${snapshots}/${index}/fs`);
    expect(planRootfs([overlay(`lowerdir=${layers.join(':')}`)]).lower).toMatchObject({ layers });
  });

  test("reads the native snapshotter's writable directory, which may change until the container starts", () => {
    expect(planRootfs([{ type: 'bind', source: '/native/snapshots/9', options: ['rbind', 'rw'] }])).toEqual({
      lower: { kind: 'directory', path: '/native/snapshots/9', immutable: false },
      writable: { kind: 'of-snapshot', snapshot: '/native/snapshots/9' },
      upper: null,
    });
  });

  test('reads a read-only bind as an immutable directory without writable layer', () => {
    expect(planRootfs([{ type: 'bind', source: '/native/snapshots/9/', options: ['ro', 'rbind'] }])).toEqual({
      lower: { kind: 'directory', path: '/native/snapshots/9', immutable: true },
      writable: null,
      upper: null,
    });
  });

  test('refuses an empty list', () => {
    expect(refusal([])).toMatchObject({ code: 'invalid-argument' });
  });

  test.each([
    ['ext4', '/var/lib/blockfile/snapshots/9', ['loop', 'rw']],
    ['xfs', '/dev/mapper/pool-snap-9', ['nouuid']],
    ['erofs', '/erofs/snapshots/8/layer.erofs', ['ro', 'loop']],
    ['format/mkdir/overlay', 'overlay', ['lowerdir={{ overlay 0 1 }}']],
    ['fuse3.fuse-overlayfs', 'overlay', ['lowerdir=/a']],
  ])('refuses a mount of type %s and names type and source', (type, source, options) => {
    const error = refusal([{ type, source, options }]);
    expect(error.code).toBe('unimplemented');
    expect(error.message).toContain(`"${type}"`);
    expect(error.message).toContain(`"${source}"`);
    expect(error.hint).toContain('overlayfs');
  });

  test('names the unsupported one of several mounts', () => {
    expect(refusal([overlay('lowerdir=/a'), { type: 'erofs', source: '/l.erofs', options: [] }]).message).toContain(
      '/l.erofs',
    );
  });

  test('refuses several mounts even if each alone were fine', () => {
    expect(refusal([overlay('lowerdir=/a'), overlay('lowerdir=/b')])).toMatchObject({ code: 'unimplemented' });
  });

  test.each([['uidmap=0:1000:65536'], ['gidmap=0:1000:65536']])(
    'refuses id-mapped layers (%s) with a way out',
    (option) => {
      const error = refusal([overlay('lowerdir=/a', 'upperdir=/u', 'workdir=/w', option)]);
      expect(error.code).toBe('unimplemented');
      expect(error.message).toContain(option);
      expect(error.hint).toContain('user namespace');
    },
  );

  test.each([['metacopy=on'], ['redirect_dir=on'], ['X-containerd.dmverity=/x'], ['lowerdir+=/x']])(
    'refuses the option %s, which it does not carry out',
    (option) => {
      expect(refusal([overlay('lowerdir=/a', option)]).message).toContain(option);
    },
  );

  test('lets an SELinux label pass: the guest has its own', () => {
    expect(() =>
      planRootfs([overlay('lowerdir=/a', 'context="system_u:object_r:container_file_t:s0:c1,c2"')]),
    ).not.toThrow();
  });

  test.each([
    [['upperdir=/u', 'workdir=/w'], 'no lowerdir'],
    [['lowerdir=', 'upperdir=/u', 'workdir=/w'], 'no lowerdir'],
    [['lowerdir=/a', 'upperdir=/u'], 'no workdir'],
    [['lowerdir=a:/b'], '"a"'],
    [['lowerdir=/a::/data'], 'data-only'],
  ])('refuses the overlay options %j: %s', (options, words) => {
    expect(refusal([overlay(...options)]).message).toContain(words);
  });
});
