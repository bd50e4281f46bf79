import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { fieldRules, toGuestSpec } from '../../../src/oci/guest-spec.ts';
import type { Spec } from '../../../src/oci/spec.ts';
import { ctrSpec, errorOf, withLinux, withProcess } from './specs.ts';

const options = { id: 'c1', rootfsPath: '/run/kiln/c1/rootfs', hostname: 'c1' };
const translate = (spec: object) => toGuestSpec(spec as Spec, options);

// biome-ignore lint/suspicious/noExplicitAny: a test looks anywhere into the result
const linuxOf = (spec: object): any => translate(spec).spec.linux;

const refusal = (spec: object): string => {
  const error = errorOf(() => translate(spec));
  return `${error.code}: ${error.userMessage}`;
};

test("ctr's spec becomes the guest's: another root, hostname and cgroup, and no network namespace", () => {
  const host = ctrSpec();
  const before = structuredClone(host);
  const { spec, warnings } = translate(host);
  expect(warnings).toEqual([]);
  expect(host).toEqual(before);
  expect(spec).toEqual({
    ...before,
    ociVersion: '1.0.2',
    hostname: 'c1',
    root: { path: '/run/kiln/c1/rootfs' },
    linux: {
      ...before.linux,
      cgroupsPath: '/kiln/c1',
      namespaces: [{ type: 'pid' }, { type: 'ipc' }, { type: 'uts' }, { type: 'mount' }, { type: 'cgroup' }],
    },
  });
});

test('bind mounts become volumes, in their order and by the numbers that the guest knows them by', () => {
  const bind = (source: string, destination: string, ...list: string[]) => ({
    ...{ destination, type: 'bind', source },
    options: list,
  });
  const mounts = [
    bind('/srv/a/../data', '/data', 'rbind', 'rslave'),
    { destination: '/tmp', type: 'tmpfs', source: 'tmpfs' },
    bind('hosts', '/etc/hosts', 'bind', 'ro'),
    bind('/sys', '/host-sys', 'rbind', 'ro'),
  ];
  const spec = { ...ctrSpec(), mounts } as Spec;
  const { volumes } = toGuestSpec(spec, { ...options, bundle: '/bundles/b' });
  expect(volumes).toEqual([
    { source: '/srv/data', destination: '/data', readOnly: 'no', recursive: true, follows: true },
    { source: '/bundles/b/hosts', destination: '/etc/hosts', readOnly: 'mount', recursive: false, follows: false },
  ]);
  const guest = toGuestSpec(spec, { ...options, bundle: '/bundles/b', volumeNumbers: [4, 7] });
  expect(guest.volumes).toEqual(volumes);
  expect(guest.spec.mounts).toEqual([
    bind('/run/kiln/volumes/4', '/data', 'rbind', 'rslave'),
    mounts[1],
    bind('/run/kiln/volumes/7', '/etc/hosts', 'bind', 'ro'),
    bind('/sys', '/host-sys', 'rbind', 'ro'),
  ]);
});

test('a bind mount is read-only in the guest, unless the host has mounts below its source that may not be', () => {
  const bind = (...list: string[]) => ({ destination: '/d', type: 'bind', source: '/srv', options: list });
  const translated = (...list: string[]) => {
    const spec = { ...ctrSpec(), mounts: [bind(...list)] } as Spec;
    const guest = toGuestSpec(spec, { ...options, hasMountsBelow: (source) => source === '/srv' });
    return [guest.volumes[0]?.readOnly, ...(guest.spec.mounts?.[0]?.options ?? [])];
  };
  expect(translated('rbind', 'ro', 'nosuid')).toEqual(['mount', 'rbind', 'nosuid']);
  expect(translated('bind', 'ro')).toEqual(['mount', 'bind', 'ro']);
  expect(translated('rbind', 'rro')).toEqual(['tree', 'rbind', 'ro']);
  expect(translated('rbind', 'ro', 'rro')).toEqual(['tree', 'rbind', 'ro', 'ro']);
  expect(translated('rbind', 'rro', 'rw')).toEqual(['no', 'rbind']);
});

