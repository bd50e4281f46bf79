import { describe, expect, test } from 'vitest';
import { withoutDevicesOfPrivileged } from '../../../src/oci/privileged.ts';
import type { Device, DeviceRule, Spec } from '../../../src/oci/spec.ts';
import { ctrSpec } from './specs.ts';

const all: DeviceRule = { allow: true, access: 'rwm' };
const nothing: DeviceRule = { allow: false, access: 'rwm' };
const devices: Device[] = [
  { path: '/dev/null', type: 'c', major: 1, minor: 3 },
  { path: '/dev/fuse', type: 'c', major: 10, minor: 229 },
  { path: '/dev/autofs', type: 'c', major: 10, minor: 235 },
  { path: '/dev/vda', type: 'b', major: 254, minor: 0 },
  { path: '/dev/initctl', type: 'p' },
];

function spec(rules: DeviceRule[], given = devices): Spec {
  const whole = ctrSpec() as unknown as Spec;
  return { ...whole, linux: { ...whole.linux, devices: given, resources: { devices: rules } } } as Spec;
}

describe('a privileged container', () => {
  test.each([
    ['as containerd writes it', [all]],
    ['with the rule spelled out', [nothing, { ...all, type: 'a', major: -1, minor: -1 }]],
  ])("%s has the guest's devices, and not the host's", (_, rules) => {
    const { spec: changed, warnings } = withoutDevicesOfPrivileged(spec(rules));
    expect(changed.linux?.devices?.map(({ path }) => path)).toEqual(['/dev/null', '/dev/fuse', '/dev/initctl']);
    expect(changed.linux?.resources?.devices).toEqual(rules);
    expect(warnings).toEqual([
      "privileged in the virtual machine, without the host's 2 devices of its own: /dev/autofs, /dev/vda",
    ]);
  });

  test.each<[string, DeviceRule[]]>([
    ['no rule', []],
    ['a rule against all', [nothing]],
    ['all of one type', [{ ...all, type: 'b' }]],
    ['all of one driver', [{ ...all, major: 7 }]],
    ['reading alone', [{ allow: true, access: 'rm' }]],
  ])('is not one with %s: what was asked for stays, to be given or refused', (_, rules) => {
    const given = spec(rules);
    expect(withoutDevicesOfPrivileged(given)).toEqual({ spec: given, warnings: [] });
  });

  test('says nothing where nothing is left out', () => {
    const given = spec([all], devices.slice(0, 2));
    expect(withoutDevicesOfPrivileged(given)).toEqual({ spec: given, warnings: [] });
  });
});
