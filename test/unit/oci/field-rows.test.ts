/**
 * One test per row of docs/oci-spec.md: what becomes of a value of that field on its way into the guest. What is applied
 * there has a test in test/e2e, too, whose title begins with the field's JSON path; both are compared with the page.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { fieldRules, toGuestSpec } from '../../../src/oci/guest-spec.ts';
import { stringifyJson } from '../../../src/oci/json.ts';
import type { Spec } from '../../../src/oci/spec.ts';
import { ctrSpec, errorOf } from './specs.ts';

type Case =
  | { readonly given: unknown; readonly becomes: unknown; readonly warns?: string }
  /** The message begins with the field's path and goes on so. */
  | { readonly given: unknown; readonly refused: string };

const kept = (given: unknown): Case => ({ given, becomes: given });
const leftOut = (given: unknown): Case => ({ given, becomes: undefined });
const refused = (given: unknown, reason: string): Case => ({ given, refused: reason });

const hook = { path: '/bin/true', args: ['true'], timeout: 5 };
const mount = { destination: '/m', type: 'tmpfs', source: 'tmpfs' };
const options = (...list: string[]) => [{ ...mount, options: list }];
const bind = (source: string, ...list: string[]) => ({ destination: '/m', type: 'bind', source, options: list });
const rlimit = (type: string) => ({ type, soft: 1, hard: 18446744073709551615n });
const namespaces = ['pid', 'ipc', 'uts', 'mount', 'network'].map((type) => ({ type }));
const capabilitySet: Case[] = [
  kept(['CAP_CHOWN', 'CAP_CHECKPOINT_RESTORE', 'cap_kill']),
  { given: ['CAP_KILL', 'CAP_TEA'], becomes: ['CAP_KILL'], warns: 'CAP_TEA is not given: no such capability is known' },
];
const limitOfV1: Case[] = [leftOut(-1), leftOut(0), refused(1, ': cgroup v2, which the guest uses, has no such limit')];
const deviceLimit: Case[] = [
  leftOut([]),
  refused([{ major: 8, minor: 0, rate: 1 }], ": device numbers are the host's and name other devices in the guest"),
];
const notLinux = (given: object): Case[] => [leftOut({}), refused(given, ': Kiln runs Linux containers')];

