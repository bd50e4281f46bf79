/**
 * The fields of the OCI spec that Kiln or the guest applies, as the inside of a container sees them. A test's title begins with
 * the JSON paths it is about; test/unit/oci/field-rows.test.ts compares them with docs/oci-spec.md.
 */
import { beforeAll, describe, expect, it } from 'vitest';
import { busyboxLayer, type LayerEntry } from '../support/images.ts';
import { underKiln } from '../support/paths.ts';
import { field, parse, say } from '../support/say.ts';
import { useScene } from '../support/use-scene.ts';

/** An x86-64 program of three instructions that ends with status 42 by a system call of 32-bit programs. */
function int80Program(): Buffer {
  const base = 0x400000n;
  const code = Buffer.from('b801000000bb2a000000cd80', 'hex');
  const headers = Buffer.alloc(64 + 56);
  headers.write('7f454c46020101', 'hex'); // ELF, 64 bits, little-endian, version 1: elf(5)
  headers.writeUInt16LE(2, 16); // ET_EXEC
  headers.writeUInt16LE(62, 18); // EM_X86_64
  headers.writeUInt32LE(1, 20);
  headers.writeBigUInt64LE(base + BigInt(headers.length), 24); // e_entry
  headers.writeBigUInt64LE(64n, 32); // e_phoff
  headers.writeUInt16LE(64, 52); // e_ehsize
  headers.writeUInt16LE(56, 54); // e_phentsize
  headers.writeUInt16LE(1, 56); // e_phnum
  headers.writeUInt32LE(1, 64); // PT_LOAD
  headers.writeUInt32LE(5, 68); // PF_R | PF_X
  headers.writeBigUInt64LE(base, 80);
  headers.writeBigUInt64LE(base, 88);
  const size = BigInt(headers.length + code.length);
  headers.writeBigUInt64LE(size, 96);
  headers.writeBigUInt64LE(size, 104);
  headers.writeBigUInt64LE(0x1000n, 112);
  return Buffer.concat([headers, code]);
}

const image = {
  name: 'docker.io/kiln/fields:test',
  get layers(): LayerEntry[][] {
    const files: LayerEntry[] = [
      { kind: 'file', path: 'bin/int80', mode: 0o755, content: int80Program() },
      { kind: 'dir', path: 'run', mode: 0o755 },
      { kind: 'dir', path: 'seed', mode: 0o755 },
      { kind: 'file', path: 'seed/grain', mode: 0o644, content: Buffer.from('grain') },
    ];
    return [[...busyboxLayer(), ...files]];
  },
  config: { Cmd: ['sh'] },
};

const mib = 1024 * 1024;

/** A set of capabilities, by their numbers, as /proc shows it. */
const capabilities = (...numbers: number[]): string =>
  numbers
    .reduce((mask, number) => mask | (1n << BigInt(number)), 0n)
    .toString(16)
    .padStart(16, '0');

