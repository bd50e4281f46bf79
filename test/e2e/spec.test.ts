import { beforeAll, describe, expect, it } from 'vitest';
import { busyboxLayer } from '../support/images.ts';
import { underKiln } from '../support/paths.ts';
import { field, parse, say } from '../support/say.ts';
import { useScene } from '../support/use-scene.ts';

const kateImage = {
  name: 'docker.io/kiln/kate:test',
  get layers() {
    return [busyboxLayer()];
  },
  config: { User: 'kate', WorkingDir: '/home', Env: ['PATH=/bin', 'FROM_IMAGE=yes'] },
};

const capability = { CHOWN: 0n, KILL: 5n, NET_RAW: 13n };
const capabilityMask = (...bits: bigint[]): string =>
  bits
    .reduce((mask, bit) => mask | (1n << bit), 0n)
    .toString(16)
    .padStart(16, '0');

describe('the OCI spec inside the container', () => {
  const scene = useScene({ version: '2.1', images: [kateImage] });

  describe('of a container whose spec says everything', () => {
    let seen: Map<string, string>;

    beforeAll(async () => {
      const script = `${say}
        say pwd pwd
        say env env
        say hostname hostname
        say id sh -c 'id -u; id -g'
        say status cat /proc/self/status
        say limits cat /proc/self/limits
        say oom cat /proc/self/oom_score_adj
        say msgmax cat /proc/sys/kernel/msgmax
        say memory sh -c 'cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes'
        say cpu sh -c 'cat /sys/fs/cgroup/cpu.max 2>/dev/null || cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.cfs_period_us'
        say pids sh -c 'cat /sys/fs/cgroup/pids.max 2>/dev/null || cat /sys/fs/cgroup/pids/pids.max'
        say write-root touch /x
        say write-readonly-path sh -c 'echo 1 > /proc/sys/kernel/msgmax'
        say write-scratch sh -c 'echo ok > /scratch/x; cat /scratch/x'
        say scratch sh -c 'grep " /scratch " /proc/mounts'
        say masked-file cat /etc/group
        say masked-dir ls /home
        say masked-proc sh -c 'wc -c < /proc/timer_list'
        say seccomp-denied mkdir /scratch/dir
        say seccomp-allowed touch /scratch/file
      `;
      const result = await scene.runWithSpec(scene.id('spec'), ['sh', '-c', script], (spec) => {
        const all = ['CAP_CHOWN', 'CAP_KILL'];
        spec.root.readonly = true;
        spec.hostname = 'oven';
        Object.assign(spec.process, {
          cwd: '/var',
          env: ['PATH=/bin', 'PLAIN=value', 'ODD=a=b  c"\'$x', 'EMPTY='],
          user: { uid: 0, gid: 0, umask: 0o027 },
          capabilities: { bounding: all, effective: all, permitted: all, inheritable: [], ambient: [] },
          rlimits: [
            { type: 'RLIMIT_NOFILE', soft: 123, hard: 456 },
            { type: 'RLIMIT_CORE', soft: 0, hard: 0 },
          ],
          noNewPrivileges: true,
          oomScoreAdj: 500,
        });
        spec.mounts.push(
          {
            destination: '/sys/fs/cgroup',
            type: 'cgroup',
            source: 'cgroup',
            options: ['ro', 'nosuid', 'noexec', 'nodev'],
          },
          {
            destination: '/scratch',
            type: 'tmpfs',
            source: 'tmpfs',
            options: ['nosuid', 'noexec', 'mode=1777', 'size=1m'],
          },
        );
        spec.linux.namespaces.push({ type: 'cgroup' });
        spec.linux.maskedPaths = ['/proc/timer_list', '/etc/group', '/home'];
        spec.linux.readonlyPaths = ['/proc/sys'];
        spec.linux.sysctl = { 'kernel.msgmax': '9000' };
        spec.linux.resources = {
          ...spec.linux.resources,
          memory: { limit: 96 * 1024 * 1024 },
          cpu: { quota: 50_000, period: 100_000 },
          pids: { limit: 77 },
        };
        spec.linux.seccomp = {
          defaultAction: 'SCMP_ACT_ALLOW',
          syscalls: [{ names: ['mkdir', 'mkdirat'], action: 'SCMP_ACT_ERRNO', errnoRet: 1 }],
        };
        return undefined;
      });
      expect(result).toMatchObject({ code: 0, stderr: '' });
      seen = parse(result.stdout);
    });

    it('process.cwd: is where it is', () => expect(seen.get('pwd')).toBe('/var'));

    it('process.env: is its environment, odd characters included, and no other', () => {
      const variables = seen
        .get('env')
        ?.split('|')
        .filter((line) => !/^(PWD|SHLVL|HOME|OLDPWD)=/.test(line));
      expect(variables?.sort()).toEqual(['EMPTY=', 'ODD=a=b  c"\'$x', 'PATH=/bin', 'PLAIN=value']);
    });

    it('hostname: is its name', () => expect(seen.get('hostname')).toBe('oven'));

    it('process.capabilities.effective: has exactly those of the spec', () => {
      const mask = capabilityMask(capability.CHOWN, capability.KILL);
      for (const set of ['CapBnd', 'CapEff', 'CapPrm']) expect(field(seen.get('status'), set)).toBe(mask);
      expect(field(seen.get('status'), 'CapAmb')).toBe(capabilityMask());
    });

    it('process.rlimits: has its resource limits', () => {
      expect(field(seen.get('limits'), 'Max open files')).toMatch(/^123 +456 +files/);
      expect(field(seen.get('limits'), 'Max core file size')).toMatch(/^0 +0 +bytes/);
    });

    it('process.user.umask, process.oomScoreAdj, process.noNewPrivileges: are as the spec says', () => {
      expect(field(seen.get('status'), 'Umask')).toBe('0027');
      expect(field(seen.get('status'), 'NoNewPrivs')).toBe('1');
      expect(seen.get('oom')).toBe('500');
    });

    it('linux.sysctl: a parameter of the IPC namespace is set', () => expect(seen.get('msgmax')).toBe('9000'));

    it('linux.resources.memory.limit: is its limit', () => expect(Number(seen.get('memory'))).toBe(96 * 1024 * 1024));

    it('linux.resources.cpu.quota, linux.resources.cpu.period: are its limit', () =>
      expect(seen.get('cpu')?.split(/[ |]/)).toEqual(['50000', '100000']));

    it('linux.resources.pids: is its limit of processes', () => expect(seen.get('pids')).toBe('77'));

    it('root: cannot be written to when it is read-only', () =>
      expect(seen.get('write-root')).toContain('Read-only file system'));

    it('mounts: can write to a tmpfs of the spec, with its options', () => {
      expect(seen.get('write-scratch')).toBe('ok');
      expect(seen.get('scratch')).toMatch(/^tmpfs \/scratch tmpfs (?=.*nosuid)(?=.*noexec)(?=.*size=1024k)/);
    });

    it('linux.readonlyPaths: cannot write below one', () => {
      expect(seen.get('write-readonly-path')).toContain('Read-only file system');
    });

    it('linux.maskedPaths: sees nothing of masked files and folders', () => {
      expect(seen.get('masked-file')).toBe('');
      expect(seen.get('masked-dir')).toBe('');
      expect(seen.get('masked-proc')).toBe('0');
    });

    it('linux.seccomp.syscalls: is under its seccomp profile', () => {
      expect(field(seen.get('status'), 'Seccomp')).toBe('2');
      expect(seen.get('seccomp-denied')).toContain('Operation not permitted');
      expect(seen.get('seccomp-allowed')).toBe('');
    });
  });

  it('process.user.uid, process.user.gid, process.user.additionalGids: runs as user and groups of the spec', async () => {
    const script = `${say} say user id -u; say group id -g; say groups id -G; say status cat /proc/self/status; touch /tmp/x; say owner stat -c %u:%g /tmp/x`;
    const result = await scene.runWithSpec(scene.id('user'), ['sh', '-c', script], (spec) => {
      spec.process.user = { uid: 1234, gid: 5678, additionalGids: [777, 888] };
      return undefined;
    });
    const seen = parse(result.stdout);
    expect(seen.get('user')).toBe('1234');
    expect(seen.get('group')).toBe('5678');
    expect(seen.get('groups')?.split(' ').sort()).toEqual(['5678', '777', '888']);
    expect(field(seen.get('status'), 'CapEff')).toBe(capabilityMask());
    expect(seen.get('owner')).toBe('1234:5678');
  });

  it("runs as the image's user, in the image's folder and environment", async () => {
    const script = `${say} say user id -u; say group id -g; say pwd pwd; say env env`;
    const result = await scene.run(scene.id('kate'), ['sh', '-c', script], { image: kateImage.name });
    const seen = parse(result.stdout);
    expect(seen.get('user')).toBe('1234');
    expect(seen.get('group')).toBe('5678');
    expect(seen.get('pwd')).toBe('/home');
    expect(seen.get('env')).toContain('FROM_IMAGE=yes');
  });

  it("follows ctr's own flags", async () => {
    const flags = [
      ...['--rm', '--env', 'GIVEN=by flag', '--cwd', '/etc', '--read-only', '--hostname', 'flagged'],
      ...['--cap-drop', 'CAP_NET_RAW', '--seccomp', '--user', '1234:5678'],
    ];
    const script = `${say} say env env; say pwd pwd; say hostname hostname; say user id -u; say group id -g; say status cat /proc/self/status; say write touch /tmp/x`;
    const seen = parse((await scene.run(scene.id('flags'), ['sh', '-c', script], { flags })).stdout);
    expect(seen.get('env')).toContain('GIVEN=by flag');
    expect(seen.get('pwd')).toBe('/etc');
    expect(seen.get('hostname')).toBe('flagged');
    expect([seen.get('user'), seen.get('group')]).toEqual(['1234', '5678']);
    expect(BigInt(`0x${field(seen.get('status'), 'CapBnd')}`) & (1n << capability.NET_RAW)).toBe(0n);
    expect(BigInt(`0x${field(seen.get('status'), 'CapBnd')}`) & (1n << capability.CHOWN)).not.toBe(0n);
    expect(field(seen.get('status'), 'Seccomp')).toBe('2');
    expect(seen.get('write')).toContain('Read-only file system');
  });

  it('gives a plain container the default devices and mounts', async () => {
    const script = `${say}
      for d in null zero full random urandom tty; do say $d stat -c '%F %t:%T' /dev/$d; done
      say mounts sh -c 'cut -d" " -f2,3 /proc/mounts'
      say zero-works sh -c 'head -c 3 /dev/zero | wc -c'
      say links sh -c 'for l in fd stdin stdout stderr; do readlink /dev/$l; done'`;
    const seen = parse((await scene.run(scene.id('plain'), ['sh', '-c', script])).stdout);
    expect(seen.get('null')).toBe('character special file 1:3');
    expect(seen.get('zero')).toBe('character special file 1:5');
    expect(seen.get('full')).toBe('character special file 1:7');
    expect(seen.get('random')).toBe('character special file 1:8');
    expect(seen.get('urandom')).toBe('character special file 1:9');
    expect(seen.get('tty')).toBe('character special file 5:0');
    const mounts = seen.get('mounts')?.split('|') ?? [];
    expect(mounts).toEqual(
      expect.arrayContaining([
        ...['/proc proc', '/dev tmpfs', '/dev/pts devpts', '/dev/shm tmpfs', '/dev/mqueue mqueue', '/sys sysfs'],
        '/run tmpfs',
      ]),
    );
    expect(seen.get('zero-works')).toBe('3');
    expect(seen.get('links')).toBe('/proc/self/fd|/proc/self/fd/0|/proc/self/fd/1|/proc/self/fd/2');
  });

  it('linux.namespaces: keeps the processes of a container in a process namespace of their own', async () => {
    const result = await scene.run(scene.id('pids'), ['sh', '-c', 'echo $$; ls /proc | grep -c "^[0-9]*$"']);
    const [pid, count] = result.stdout.toString().trim().split('\n').map(Number);
    expect(pid).toBe(1);
    expect(count).toBeLessThanOrEqual(4);
  });

  it('process.args: runs a program that is named by PATH, and passes its arguments verbatim', async () => {
    const args = ['', ' two  spaces ', 'quote"\'', '$HOME', '*', 'ünïcode', '-n', '--'];
    const result = await scene.run(scene.id('args'), ['sh', '-c', 'for a; do printf "<%s>" "$a"; done', 'sh', ...args]);
    expect(result.stdout.toString()).toBe(args.map((arg) => `<${arg}>`).join(''));
  });

  it.runIf(underKiln)('sizes the virtual machine by io.kiln annotations', async () => {
    const script = 'nproc; grep MemTotal /proc/meminfo';
    const flags = ['--rm', '--annotation', 'io.kiln.memory_mib=300', '--annotation', 'io.kiln.vcpus=2'];
    const result = await scene.run(scene.id('sized'), ['sh', '-c', script], { flags });
    const [cpus, memory = ''] = result.stdout.toString().split('\n');
    expect(cpus).toBe('2');
    const mebibytes = Number(/(\d+) kB/.exec(memory)?.[1]) / 1024;
    expect(mebibytes).toBeGreaterThan(200);
    expect(mebibytes).toBeLessThanOrEqual(300);
  });

  it.runIf(underKiln)('makes a virtual machine that is large enough for the memory limit', async () => {
    const limit = 700 * 1024 * 1024;
    const flags = ['--rm', '--memory-limit', String(limit)];
    const result = await scene.run(scene.id('large'), ['grep', 'MemTotal', '/proc/meminfo'], { flags });
    expect(Number(/(\d+) kB/.exec(result.stdout.toString())?.[1]) * 1024).toBeGreaterThan(limit);
  });

  it.runIf(underKiln).each([
    ['io.kiln.memory_mib=lots', 'io.kiln.memory_mib'],
    ['io.kiln.memory_mib=1', '128'],
    ['io.kiln.nonsense=1', 'io.kiln.nonsense'],
    ['io.kiln.kernel=/etc/passwd', 'io.kiln.kernel'],
  ])('refuses the annotation %s and says why', async (annotation, named) => {
    const result = await scene.run(scene.id('refused'), ['true'], { flags: ['--rm', '--annotation', annotation] });
    expect(result.code).toBe(1);
    expect(result.stderr).toContain(named);
  });
});