const rows: Readonly<Record<string, readonly Case[]>> = {
  ociVersion: [
    { given: '1.3.0', becomes: '1.0.2' },
    { given: '1.0.2-dev', becomes: '1.0.2' },
    refused('2.0.0', ': version 2.0.0 is not known'),
  ],
  process: [kept({ args: ['true'], cwd: '/', later: 1 })],
  root: [{ given: { path: 'r', readonly: true }, becomes: { path: '/run/rootfs', readonly: true } }],
  hostname: [kept('oven'), { given: '', becomes: 'c1' }],
  domainname: [kept('example.test')],
  mounts: [
    kept([mount]),
    ...[
      'proc',
      'sysfs',
      'devpts',
      'mqueue',
      'cgroup',
      'cgroup2',
      'ramfs',
      'bpf',
      'debugfs',
      'tracefs',
      'securityfs',
    ].map((type) => kept([{ destination: 'relative/path', type, options: ['nosuid', 'of=its own'] }])),
    kept(options('ro', 'noexec', 'sync', 'dirsync', 'mand', 'remount', 'defaults', 'tmpcopyup', 'size=1m')),
    kept(options('shared', 'rshared', 'slave', 'rslave', 'private', 'rprivate', 'unbindable', 'runbindable')),
    { given: options('ro', 'nosuid', 'rw', 'suid', 'nodev'), becomes: options('nodev') },
    { given: options('rw', 'ro', 'exec', 'noexec', 'async', 'sync'), becomes: options('ro', 'noexec', 'sync') },
    {
      given: options(
        'noatime',
        'atime',
        'nodiratime',
        'diratime',
        'relatime',
        'norelatime',
        'strictatime',
        'nostrictatime',
      ),
      becomes: options(),
    },
    {
      given: options('rro', 'rnosuid', 'rnodev', 'rnoexec', 'rnoatime', 'rnodiratime', 'rrelatime', 'rstrictatime'),
      becomes: options('ro', 'nosuid', 'nodev', 'noexec', 'noatime', 'nodiratime', 'relatime', 'strictatime'),
    },
    {
      given: options('ro', 'rrw', 'rsuid', 'rdev', 'rexec', 'ratime', 'rdiratime', 'rnorelatime', 'rnostrictatime'),
      becomes: options(),
    },
    {
      given: options(
        'loud',
        'silent',
        'lazytime',
        'nolazytime',
        'noiversion',
        'symfollow',
        'rsymfollow',
        'mand',
        'nomand',
      ),
      becomes: options(),
    },
    { given: options('context="x"', 'ro'), becomes: options('ro'), warns: 'context="x" is not applied' },
    refused(options('ro', 'nosymfollow'), '[0].options[1]: nosymfollow: crun in the guest cannot forbid'),
    refused(options('rnosymfollow'), '[0].options[0]: rnosymfollow: crun in the guest cannot forbid'),
    refused(options('iversion'), '[0].options[0]: iversion: filesystems of memory have no inode versions'),
    refused(options('idmap'), '[0].options[0]: idmap: idmapped mounts are not supported yet'),
    refused(options('ridmap'), '[0].options[0]: ridmap: idmapped mounts are not supported yet'),
    refused([mount, { ...mount, uidMappings: [] }], '[1].uidMappings: idmapped mounts are not supported yet'),
    refused([{ ...mount, gidMappings: [] }], '[0].gidMappings: idmapped mounts are not supported yet'),
    {
      given: [mount, bind('/srv', 'rbind', 'rro', 'nosuid', 'rw', 'rslave'), bind('rel/file', 'bind', 'rprivate')],
      becomes: [
        mount,
        bind('/run/kiln/volumes/0', 'rbind', 'nosuid', 'rslave'),
        bind('/run/kiln/volumes/1', 'bind', 'rprivate'),
      ],
    },
    kept([bind('/sys/fs/cgroup', 'rbind', 'ro'), bind('/dev/shm', 'bind'), bind('/dev/null', 'bind')]),
    refused([bind('/srv', 'rbind', 'rshared')], '[0].options: rshared: mounts in a guest cannot appear on the host'),
    refused([bind('/srv/../proc/1', 'rbind')], '[0]: /proc/1 tells of the processes of the host, not of the guest'),
    refused([bind('/dev/sda', 'bind')], '[0]: /dev/sda is a device of the host, not of the guest'),
    refused([bind('/dev', 'rbind')], '[0]: /dev is a device of the host, not of the guest'),
    refused([{ ...mount, type: 'nfs', source: 'server:/x' }], '[0]: mounts of type "nfs" are not supported: /m'),
  ],
  hooks: [
    leftOut({ prestart: [hook], createRuntime: [hook], poststart: [hook], poststop: [hook], createContainer: [] }),
    {
      given: { createContainer: [hook], startContainer: [{ ...hook, env: ['A=b'] }], poststop: [hook] },
      becomes: { createContainer: [{ ...hook, env: [] }], startContainer: [{ ...hook, env: ['A=b'] }] },
    },
    refused({ midlife: [hook] }, '.midlife: no such moment to run a hook at is known'),
  ],
  annotations: [
    kept({ 'org.example': 'x', 'io.kiln.vcpus': '1' }),
    {
      given: { a: 'b', 'run.oci.handler': 'krun' },
      becomes: { a: 'b' },
      warns: "annotation run.oci.handler: not passed to the guest's crun",
    },
  ],
  // Below: it cannot be set as a whole without its namespaces.
  linux: [],
  solaris: notLinux({ milestone: 'x' }),
  windows: notLinux({ layerFolders: ['c:'] }),
  vm: [leftOut({}), refused({ kernel: { path: '/k' } }, ': the kernel is chosen by the annotation io.kiln.kernel')],
  zos: notLinux({ namespaces: [{}] }),
  freebsd: notLinux({ jail: { host: 'new' } }),

  'process.terminal': [kept(true), kept(false)],
  'process.consoleSize': [kept({ height: 1, width: 2 })],
  'process.user': [kept({ uid: 1, gid: 2 })],
  'process.user.uid': [kept(4294967294)],
  'process.user.gid': [kept(7)],
  'process.user.umask': [kept(0o027)],
  'process.user.additionalGids': [kept([1, 2])],
  'process.user.username': [leftOut('administrator')],
  'process.args': [kept(['', 'a b'])],
  'process.commandLine': [leftOut('dir')],
  'process.env': [kept(['A=b'])],
  'process.cwd': [kept('/home')],
  'process.capabilities': [kept({ bounding: [] })],
  'process.capabilities.bounding': capabilitySet,
  'process.capabilities.effective': capabilitySet,
  'process.capabilities.inheritable': capabilitySet,
  'process.capabilities.permitted': capabilitySet,
  'process.capabilities.ambient': capabilitySet,
  'process.rlimits': [
    kept([rlimit('RLIMIT_CORE'), rlimit('RLIMIT_MSGQUEUE')]),
    refused([rlimit('RLIMIT_TEA')], '[0].type: RLIMIT_TEA is no resource that can be limited'),
    refused([rlimit('RLIMIT_AS'), rlimit('RLIMIT_AS')], '[1].type: RLIMIT_AS is listed twice'),
  ],
  'process.noNewPrivileges': [kept(true)],
  'process.apparmorProfile': [
    leftOut('unconfined'),
    { given: 'tight', becomes: undefined, warns: '"tight" is not applied: AppArmor is not active in the guest' },
  ],
  'process.oomScoreAdj': [kept(0), kept(-5)],
  'process.scheduler': [
    kept({ policy: 'SCHED_DEADLINE', runtime: 1, deadline: 2, period: 3, flags: ['SCHED_FLAG_RESET_ON_FORK'] }),
    refused({ policy: 'SCHED_ISO' }, '.policy: "SCHED_ISO" is not known; expected SCHED_OTHER, SCHED_FIFO'),
    refused({ nice: 3 }, '.policy: is missing; expected SCHED_OTHER'),
    refused(
      { policy: 'SCHED_RR', flags: ['SCHED_FLAG_UTIL_CLAMP_MIN'] },
      '.flags[0]: "SCHED_FLAG_UTIL_CLAMP_MIN" is not',
    ),
  ],
  'process.selinuxLabel': [
    leftOut(''),
    { given: 'a:b:c', becomes: undefined, warns: 'not applied: SELinux is not active in the guest' },
  ],
  'process.ioPriority': [
    kept({ class: 'IOPRIO_CLASS_IDLE', priority: 7 }),
    refused({ class: 'IOPRIO_CLASS_TEA', priority: 0 }, '.class: "IOPRIO_CLASS_TEA" is not known'),
    refused({ class: 'IOPRIO_CLASS_BE', priority: 8 }, '.priority: expected 0 to 7, received 8'),
  ],
  'process.execCPUAffinity': [leftOut({}), refused({ initial: '0' }, ': names CPUs of the host')],

  'linux.uidMappings': [kept([{ containerID: 0, hostID: 1000, size: 10 }])],
  'linux.gidMappings': [kept([{ containerID: 0, hostID: 1000, size: 10 }])],
  'linux.sysctl': [
    kept({ 'kernel.shmmax': '1', 'fs.mqueue.msg_max': '2', 'kernel/domainname': 'x', 'net/ipv4/conf/eth0.1/mtu': '3' }),
    refused({ 'vm.max_map_count': '1' }, '["vm.max_map_count"]: this parameter is not of a namespace'),
    refused({ 'kernel.hostname': 'x' }, '["kernel.hostname"]: the hostname is set by the field hostname'),
    refused({ 'net.../../kernel.sem': '1' }, '["net.../../kernel.sem"]: this is no name of a parameter'),
    refused({ 'net/../kernel/sysrq': '1' }, '["net/../kernel/sysrq"]: this is no name of a parameter'),
  ],
  'linux.resources': [kept({ later: 1 })],
  'linux.cgroupsPath': [{ given: '/host/x', becomes: '/kiln/c1' }],
  'linux.namespaces': [
    { given: namespaces, becomes: [...namespaces.slice(0, 4), { type: 'cgroup' }] },
    {
      given: [...namespaces, { type: 'cgroup' }, { type: 'user' }, { type: 'time' }],
      becomes: expect.arrayContaining([{ type: 'time' }, { type: 'user' }]),
    },
    refused([...namespaces, { type: 'time' }], '[5]: crun in the guest can make a time namespace only together with a'),
    refused([{ type: 'tea' }], '[0]: unknown namespace "tea"'),
    refused([{ type: 'pid' }, { type: 'pid' }], '[1]: namespace "pid" is listed twice'),
    refused([{ type: 'pid', path: '/proc/1/ns/pid' }], '[0].path: joining a pid namespace is not supported yet'),
    refused(namespaces.slice(1), ": a container in a virtual machine cannot share the host's processes"),
  ],
  'linux.devices': [
    kept([
      { path: '/dev/x', type: 'c', major: 1, minor: 3 },
      { path: '/y', type: 'p' },
      { path: '/dev/net/tun', type: 'c', major: 10, minor: 200 },
      { path: '/dev/fuse', type: 'u', major: 10, minor: 229 },
    ]),
    // The guest's number comes later: block-devices.test.ts.
    kept([{ path: '/dev/sda', type: 'b', major: 8, minor: 0 }]),
    refused(
      [{ path: '/dev/sg0', type: 'c', major: 21, minor: 0 }],
      '[0]: /dev/sg0 (c 21:0) is a character device of the host',
    ),
    refused([{ path: '/dev/x', type: 'x' }], '[0]: /dev/x has the unknown type "x"'),
  ],
  'linux.netDevices': [
    leftOut({}),
    refused({ eth1: {} }, ': moving a network device of the host is not supported yet: eth1'),
  ],
  'linux.seccomp': [kept({ defaultAction: 'SCMP_ACT_ALLOW' })],
  'linux.rootfsPropagation': [
    kept('rslave'),
    leftOut(''),
    refused('sideways', ': "sideways" is not known; expected shared'),
  ],
  'linux.maskedPaths': [kept(['/proc/kcore'])],
  'linux.readonlyPaths': [kept(['/proc/sys'])],
  'linux.mountLabel': [{ given: 'a:b', becomes: undefined, warns: 'not applied: SELinux is not active in the guest' }],
  'linux.intelRdt': [
    leftOut({ closID: '' }),
    refused({ closID: 'a' }, ': cache and memory bandwidth are shared out by'),
  ],
  'linux.memoryPolicy': [
    leftOut({ mode: 'MPOL_DEFAULT' }),
    leftOut({ mode: 'MPOL_LOCAL' }),
    refused({ mode: 'MPOL_BIND', nodes: '0' }, ': names memory nodes of the host'),
  ],
  'linux.personality': [
    kept({ domain: 'LINUX32' }),
    refused({ domain: 'BSD' }, '.domain: "BSD" is not known; expected LINUX, LINUX32'),
    refused({ domain: 'LINUX', flags: ['X'] }, '.flags[0]: X is not known'),
  ],
  'linux.timeOffsets': [
    leftOut({ boottime: { secs: 0 } }),
    refused({ boottime: { secs: 1 } }, ': crun in the guest cannot set the clocks of a time namespace'),
  ],

  'linux.seccomp.defaultAction': [
    kept('SCMP_ACT_ERRNO'),
    refused('SCMP_ACT_NOTIFY', ': a seccomp agent on the host cannot serve a container in a VM'),
  ],
  'linux.seccomp.defaultErrnoRet': [kept(38)],
  'linux.seccomp.architectures': [kept(['SCMP_ARCH_X86'])],
  'linux.seccomp.flags': [
    kept(['SECCOMP_FILTER_FLAG_LOG', 'SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV']),
    refused(['SECCOMP_FILTER_FLAG_TEA'], '[0]: SECCOMP_FILTER_FLAG_TEA is no flag of seccomp that is known'),
  ],
  'linux.seccomp.listenerPath': [leftOut('/run/agent.sock')],
  'linux.seccomp.listenerMetadata': [leftOut('x')],
  'linux.seccomp.syscalls': [
    kept([{ names: ['chmod'], action: 'SCMP_ACT_ERRNO', errnoRet: 1, args: [] }]),
    refused(
      [
        { names: ['a'], action: 'SCMP_ACT_ALLOW' },
        { names: ['b'], action: 'SCMP_ACT_NOTIFY' },
      ],
      '[1].action: a seccomp agent on the host cannot serve a container in a VM',
    ),
  ],

  'linux.resources.devices': [
    kept([
      { allow: false, access: 'rwm' },
      { allow: true, type: 'c', major: 1, minor: 3, access: 'rwm' },
    ]),
    { given: [{ allow: true, type: 'b', major: 8, minor: 0, access: 'rwm' }], becomes: [] },
  ],
  'linux.resources.memory': [kept({ later: 1 })],
  'linux.resources.cpu': [kept({ later: 1 })],
  'linux.resources.pids': [kept({ limit: -1 })],
  'linux.resources.blockIO': [kept({ later: 1 })],
  'linux.resources.hugepageLimits': [
    kept([
      { pageSize: '2MB', limit: 4194304 },
      { pageSize: '1GB', limit: 18446744073709551615n },
    ]),
    leftOut([{ pageSize: '64KB', limit: 0 }]),
    refused([{ pageSize: '64KB', limit: 1 }], '[0].pageSize: the guest has no huge pages of 64KB'),
  ],
  'linux.resources.network': [
    leftOut({ classID: 0, priorities: [] }),
    refused({ classID: 1 }, ': cgroup v2, which the guest uses, has no such limit'),
  ],
  'linux.resources.rdma': [leftOut({}), refused({ mlx5_0: { hcaHandles: 1 } }, ': the guest has no RDMA devices')],
  'linux.resources.unified': [kept({ 'memory.high': '1' })],
  'linux.resources.memory.limit': [kept(1), kept(-1)],
  'linux.resources.memory.reservation': [kept(1)],
  'linux.resources.memory.swap': [kept(-1)],
  'linux.resources.memory.kernel': limitOfV1,
  'linux.resources.memory.kernelTCP': limitOfV1,
  'linux.resources.memory.swappiness': [
    leftOut(0),
    { given: 60, becomes: undefined, warns: 'not applied: the guest has no swap' },
  ],
  'linux.resources.memory.disableOOMKiller': [
    leftOut(false),
    refused(true, ': cgroup v2, which the guest uses, cannot switch off the OOM killer'),
  ],
  'linux.resources.memory.useHierarchy': [leftOut(true)],
  'linux.resources.memory.checkBeforeUpdate': [kept(true)],
  'linux.resources.cpu.shares': [kept(512)],
  'linux.resources.cpu.quota': [kept(-1)],
  'linux.resources.cpu.burst': [leftOut(5)],
  'linux.resources.cpu.period': [kept(100000)],
  'linux.resources.cpu.realtimeRuntime': limitOfV1,
  'linux.resources.cpu.realtimePeriod': limitOfV1,
  'linux.resources.cpu.cpus': [leftOut(''), refused('0-1', ": pinning to the host's CPUs is not supported yet")],
  'linux.resources.cpu.mems': [leftOut(''), refused('0', ": pinning to the host's memory nodes is not supported yet")],
  'linux.resources.cpu.idle': [kept(1)],
  'linux.resources.blockIO.weight': [kept(100)],
  'linux.resources.blockIO.leafWeight': [
    leftOut(0),
    refused(10, ': cgroup v2, which the guest uses, has no such limit'),
  ],
  'linux.resources.blockIO.weightDevice': deviceLimit,
  'linux.resources.blockIO.throttleReadBpsDevice': deviceLimit,
  'linux.resources.blockIO.throttleWriteBpsDevice': deviceLimit,
  'linux.resources.blockIO.throttleReadIOPSDevice': deviceLimit,
  'linux.resources.blockIO.throttleWriteIOPSDevice': deviceLimit,
};

