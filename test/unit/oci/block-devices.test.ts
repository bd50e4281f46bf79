import { describe, expect, test } from 'vitest';
import { possibleNodes } from '../../../src/oci/block-devices.ts';
import { toGuestSpec } from '../../../src/oci/guest-spec.ts';
import type { DeviceRule, Mount, Spec } from '../../../src/oci/spec.ts';
import { ctrSpec, errorOf } from './specs.ts';

const node = { major: 7, minor: 5, mode: 0o660, uid: 0, gid: 6 };
const nodeAt = (path: string) => (path === '/dev/loop5' ? node : undefined);
const options = { id: 'c', rootfsPath: '/run/kiln/roots/c/rootfs', nodeAt };
const disk = { path: '/dev/data', type: 'b', major: 7, minor: 5, fileMode: 0o640, uid: 1, gid: 2 };
const nothing: DeviceRule = { allow: false, access: 'rwm' };
const rule = (allow: boolean, access: string, minor = 5): DeviceRule => ({ allow, type: 'b', major: 7, minor, access });

function spec({
  rules = [],
  devices = [],
  mounts = [],
}: {
  rules?: DeviceRule[];
  devices?: object[];
  mounts?: Mount[];
}) {
  const given = ctrSpec() as unknown as Spec;
  return { ...given, mounts, linux: { ...given.linux, devices, resources: { devices: rules } } } as Spec;
}