test('a container is chosen before the agent when memory runs out, whatever its spec says', () => {
  const score = (oomScoreAdj: number) => {
    const { process } = ctrSpec();
    return translate({ ...ctrSpec(), process: { ...process, oomScoreAdj } } as ReturnType<typeof ctrSpec>).spec;
  };
  expect([1000, 0, -999, -1000].map(score)).toMatchObject(
    [1000, 0, -999, -999].map((oomScoreAdj) => ({ process: { oomScoreAdj } })),
  );
});

describe('kept', () => {
  test('is the hostname of the spec, the read-only flag of the root, and what is unknown', () => {
    const { spec } = translate({ ...ctrSpec(), hostname: 'web', root: { path: 'r', readonly: true }, later: { a: 1 } });
    expect(spec).toMatchObject({
      hostname: 'web',
      root: { path: options.rootfsPath, readonly: true },
      later: { a: 1 },
    });
  });

  test('are seccomp, capabilities, rlimits, sysctls of the IPC namespace, user mappings', () => {
    const seccomp = { defaultAction: 'SCMP_ACT_ALLOW', syscalls: [{ names: ['chmod'], action: 'SCMP_ACT_ERRNO' }] };
    const linux = {
      seccomp,
      sysctl: { 'kernel.shmmax': '1' },
      uidMappings: [{ containerID: 0, hostID: 1000, size: 10 }],
      rootfsPropagation: 'rslave',
      personality: { domain: 'LINUX32' },
      namespaces: [...ctrSpec().linux.namespaces, { type: 'user' }],
    };
    expect(linuxOf(withLinux(linux))).toMatchObject({
      ...linux,
      namespaces: expect.arrayContaining([{ type: 'user' }]),
    });
    const process = { oomScoreAdj: 5, rlimits: [{ type: 'RLIMIT_CORE', hard: 18446744073709551615n, soft: 0 }] };
    expect(translate(withProcess(process)).spec.process).toMatchObject(process);
  });

  test('are the limits that cgroup v2 knows', () => {
    const resources = {
      memory: { limit: 64, reservation: 32, swap: -1, checkBeforeUpdate: true },
      cpu: { shares: 512, quota: 50000, period: 100000, idle: 1 },
      pids: { limit: 10 },
      blockIO: { weight: 100 },
      unified: { 'memory.high': '1' },
    };
    expect(linuxOf(withLinux({ resources })).resources).toEqual(resources);
  });

  test('are devices that every Linux has, and FIFOs', () => {
    const devices = [
      { path: '/dev/null', type: 'c', major: 1, minor: 3, fileMode: 0o666 },
      { path: '/dev/ptmx', type: 'u', major: 5, minor: 2 },
      { path: '/dev/pipe', type: 'p' },
    ];
    expect(linuxOf(withLinux({ devices })).devices).toEqual(devices);
  });

  test('are annotations, but not those that steer crun', () => {
    const annotations = { 'org.example': 'x', 'io.kiln.vcpus': '2', 'run.oci.handler': 'krun' };
    const { spec, warnings } = translate({ ...ctrSpec(), annotations });
    expect(spec.annotations).toEqual({ 'org.example': 'x', 'io.kiln.vcpus': '2' });
    expect(warnings).toEqual(["annotation run.oci.handler: not passed to the guest's crun"]);
  });
});

describe('changed', () => {
  test('is a missing cgroup namespace: it is added', () => {
    const namespaces = ['pid', 'ipc', 'uts', 'mount', 'network'].map((type) => ({ type }));
    expect(linuxOf(withLinux({ namespaces })).namespaces).toContainEqual({ type: 'cgroup' });
  });

  test('is a missing list of mounts: crun wants one', () => {
    const { mounts, ...spec } = ctrSpec();
    expect(mounts).toBeDefined();
    expect(translate(spec).spec.mounts).toEqual([]);
  });

  test('is cpu.burst: it is set by its cgroup file', () => {
    const { resources } = linuxOf(withLinux({ resources: { cpu: { quota: 1000, burst: 500 } } }));
    expect(resources).toEqual({ cpu: { quota: 1000 }, unified: { 'cpu.max.burst': '500' } });
  });
});