type Tree = { [name: string]: unknown };

/** ctr's spec with another value at a path. */
function withValue(path: string, value: unknown): Spec {
  const spec = ctrSpec() as unknown as Tree;
  const names = path.split('.');
  const last = names.pop() ?? '';
  let at = spec;
  for (const name of names) {
    at[name] ??= {};
    at = at[name] as Tree;
  }
  at[last] = value;
  return spec as unknown as Spec;
}

function valueAt(spec: Spec, path: string): unknown {
  return path.split('.').reduce<unknown>((at, name) => (at as Tree | undefined)?.[name], spec);
}

const translate = (spec: Spec) => toGuestSpec(spec, { id: 'c1', rootfsPath: '/run/rootfs', hostname: 'c1' });

const cases = Object.entries(rows).flatMap(([path, list]) =>
  list.map((each) => [path, stringifyJson(each.given), each] as const),
);

describe('the field', () => {
  test.each(cases)('%s: %s', (path, _given, each) => {
    const spec = withValue(path, each.given);
    if ('refused' in each) {
      expect(errorOf(() => translate(spec)).message).toContain(`${path}${each.refused}`);
      return;
    }
    const { spec: guest, warnings } = translate(spec);
    expect(valueAt(guest, path)).toEqual(each.becomes);
    expect(warnings.join('\n')).toContain(each.warns ?? '');
    if (each.warns === undefined) expect(warnings).toEqual([]);
  });

  test('linux: without namespaces is refused, and with unknown members is passed on', () => {
    expect(errorOf(() => translate(withValue('linux', {}))).message).toContain('linux.namespaces: ');
    expect(translate(withValue('linux.later', 1)).spec.linux).toHaveProperty('later', 1);
  });

  test("linux.sysctl: of the network names the guest's network namespace, for crun to agree", () => {
    const { spec } = translate(withValue('linux.sysctl', { 'net.core.somaxconn': '1' }));
    expect(spec.linux?.namespaces).toContainEqual({ type: 'network', path: '/proc/self/ns/net' });
  });

  test('linux.sysctl: of the network is refused beside a user namespace', () => {
    const spec = withValue('linux.namespaces', [...namespaces, { type: 'user' }]);
    const both = { ...spec, linux: { ...spec.linux, sysctl: { 'net.core.somaxconn': '1' } } };
    expect(errorOf(() => translate(both)).message).toBe(
      'linux.sysctl["net.core.somaxconn"]: the network is not of the user namespace that the container has',
    );
  });

  test('linux.sysctl: a domain that the field domainname contradicts is refused', () => {
    const spec = { ...withValue('linux.sysctl', { 'kernel.domainname': 'a' }), domainname: 'b' };
    expect(errorOf(() => translate(spec)).message).toBe(
      'linux.sysctl["kernel.domainname"]: the field domainname says otherwise',
    );
  });

  test('linux.resources.cpu.burst: becomes a cgroup file', () => {
    const { spec } = translate(withValue('linux.resources.cpu.burst', 5));
    expect(spec.linux?.resources?.unified).toEqual({ 'cpu.max.burst': '5' });
  });
});