describe.runIf(underKiln)('the fields of the OCI spec', () => {
  const scene = useScene({ version: '2.1', images: [image] });

  describe('of a container with its own idea of nearly everything', () => {
    let seen: Map<string, string>;
    let mounts: Map<string, string>;

    beforeAll(async () => {
      const id = scene.id('fields');
      const script = `${say}
        say mountinfo cat /proc/self/mountinfo
        say status cat /proc/self/status
        say domainname cat /proc/sys/kernel/domainname
        say ip_forward cat /proc/sys/net/ipv4/ip_forward
        say unprivileged cat /proc/sys/net/ipv4/ip_unprivileged_port_start
        say queues cat /proc/sys/fs/mqueue/queues_max
        say scheduling cut -d' ' -f19,41 /proc/1/stat
        say ionice ionice -p 1
        say oom cat /proc/self/oom_score_adj
        say cgroup cat /proc/self/cgroup
        for f in memory.low memory.swap.max memory.high cpu.weight cpu.max.burst hugetlb.2MB.max; do
          say $f cat /sys/fs/cgroup/$f
        done
        say io.weight sh -c 'cat /sys/fs/cgroup/io.bfq.weight 2>/dev/null || cat /sys/fs/cgroup/io.weight'
        say zero stat -c '%F %t:%T %a %u:%g' /run/my-zero
        say zero-reads sh -c 'head -c 3 /run/my-zero | wc -c'
        say fifo stat -c '%F %a' /run/my-fifo
        say fuse sh -c 'exec 3<>/dev/fuse && echo open'
        say tun sh -c 'exec 3<>/dev/net/tun && echo open'
        say int80 sh -c '/bin/int80; echo $?'
        say mkdir mkdir /tmp/new
        say scratch-mode stat -c '%a %u:%g' /scratch
        say grain cat /seed/grain
        say hook-created cat /created
        say hook-started cat /started
        say namespaces sh -c 'ls /proc/self/ns'
        say links sh -c 'ls /sys/class/net'
      `;
      const result = await scene.runWithSpec(
        id,
        ['sh', '-c', script],
        (spec) => {
          spec.ociVersion = '1.3.0';
          spec.process.user = { uid: 0, gid: 0 };
          const caps = ['CAP_CHOWN', 'CAP_NET_BIND_SERVICE', 'CAP_KILL'];
          spec.process.capabilities = {
            bounding: [...caps, 'CAP_MKNOD'],
            permitted: caps,
            effective: ['CAP_CHOWN'],
            inheritable: ['CAP_NET_BIND_SERVICE', 'CAP_NONSENSE'],
            ambient: ['CAP_NET_BIND_SERVICE'],
          };
          Object.assign(spec.process, {
            oomScoreAdj: 0,
            scheduler: { policy: 'SCHED_BATCH', nice: 7 },
            ioPriority: { class: 'IOPRIO_CLASS_BE', priority: 6 },
            execCPUAffinity: {},
          });
          Object.assign(spec, { domainname: 'example.test', annotations: { 'org.example.note': 'kept' } });
          Object.assign(spec.linux, {
            rootfsPropagation: 'shared',
            sysctl: {
              'net.ipv4.ip_forward': '1',
              'net/ipv4/ip_unprivileged_port_start': '7',
              'fs.mqueue.queues_max': '33',
              'kernel.domainname': 'example.test',
            },
            devices: [
              { path: '/run/my-zero', type: 'c', major: 1, minor: 5, fileMode: 0o644, uid: 12, gid: 34 },
              { path: '/run/my-fifo', type: 'p', fileMode: 0o600 },
              { path: '/dev/fuse', type: 'c', major: 10, minor: 229, fileMode: 0o666 },
              { path: '/dev/net/tun', type: 'c', major: 10, minor: 200, fileMode: 0o666 },
            ],
            cgroupsPath: '/of/the/host',
            resources: {
              devices: [
                { allow: false, access: 'rwm' },
                { allow: true, type: 'c', major: 10, minor: 229, access: 'rwm' },
              ],
              memory: { limit: 128 * mib, reservation: 32 * mib, swap: 160 * mib, checkBeforeUpdate: true },
              cpu: { shares: 512, quota: 100_000, burst: 20_000, period: 100_000 },
              blockIO: { weight: 200 },
              hugepageLimits: [
                { pageSize: '2MB', limit: 4 * mib },
                { pageSize: '1GB', limit: 0 },
              ],
              unified: { 'memory.high': String(120 * mib) },
            },
          });
          const seccomp = spec.linux.seccomp as { syscalls: { names: string[] }[] };
          const syscalls = seccomp.syscalls.map((rule) => ({
            ...rule,
            names: rule.names.filter((name) => !/^mkdir(at)?$/.test(name)),
          }));
          spec.linux.seccomp = {
            ...seccomp,
            defaultErrnoRet: 28, // ENOSPC: nothing else gives it here.
            architectures: ['SCMP_ARCH_X86_64'],
            flags: ['SECCOMP_FILTER_FLAG_LOG'],
            syscalls: syscalls.filter(({ names }) => names.length > 0),
          };
          const kept = spec.mounts.filter(({ destination }) => !['/sys', '/dev/pts'].includes(destination));
          spec.mounts = [
            ...kept,
            { destination: '/sys', type: 'sysfs', source: 'sysfs', options: ['rro', 'rnosuid', 'noexec', 'nodev'] },
            {
              destination: '/dev/pts',
              type: 'devpts',
              source: 'devpts',
              options: ['newinstance', 'ptmxmode=0660', 'mode=0600'],
            },
            { destination: '/sys/fs/cgroup', type: 'cgroup', source: 'cgroup', options: ['ro', 'nosuid', 'private'] },
            {
              destination: 'scratch',
              type: 'tmpfs',
              source: 'tmpfs',
              options: [
                'nosuid',
                'suid',
                'nodev',
                'rnoexec',
                'noatime',
                'mode=1750',
                'uid=5',
                'gid=6',
                'size=2m',
                'lazytime',
              ],
            },
            {
              destination: '/ro',
              type: 'tmpfs',
              source: 'tmpfs',
              options: ['rw', 'ro', 'sync', 'dirsync', 'nodiratime'],
            },
            {
              destination: '/rw',
              type: 'tmpfs',
              source: 'tmpfs',
              options: ['ro', 'rw', 'strictatime', 'loud', 'defaults'],
            },
            { destination: '/seed', type: 'tmpfs', source: 'tmpfs', options: ['tmpcopyup', 'shared'] },
            { destination: '/ram', type: 'ramfs', source: 'ramfs', options: ['unbindable'] },
            { destination: '/queues', type: 'mqueue', source: 'mqueue', options: ['nosuid', 'noexec'] },
            { destination: '/proc2', type: 'proc', source: 'proc', options: ['hidepid=2'] },
            { destination: '/cgroup2', type: 'cgroup2', source: 'cgroup2', options: ['ro'] },
            ...['bpf', 'debugfs', 'tracefs', 'securityfs'].map((type) => ({
              destination: `/${type}`,
              type,
              source: type,
            })),
          ];
          const root = `/run/kiln/roots/${id}/rootfs`;
          Object.assign(spec, {
            hooks: {
              createContainer: [
                {
                  path: '/bin/busybox',
                  args: ['sh', '-c', `{ cat; echo; env; } > ${root}/created`],
                  env: ['FROM=spec'],
                },
              ],
              startContainer: [{ path: '/bin/sh', args: ['sh', '-c', '{ cat; echo; env; } > /started'], timeout: 30 }],
            },
          });
          return undefined;
        },
        { image: image.name, flags: ['--seccomp'] },
      );
      expect(result).toMatchObject({ code: 0, stderr: '' });
      seen = parse(result.stdout);
      const lines = seen.get('mountinfo')?.split('|') ?? [];
      mounts = new Map(lines.map((line) => [line.split(' ')[4] ?? '', line]));
    });

    it('ociVersion: a newer one than crun knows runs', () => expect(seen.size).toBeGreaterThan(20));

    it('domainname: is the domain of the container', () => expect(seen.get('domainname')).toBe('example.test'));

    it('annotations: are told to hooks in the guest', () => {
      expect(seen.get('hook-created')).toContain('"org.example.note":"kept"');
    });

    it('process.capabilities.bounding: is the set of the spec', () => {
      expect(field(seen.get('status'), 'CapBnd')).toBe(capabilities(0, 5, 10, 27));
    });
    it('process.capabilities.permitted: is the set of the spec', () => {
      expect(field(seen.get('status'), 'CapPrm')).toBe(capabilities(0, 5, 10));
    });
    it('process.capabilities.inheritable: is the set of the spec, without what does not exist', () => {
      expect(field(seen.get('status'), 'CapInh')).toBe(capabilities(10));
    });
    it('process.capabilities.ambient: is the set of the spec', () => {
      expect(field(seen.get('status'), 'CapAmb')).toBe(capabilities(10));
    });

    it('process.oomScoreAdj: may be 0', () => expect(seen.get('oom')).toBe('0'));
    it('process.scheduler: is the policy of the program', () => expect(seen.get('scheduling')).toBe('7 3'));
    it('process.ioPriority: is the priority of the program', () => {
      expect(seen.get('ionice')).toBe('best-effort: prio 6');
    });

    it('linux.sysctl: parameters of the network, by either form of their names, and of message queues', () => {
      expect(seen.get('ip_forward')).toBe('1');
      expect(seen.get('unprivileged')).toBe('7');
      expect(seen.get('queues')).toBe('33');
      expect(seen.get('links')).toBe('lo');
    });

    it('linux.devices: are made with mode and owner, those of drivers can be opened', () => {
      expect(seen.get('zero')).toBe('character special file 1:5 644 12:34');
      expect(seen.get('zero-reads')).toBe('3');
      expect(seen.get('fifo')).toBe('fifo 600');
      expect(seen.get('fuse')).toBe('open');
    });
    it('linux.resources.devices: an allowed device can be used, another cannot', () => {
      expect(seen.get('fuse')).toBe('open');
      expect(seen.get('tun')).toContain('Operation not permitted');
    });

    it('linux.cgroupsPath: the container is at the root of its own view', () => {
      expect(seen.get('cgroup')).toBe('0::/');
    });

    it('linux.resources.memory.reservation: is memory.low', () =>
      expect(seen.get('memory.low')).toBe(String(32 * mib)));
    it('linux.resources.memory.swap: is memory and swap together', () => {
      expect(seen.get('memory.swap.max')).toBe(String(32 * mib));
    });
    it('linux.resources.memory.checkBeforeUpdate: does not hinder a start', () =>
      expect(seen.size).toBeGreaterThan(20));
    it('linux.resources.cpu.shares: is a weight', () => expect(seen.get('cpu.weight')).toBe('20'));
    it('linux.resources.cpu.burst: is cpu.max.burst', () => expect(seen.get('cpu.max.burst')).toBe('20000'));
    // crun scales the weights of v1 (10 to 1000) to those of v2 (1 to 10000) where there is no BFQ.
    it('linux.resources.blockIO.weight: is a weight', () =>
      expect(seen.get('io.weight')).toMatch(/^default (200|1920)$/));
    it('linux.resources.hugepageLimits: is a limit', () => expect(seen.get('hugetlb.2MB.max')).toBe(String(4 * mib)));
    it('linux.resources.unified: is written to its file', () =>
      expect(seen.get('memory.high')).toBe(String(120 * mib)));

    it('linux.seccomp.defaultAction, linux.seccomp.defaultErrnoRet: are what a call that is not listed gets', () => {
      expect(seen.get('mkdir')).toContain('No space left on device');
    });
    it('linux.seccomp.architectures: calls of one that is not listed end the program', () => {
      expect(seen.get('int80')).toBe(`Bad system call|${128 + 31}`);
    });
    it('linux.seccomp.flags: are accepted', () => expect(field(seen.get('status'), 'Seccomp')).toBe('2'));

    it('linux.rootfsPropagation: is shared', () => expect(mounts.get('/')).toContain(' shared:'));

    it('mounts: virtual filesystems of every kind have their options', () => {
      const expected: Record<string, RegExp> = {
        '/sys': /ro,nosuid,nodev,noexec\S* - sysfs /,
        '/dev/pts': / - devpts \S+ (?=\S*mode=600)(?=\S*ptmxmode=660)/,
        '/sys/fs/cgroup': / ro,nosuid\S* - cgroup2 /,
        '/scratch': / rw,nodev,noexec,noatime - tmpfs tmpfs (?=\S*size=2048k)(?=\S*mode=1750)(?=\S*uid=5)(?=\S*gid=6)/,
        '/ro': / ro,nodiratime\S* - tmpfs tmpfs rw,sync,dirsync/,
        '/rw': / rw - tmpfs /,
        '/seed': / shared:\d+ - tmpfs /,
        '/ram': / unbindable - ramfs /,
        '/queues': /nosuid,noexec\S* - mqueue /,
        '/proc2': / - proc proc rw,hidepid=(2|invisible)/,
        '/cgroup2': / ro\S* - cgroup2 /,
        ...{ '/bpf': / - bpf /, '/debugfs': / - debugfs /, '/tracefs': / - tracefs /, '/securityfs': / - securityfs / },
      };
      for (const [destination, line] of Object.entries(expected)) expect(mounts.get(destination)).toMatch(line);
      expect(seen.get('scratch-mode')).toBe('1750 5:6');
      expect(seen.get('grain')).toBe('grain');
    });

    it('hooks: of the guest run in it, told the state, with the environment that they list', () => {
      const variables = (text = ''): string[] =>
        text.split('|').filter((line) => /^(FROM|HOME|NODE_\w+|KILN_\w+)=/.test(line));
      expect(seen.get('hook-created')).toMatch(/^\{.*"status":"created".*\}/);
      expect(variables(seen.get('hook-created'))).toEqual(['FROM=spec']);
      expect(seen.get('hook-started')).toMatch(/^\{.*"status":"starting".*\}/);
      expect(variables(seen.get('hook-started'))).toEqual([]);
    });
  });

  describe('of a container that takes itself for a 32-bit machine', () => {
    let seen: Map<string, string>;

    beforeAll(async () => {
      const script = `${say}
        say machine uname -m
        say int80 sh -c '/bin/int80; echo $?'
        say idle cat /sys/fs/cgroup/cpu.idle
        say scheduling cut -d' ' -f40,41 /proc/1/stat
      `;
      const result = await scene.runWithSpec(
        scene.id('machine'),
        ['sh', '-c', script],
        (spec) => {
          spec.mounts.push({ destination: '/sys/fs/cgroup', type: 'cgroup', source: 'cgroup', options: ['ro'] });
          Object.assign(spec.linux, {
            personality: { domain: 'LINUX32' },
            resources: { cpu: { idle: 1 } },
            seccomp: { defaultAction: 'SCMP_ACT_ALLOW', architectures: ['SCMP_ARCH_X86_64', 'SCMP_ARCH_X86'] },
          });
          const flags = ['SCHED_FLAG_RESET_ON_FORK'];
          Object.assign(spec.process, { scheduler: { policy: 'SCHED_RR', priority: 3, flags } });
          return undefined;
        },
        { image: image.name },
      );
      expect(result).toMatchObject({ code: 0, stderr: '' });
      seen = parse(result.stdout);
    });

    it('linux.personality: is that of a 32-bit machine', () => expect(seen.get('machine')).toBe('i686'));

    it('linux.seccomp.architectures: calls of one that is listed are let through', () => {
      expect(seen.get('int80')).toBe('42');
    });

    it('linux.resources.cpu.idle: is cpu.idle', () => expect(seen.get('idle')).toBe('1'));

    it('process.scheduler: may be a real-time policy', () => expect(seen.get('scheduling')).toBe('3 2'));
  });

  it('linux.uidMappings, linux.gidMappings, linux.namespaces: are those of a user namespace; a time namespace goes with it', async () => {
    const script = `${say}
      say uid_map cat /proc/self/uid_map
      say gid_map cat /proc/self/gid_map
      say id id
      say writes sh -c 'echo ok > /tmp/x; stat -c "%u:%g" /tmp/x'
      say time readlink /proc/self/ns/time
      say foreign stat -c %u:%g /bin/sh
    `;
    const result = await scene.runWithSpec(
      scene.id('userns'),
      ['sh', '-c', script],
      (spec) => {
        spec.linux.namespaces.push({ type: 'user' }, { type: 'time' });
        Object.assign(spec.linux, {
          uidMappings: [{ containerID: 0, hostID: 10_000, size: 5_000 }],
          gidMappings: [{ containerID: 0, hostID: 20_000, size: 5_000 }],
          timeOffsets: { boottime: { secs: 0 } },
        });
        return undefined;
      },
      { image: image.name },
    );
    expect(result).toMatchObject({ code: 0, stderr: '' });
    const seen = parse(result.stdout);
    expect(seen.get('uid_map')?.trim().split(/ +/)).toEqual(['0', '10000', '5000']);
    expect(seen.get('gid_map')?.trim().split(/ +/)).toEqual(['0', '20000', '5000']);
    expect(seen.get('id')).toContain('uid=0');
    expect(seen.get('writes')).toBe('0:0');
    expect(seen.get('time')).toMatch(/^time:\[\d+\]$/);
    // The first one's number is fixed: PROC_TIME_INIT_INO, linux/proc_ns.h.
    expect(seen.get('time')).not.toBe(`time:[${0xeffffffa}]`);
    // Owned by the guest's root, who has no number in here.
    expect(seen.get('foreign')).toBe('65534:65534');
  });
});