describe('left out', () => {
  test('with a warning are labels and profiles of security modules that the guest does not run', () => {
    const { spec, warnings } = translate({
      ...withProcess({ apparmorProfile: 'cri-containerd.apparmor.d', selinuxLabel: 'a:b:c' }),
      linux: { ...ctrSpec().linux, mountLabel: 'x', resources: { memory: { limit: 9, swappiness: 60 } } },
      mounts: [{ destination: '/dev/shm', type: 'tmpfs', source: 'shm', options: ['nosuid', 'context="u:r"'] }],
    });
    expect(warnings.toSorted()).toEqual([
      'linux.mountLabel: not applied: SELinux is not active in the guest',
      'linux.resources.memory.swappiness: not applied: the guest has no swap',
      'mounts[0].options: context="u:r" is not applied: SELinux is not active in the guest',
      'process.apparmorProfile: "cri-containerd.apparmor.d" is not applied: AppArmor is not active in the guest',
      'process.selinuxLabel: not applied: SELinux is not active in the guest',
    ]);
    expect(spec.process).not.toHaveProperty('apparmorProfile');
    expect(spec.process).not.toHaveProperty('selinuxLabel');
    expect(spec.linux).not.toHaveProperty('mountLabel');
    expect(spec.linux?.resources?.memory).toEqual({ limit: 9 });
    expect(spec.mounts?.[0]?.options).toEqual(['nosuid']);
  });

  test('silently is what asks for nothing', () => {
    const { spec, warnings } = translate({
      ...withProcess({ terminal: false, apparmorProfile: 'unconfined', selinuxLabel: '', commandLine: '' }),
      hooks: { prestart: [], poststop: [] },
      windows: { layerFolders: [] },
      linux: {
        ...ctrSpec().linux,
        netDevices: {},
        intelRdt: { closID: '' },
        resources: {
          memory: { kernel: -1, kernelTCP: 0, disableOOMKiller: false, useHierarchy: true, swappiness: 0 },
          cpu: { realtimePeriod: 0, realtimeRuntime: 0, cpus: '', mems: '', burst: 0 },
          blockIO: { leafWeight: 0, throttleReadBpsDevice: [] },
          network: { classID: 0, priorities: [] },
          hugepageLimits: [{ pageSize: '2MB', limit: 0 }],
          rdma: {},
        },
      },
    });
    expect(warnings).toEqual([]);
    expect(spec).not.toHaveProperty('hooks');
    expect(spec).not.toHaveProperty('windows');
    expect(spec.linux).not.toHaveProperty('netDevices');
    expect(spec.linux?.resources).toEqual({ memory: {}, cpu: {}, blockIO: {} });
  });
});