/** Fields whose end-to-end test is about more than the field: its file, and how its title begins. */
const testedUnderAnotherTitle: Readonly<Record<string, readonly [file: string, title: string]>> = {
  'process.terminal': ['terminal.test.ts', 'is one for the program in the guest: size, keys'],
  'process.consoleSize': ['terminal.test.ts', 'is one for the program in the guest: size, keys'],
};

describe('every row of the documentation', () => {
  const root = join(import.meta.dirname, '../../..');
  const page = readFileSync(join(root, 'docs/oci-spec.md'), 'utf8');
  const documented = Array.from(
    page.matchAll(/^\| `([\w.]+)` +\| (\w+) +\| (\w+) +\|/gm),
    ([, path = '', kind, where]) => ({
      path,
      kind,
      where,
    }),
  );
  const paths = documented.map(({ path }) => path).sort();

  test('has a test of its translation', () => {
    expect(Object.keys(rows).sort()).toEqual(paths);
    const ruled = Object.entries(fieldRules).flatMap(([path, rules]) =>
      Object.keys(rules).map((name) => (path === '' ? name : `${path}.${name}`)),
    );
    expect(paths).toEqual(ruled.sort());
  });

  test('says where it is dealt with, in the words of its rule', () => {
    const allowed: Record<string, readonly (string | undefined)[]> = {
      keep: ['guest'],
      drop: ['ignored'],
      refuse: ['refused'],
      translate: ['guest', 'host', 'ignored', 'refused', 'below'],
    };
    for (const { path, kind = '', where } of documented) expect(allowed[kind], path).toContain(where);
  });

  test('that is applied has an end-to-end test that is named by it', () => {
    const folder = join(root, 'test/e2e');
    const titles = readdirSync(folder)
      .map((name) => readFileSync(join(folder, name), 'utf8'))
      .flatMap((source) =>
        Array.from(source.matchAll(/\bit\(\s*['"`]([\w.]+(?:, [\w.]+)*): /g), ([, list = '']) => list),
      );
    const tested = new Set(titles.flatMap((list) => list.split(', ')));
    const applied = documented.filter(({ where }) => where === 'guest' || where === 'host').map(({ path }) => path);
    for (const [path, [file, title]] of Object.entries(testedUnderAnotherTitle)) {
      expect(readFileSync(join(folder, file), 'utf8'), path).toContain(`it('${title}`);
      tested.add(path);
    }
    expect(applied.filter((path) => !tested.has(path))).toEqual([]);
    expect(applied.length).toBeGreaterThan(40);
  });
});
