/** `kiln features` is checked against what becomes of specs; what it promises of crun and the guest, in test/e2e/oci-features.test.ts. */
import { describe, expect, it, test } from 'vitest';
import { features } from '../../../src/oci/features.ts';
import { type GuestSpec, toGuestSpec } from '../../../src/oci/guest-spec.ts';
import type { Spec } from '../../../src/oci/spec.ts';
import { ctrSpec, errorOf, withLinux, withProcess } from './specs.ts';

const { ociVersionMin, ociVersionMax, hooks, mountOptions, linux, ...rest } = features('1.2.3');

const translated = (spec: Spec): GuestSpec => toGuestSpec(spec, { id: 'c1', rootfsPath: '/run/rootfs' });
const withMount = (mount: object) => ({ ...ctrSpec(), mounts: [mount as { destination: string }] });
const withSeccomp = (seccomp: object) => withLinux({ seccomp: { defaultAction: 'SCMP_ACT_ALLOW', ...seccomp } });
/** Not honoured: an error, or a warning that it is left out. */
const isLeftOut = (spec: Spec) => {
  try {
    return translated(spec).warnings.length > 0;
  } catch {
    return true;
  }
};

test('versions of the spec are those that are accepted', () => {
  for (const ociVersion of [ociVersionMin, ociVersionMax]) translated({ ...ctrSpec(), ociVersion });
  expect(errorOf(() => translated({ ...ctrSpec(), ociVersion: '0.9.0' })).message).toMatch(/ociVersion/);
});

test('hooks are those that are run, and others are refused', () => {
  const hook = { path: '/bin/true' };
  for (const moment of hooks) translated({ ...ctrSpec(), hooks: { [moment]: [hook] } });
  expect(errorOf(() => translated({ ...ctrSpec(), hooks: { createTea: [hook] } as object })).code).toBe(
    'unimplemented',
  );
});

describe('mount options', () => {
  it.each(mountOptions)('%s is accepted by a filesystem of the guest, or by a bind mount', (option) => {
    const tmpfs = withMount({ destination: '/m', type: 'tmpfs', source: 'tmpfs', options: [option] });
    const bind = withMount({ destination: '/m', type: 'bind', source: '/srv', options: ['bind', option] });
    expect(isLeftOut(tmpfs) && isLeftOut(bind)).toBe(false);
  });

  it.each(['idmap', 'ridmap', 'nosymfollow', 'iversion'])('%s is refused, and not listed', (option) => {
    expect(mountOptions).not.toContain(option);
    expect(isLeftOut(withMount({ destination: '/m', type: 'tmpfs', source: 'tmpfs', options: [option] }))).toBe(true);
  });
});

test('namespaces are those that are made, and others are refused', () => {
  const namespaces = linux.namespaces.map((type) => ({ type }));
  expect(isLeftOut(withLinux({ namespaces }))).toBe(false);
  expect(isLeftOut(withLinux({ namespaces: [...namespaces, { type: 'tea' }] }))).toBe(true);
});

test('capabilities are those that are given, and others are left out', () => {
  const given = (names: readonly string[]) => withProcess({ capabilities: { bounding: names } });
  expect(isLeftOut(given(linux.capabilities))).toBe(false);
  expect(isLeftOut(given(['CAP_TEA']))).toBe(true);
});

describe('seccomp', () => {
  const syscall = (more: object) => withSeccomp({ syscalls: [{ names: ['getcwd'], ...more }] });

  it('takes every action and flag that is listed', () => {
    for (const action of linux.seccomp.actions) expect(isLeftOut(syscall({ action }))).toBe(false);
    expect(isLeftOut(withSeccomp({ flags: linux.seccomp.knownFlags }))).toBe(false);
    expect(linux.seccomp.knownFlags).toEqual(expect.arrayContaining([...linux.seccomp.supportedFlags]));
  });

  it('refuses the action that asks an agent, and flags that are not listed', () => {
    expect(linux.seccomp.actions).not.toContain('SCMP_ACT_NOTIFY');
    expect(isLeftOut(syscall({ action: 'SCMP_ACT_NOTIFY' }))).toBe(true);
    expect(isLeftOut(withSeccomp({ flags: ['SECCOMP_FILTER_FLAG_TEA'] }))).toBe(true);
  });
});

describe('what is said not to be there is refused or left out', () => {
  const device = { major: 8, minor: 0 };
  const cases: Readonly<Record<string, readonly [claim: boolean, spec: Spec]>> = {
    'the rdma controller': [linux.cgroup.rdma, withLinux({ resources: { rdma: { mlx5: { hcaHandles: 1 } } } })],
    AppArmor: [linux.apparmor.enabled, withProcess({ apparmorProfile: 'docker-default' })],
    SELinux: [linux.selinux.enabled, withProcess({ selinuxLabel: 'system_u:system_r:container_t:s0' })],
    'Intel RDT': [linux.intelRdt.enabled, withLinux({ intelRdt: { closID: 'x', schemata: ['L3:0=f'] } })],
    'monitoring by Intel RDT': [linux.intelRdt.monitoring, withLinux({ intelRdt: { enableMonitoring: true } })],
    'idmapped mounts': [
      linux.mountExtensions.idmap.enabled,
      withMount({ destination: '/m', type: 'bind', source: '/srv', options: ['rbind'], uidMappings: [device] }),
    ],
    'network devices': [linux.netDevices.enabled, withLinux({ netDevices: { eth1: {} } })],
  };

  it.each(Object.entries(cases))('%s', (_name, [claim, spec]) => {
    expect(claim).toBe(false);
    expect(isLeftOut(spec)).toBe(true);
  });
});

test('memory policies are those that are accepted', () => {
  for (const mode of linux.memoryPolicy.modes) expect(isLeftOut(withLinux({ memoryPolicy: { mode } }))).toBe(false);
  expect(isLeftOut(withLinux({ memoryPolicy: { mode: 'MPOL_INTERLEAVE', nodes: '0' } }))).toBe(true);
});

test('annotations that change what Kiln does are said to', () => {
  expect(rest.potentiallyUnsafeConfigAnnotations).toEqual(['io.kiln.', 'io.kubernetes.cri.', 'io.kubernetes.cri-o.']);
  expect(rest.annotations['io.kiln.version']).toBe('1.2.3');
});