describe('refused', () => {
  test.each<[string, object, string]>([
    [
      'a hook at an unknown moment',
      { ...ctrSpec(), hooks: { prestart: [], midlife: [{ path: '/usr/bin/true' }] } },
      'unimplemented: hooks.midlife: no such moment to run a hook at is known',
    ],
    [
      'a spec of another age',
      { ...ctrSpec(), ociVersion: '2.0.0' },
      'invalid-argument: ociVersion: version 2.0.0 is not',
    ],
    ['Windows', { ...ctrSpec(), windows: { layerFolders: ['c:'] } }, 'invalid-argument: windows: Kiln runs Linux'],
    [
      'a kernel by path',
      { ...ctrSpec(), vm: { kernel: { path: '/k' } } },
      'invalid-argument: vm: the kernel is chosen',
    ],
    [
      'a character device of the host',
      withLinux({ devices: [{ path: '/dev/sg0', type: 'c', major: 21, minor: 0 }] }),
      'unimplemented: linux.devices[0]: /dev/sg0 (c 21:0) is a character device of the host: its driver is there, not in',
    ],
    [
      'a device of an unknown type',
      withLinux({ devices: [{ path: '/dev/x', type: 'x' }] }),
      'invalid-argument: linux.devices[0]: /dev/x has the unknown type "x"',
    ],
    ['cache allocation', withLinux({ intelRdt: { closID: 'a' } }), 'unimplemented: linux.intelRdt: '],
    ['a network device', withLinux({ netDevices: { eth1: {} } }), 'unimplemented: linux.netDevices: moving a network'],
  ])('is %s', (_name, spec, expected) => {
    expect(refusal(spec)).toContain(expected);
  });

  const mount = (mounts: object): object => ({ ...ctrSpec(), mounts: [mounts] });

  test.each<[string, object, string]>([
    [
      'a mount of the host that shows what the guest mounts',
      mount({ destination: '/data', type: 'bind', source: '/srv', options: ['rbind', 'shared'] }),
      'unimplemented: mounts[0].options: shared: mounts in a guest cannot appear on the host (use rslave or rprivate for',
    ],
    [
      'processes of the host',
      mount({ destination: '/p', type: 'none', source: '/proc', options: ['rbind'] }),
      'unimplemented: mounts[0]: /proc tells of the processes of the host, not of the guest (mount a filesystem of type',
    ],
    [
      'a mount without type',
      mount({ destination: '/d', source: '/s' }),
      'unimplemented: mounts[0]: mounts of type "" are not supported: /d (its source is /s, which is no block',
    ],
    [
      'a block device',
      mount({ destination: '/d', type: 'ext4', source: '/dev/sda' }),
      'unimplemented: mounts[0]: mounts of type "ext4" are not supported: /d (its source is /dev/sda, which is no',
    ],
    [
      'a network filesystem',
      mount({ destination: '/d', type: 'nfs', source: 'server:/x' }),
      'unimplemented: mounts[0]: mounts of type "nfs" are not supported: /d',
    ],
    [
      'an idmapped mount',
      mount({ destination: '/d', type: 'tmpfs', source: 'tmpfs', options: ['idmap'] }),
      'unimplemented: mounts[0].options[0]: idmap: idmapped mounts are not supported yet',
    ],
  ])('is %s', (_name, spec, expected) => {
    expect(refusal(spec)).toContain(expected);
  });

  const namespaces = (...list: object[]): object => withLinux({ namespaces: list });
  const all = ['pid', 'ipc', 'uts', 'mount', 'network', 'cgroup'];
  const without = (missing: string): object =>
    namespaces(...all.filter((type) => type !== missing).map((type) => ({ type })));

  test.each<[string, object, string]>([
    [
      'network',
      without('network'),
      "the host's network (the spec has no network namespace, as hostNetwork or --network=host asks for)",
    ],
    ['pid', without('pid'), "the host's processes (the spec has no pid namespace, as hostPID or --pid=host asks for)"],
    ['ipc', without('ipc'), "the host's IPC objects"],
    ['uts', without('uts'), "the host's hostname"],
    ['mount', without('mount'), "the host's mounts"],
    ['linux', { ...ctrSpec(), linux: undefined }, "the host's network"],
  ])('is to share what belongs to the host: %s', (_name, spec, expected) => {
    expect(refusal(spec)).toContain(
      `invalid-argument: linux.namespaces: a container in a virtual machine cannot share ${expected}`,
    );
  });

  test('is to join a namespace, to list one twice, or to name an unknown one', () => {
    expect(refusal(namespaces({ type: 'ipc', path: '/proc/7/ns/ipc' }))).toBe(
      'unimplemented: linux.namespaces[0].path: joining a ipc namespace is not supported yet: /proc/7/ns/ipc',
    );
    expect(refusal(namespaces({ type: 'pid' }, { type: 'pid' }))).toBe(
      'invalid-argument: linux.namespaces[1]: namespace "pid" is listed twice',
    );
    expect(refusal(namespaces({ type: 'tea' }))).toBe('invalid-argument: linux.namespaces[0]: unknown namespace "tea"');
  });

  test.each<[string, object]>([
    ['memory.kernel', { memory: { kernel: 1 } }],
    ['memory.kernelTCP', { memory: { kernelTCP: 9007199254740993n } }],
    ['memory.disableOOMKiller', { memory: { disableOOMKiller: true } }],
    ['cpu.realtimePeriod', { cpu: { realtimePeriod: 1 } }],
    ['cpu.realtimeRuntime', { cpu: { realtimeRuntime: 1 } }],
    ['cpu.cpus', { cpu: { cpus: '0-1' } }],
    ['cpu.mems', { cpu: { mems: '0' } }],
    ['blockIO.leafWeight', { blockIO: { leafWeight: 10 } }],
    ['blockIO.throttleReadBpsDevice', { blockIO: { throttleReadBpsDevice: [{ major: 8, minor: 0, rate: 1 }] } }],
    ['network', { network: { classID: 1 } }],
    ['rdma', { rdma: { mlx5_0: { hcaHandles: 1 } } }],
  ])('is the limit %s, which the guest cannot keep', (name, resources) => {
    expect(refusal(withLinux({ resources }))).toContain(`unimplemented: linux.resources.${name}: `);
  });
});