describe('a block device of the host', () => {
  test('has the guest number of its drive, in linux.devices and in the rules', () => {
    const given = spec({ rules: [nothing, rule(true, 'rwm')], devices: [disk] });
    expect(toGuestSpec(given, options).blockDevices).toEqual([
      { major: 7, minor: 5, readOnly: false, at: 'linux.devices[0]: /dev/data' },
    ]);
    const { linux } = toGuestSpec(given, { ...options, deviceNumbers: [{ major: 254, minor: 32 }] }).spec;
    expect(linux?.devices).toEqual([{ ...disk, major: 254, minor: 32 }]);
    expect(linux?.resources?.devices).toEqual([
      nothing,
      { allow: true, type: 'b', major: 254, minor: 32, access: 'rwm' },
    ]);
  });

  test.each<[string, DeviceRule[], boolean]>([
    ['there is no rule', [], false],
    ['all may be written', [{ allow: true, access: 'rwm' }], false],
    ['nothing may be done', [nothing], true],
    ['it may be read', [nothing, rule(true, 'rm')], true],
    ['it may be written', [nothing, rule(true, 'rwm')], false],
    ['a rule of no particular disk allows it', [nothing, { allow: true, type: 'b', access: 'rwm' }], false],
    [
      'a rule of all its driver allows it',
      [nothing, { allow: true, type: 'b', major: 7, minor: -1, access: 'w' }],
      false,
    ],
    ['another may be written', [nothing, rule(true, 'rwm', 6)], true],
    ['a character device may be written', [nothing, { allow: true, type: 'c', major: 7, minor: 5, access: 'w' }], true],
    ['writing is taken back', [{ allow: true, access: 'rwm' }, rule(false, 'w')], true],
  ])('is read-only or not, when %s', (_when, rules, readOnly) => {
    expect(toGuestSpec(spec({ rules, devices: [disk] }), options).blockDevices).toMatchObject([{ readOnly }]);
  });

  test('takes one drive, however often it is asked for; it is writable when one of these may write', () => {
    const given = spec({
      rules: [nothing, rule(true, 'rw')],
      devices: [disk, { ...disk, path: '/dev/again' }],
      mounts: [{ destination: '/fs', type: 'ext4', source: '/dev/loop5', options: ['ro'] }],
    });
    expect(toGuestSpec(given, options).blockDevices).toEqual([
      { major: 7, minor: 5, readOnly: false, at: 'linux.devices[0]: /dev/data' },
    ]);
  });

  test('that is not given is not named by a rule, which in the guest would be another disk', () => {
    const rules = [nothing, rule(true, 'rwm', 6), rule(true, 'rwm'), { allow: true, type: 'b', major: 7, access: 'm' }];
    const { linux } = toGuestSpec(spec({ rules, devices: [disk] }), options).spec;
    expect(linux?.resources?.devices).toEqual([
      nothing,
      rule(true, 'rwm'),
      { allow: true, type: 'b', major: 7, minor: 5, access: 'm' },
    ]);
    const all = { allow: true, type: 'b', access: 'm' };
    expect(toGuestSpec(spec({ rules: [all] }), options).spec.linux?.resources?.devices).toEqual([all]);
  });

  test('is a node in the place of a mount of the type "block", with a rule for it', () => {
    const mounts = [{ destination: 'dev/x', type: 'block', source: '/dev/loop5', options: ['ro'] }];
    const guest = toGuestSpec(spec({ rules: [nothing], mounts }), {
      ...options,
      deviceNumbers: [{ major: 254, minor: 1 }],
    });
    expect(guest.spec.mounts).toEqual([]);
    expect(guest.blockDevices).toEqual([{ major: 7, minor: 5, readOnly: true, at: 'mounts[0]: dev/x' }]);
    expect(guest.spec.linux?.devices).toEqual([
      { path: '/dev/x', type: 'b', major: 254, minor: 1, fileMode: 0o660, uid: 0, gid: 6 },
    ]);
    expect(guest.spec.linux?.resources?.devices).toEqual([
      nothing,
      { allow: true, type: 'b', major: 254, minor: 1, access: 'r' },
    ]);
  });

  test('is a node in the place of a bind mount, with no more rights than the rules give', () => {
    const mounts = [{ destination: '/dev/x', type: 'bind', source: '/dev/loop5', options: ['rbind', 'rw'] }];
    const guest = toGuestSpec(spec({ rules: [nothing], mounts }), options);
    expect(guest.blockDevices).toMatchObject([{ readOnly: true }]);
    expect(guest.spec.linux?.resources?.devices).toEqual([nothing]);
    expect(guest.volumes).toEqual([]);
    expect(guest.spec.linux?.devices).toMatchObject([{ path: '/dev/x' }]);
  });

  test('with a filesystem is mounted by the guest, where the container binds it from', () => {
    const mounts = [
      {
        destination: '/fs',
        type: 'xfs',
        source: '/dev/loop5',
        options: ['noatime', 'rprivate', 'ro', 'rw', 'logbufs=8'],
      },
    ];
    const guest = toGuestSpec(spec({ mounts }), options);
    const target = '/run/kiln/roots/c/filesystems/0';
    expect(guest.filesystems).toEqual([{ device: 0, target, type: 'xfs', options: ['noatime', 'logbufs=8'] }]);
    expect(guest.spec.mounts).toEqual([
      { destination: '/fs', type: 'bind', source: target, options: ['bind', 'noatime', 'rprivate'] },
    ]);
    expect(guest.spec.linux?.devices).toEqual([]);
  });

  test.each<[string, Spec, string]>([
    [
      'beside a user namespace',
      { ...spec({ devices: [disk] }), linux: { ...spec({ devices: [disk] }).linux, namespaces: [{ type: 'user' }] } },
      'linux.devices[0]: /dev/data (b 7:5): not beside a user namespace',
    ],
    [
      'that is none',
      spec({ mounts: [{ destination: '/x', type: 'block', source: '/dev/null' }] }),
      'mounts[0]: /x: /dev/null is no block device of the host',
    ],
    [
      'without a name',
      spec({ mounts: [{ destination: '/x', type: 'block' }] }),
      'mounts[0]: /x: its source is no block device of the host',
    ],
  ])('is refused %s', (_name, given, message) => {
    const { linux = {} } = given;
    const namespaces = [...((ctrSpec() as unknown as Spec).linux?.namespaces ?? []), ...(linux.namespaces ?? [])];
    const whole = {
      ...given,
      linux: { ...linux, namespaces: [...new Map(namespaces.map((one) => [one.type, one])).values()] },
    };
    expect(errorOf(() => toGuestSpec(whole, options)).message).toContain(message);
  });

  test('can only be where the caller is asked to look', () => {
    const given = spec({
      mounts: [
        { destination: '/a', type: 'bind', source: '/srv' },
        { destination: '/b', type: 'bind', source: '/dev/loop5' },
        { destination: '/c', type: 'ext4', source: '/dev/loop5' },
        { destination: '/d', type: 'tmpfs', source: '/dev/loop5' },
        { destination: '/e', type: 'nfs', source: 'server:/x' },
        { destination: '/f', type: 'block', source: '/srv/link' },
      ],
    });
    expect(possibleNodes(given)).toEqual(['/dev/loop5', '/dev/loop5', '/srv/link']);
  });
});