describe('the documentation', () => {
  const page = readFileSync(join(import.meta.dirname, '../../../docs/oci-spec.md'), 'utf8');
  const documented = new Map(
    Array.from(page.matchAll(/^\| `([\w.]+)` +\| (\w+) +\|/gm), ([, field = '', kind = '']) => [field, kind]),
  );
  const ruled = new Map(
    Object.entries(fieldRules).flatMap(([path, rules]) =>
      Object.entries(rules).map(([field, { kind }]) => [path === '' ? field : `${path}.${field}`, kind] as const),
    ),
  );

  test('has a line for every field, with what happens to it', () => {
    expect(Object.fromEntries(documented)).toEqual(Object.fromEntries(ruled));
  });

  test("covers the runtime-spec's fields, version 1.3", () => {
    const fields = (path: string): string[] => Object.keys(fieldRules[path] ?? {}).sort();
    const list = (text: string): string[] => text.split(' ').sort();
    expect(fields('')).toEqual(
      list('ociVersion process root hostname domainname mounts hooks annotations linux solaris windows vm zos freebsd'),
    );
    expect(fields('process')).toEqual(
      list(
        'terminal consoleSize user args commandLine env cwd capabilities rlimits noNewPrivileges apparmorProfile ' +
          'oomScoreAdj scheduler selinuxLabel ioPriority execCPUAffinity',
      ),
    );
    expect(fields('process.user')).toEqual(list('uid gid umask additionalGids username'));
    expect(fields('process.capabilities')).toEqual(list('bounding effective inheritable permitted ambient'));
    expect(fields('linux')).toEqual(
      list(
        'uidMappings gidMappings sysctl resources cgroupsPath namespaces devices netDevices seccomp rootfsPropagation ' +
          'maskedPaths readonlyPaths mountLabel intelRdt memoryPolicy personality timeOffsets',
      ),
    );
    expect(fields('linux.seccomp')).toEqual(
      list('defaultAction defaultErrnoRet architectures flags listenerPath listenerMetadata syscalls'),
    );
    expect(fields('linux.resources')).toEqual(
      list('devices memory cpu pids blockIO hugepageLimits network rdma unified'),
    );
    expect(fields('linux.resources.memory')).toEqual(
      list('limit reservation swap kernel kernelTCP swappiness disableOOMKiller useHierarchy checkBeforeUpdate'),
    );
    expect(fields('linux.resources.cpu')).toEqual(
      list('shares quota burst period realtimeRuntime realtimePeriod cpus mems idle'),
    );
    expect(fields('linux.resources.blockIO')).toEqual(
      list(
        'weight leafWeight weightDevice throttleReadBpsDevice throttleWriteBpsDevice throttleReadIOPSDevice ' +
          'throttleWriteIOPSDevice',
      ),
    );
  });
});
