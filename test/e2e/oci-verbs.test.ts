/** The verbs of `kiln` beyond a container's life, which test/e2e/oci.test.ts has: spec, images, limits, statistics, execs. */
import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { busyboxLayer, imageArchive, layerTar } from '../support/images.ts';
import { useOciStage } from '../support/oci-stage.ts';
import { Lines } from '../support/spawn.ts';
import { Terminal } from '../support/terminal.ts';

const mib = 1024 * 1024;

describe('kiln', () => {
  const stage = useOciStage();
  const bundles = () => {
    const folder = join(stage.dir, 'c', 'oci-bundles');
    return existsSync(folder) ? readdirSync(folder) : [];
  };

  it('runs what `kiln spec` writes as it is: a shell on a terminal, in a read-only root', async () => {
    const directory = join(stage.dir, 'spec');
    mkdirSync(join(directory, 'rootfs'), { recursive: true });
    execFileSync('tar', ['-x', '-C', join(directory, 'rootfs')], { input: await layerTar(busyboxLayer()) });
    await stage.must(['spec', '--bundle', directory]);
    const env = stage.env;
    const command = [stage.kiln, 'run', '--bundle', directory, stage.id()];
    await using terminal = new Terminal(command, { env, directory: stage.dir });
    await terminal.waitFor(/#$/m);
    await terminal.type('hostname; touch /x; grep -c . /proc/mounts\r');
    await terminal.waitFor(/^kiln\n.*Read-only file system/m);
    await terminal.type('exit 0\r');
    await terminal.ended;
  });

  it('changes limits, tells what is used and when memory runs out, and runs execs as they are asked for', async () => {
    const mounts = [{ destination: '/sys/fs/cgroup', type: 'cgroup', source: 'cgroup', options: ['ro'] }];
    const bundle = await stage.bundle({ args: ['sh', '-c', 'echo up; sleep 1000'], mounts });
    const id = stage.id();
    await using container = stage.stream(['run', '--bundle', bundle.directory, id]);
    const lines = new Lines(container.stdout);
    container.stderr.resume();
    await lines.waitFor((line) => line === 'up', 'the program');
    const cgroup = async (...files: string[]) => {
      const paths = files.map((file) => `/sys/fs/cgroup/${file}`);
      return (await stage.must(['exec', id, 'cat', ...paths])).split('\n');
    };

    await stage.must(['update', '--memory', '64m', '--pids-limit', '50', id]);
    expect(await cgroup('memory.max', 'pids.max')).toEqual([String(64 * mib), '50', '']);
    await stage.must(['update', '--resources', '-', id], {
      stdin: '{"cpu":{"quota":20000,"period":100000},"memory":{}}',
    });
    expect(await cgroup('cpu.max', 'memory.max')).toEqual(['20000 100000', String(64 * mib), '']);
    for (const [flag, value, reason] of [
      [
        '--memory',
        '64g',
        /a memory limit of 65536 MiB is more than the \d+ MiB that the container's virtual machine has/,
      ],
      ['--cpuset-cpus', '7', /CPU 7 of ."7." does not exist/],
      ['--cpu-rt-period', '5', /cgroup v2, which the guest uses, has no such limit/],
      ['--memory', 'lots', /invalid value for memory: lots/],
    ] as const) {
      const refused = await stage.run(['update', flag, value, id]);
      expect(refused).toMatchObject({ code: 1, stderr: expect.stringMatching(reason) });
    }
    expect(await cgroup('cpu.max', 'memory.max')).toEqual(['20000 100000', String(64 * mib), '']);
    await stage.must(['update', '--cpu-quota', '-1', id]);

    const { type, id: told, data } = JSON.parse(await stage.must(['events', '--stats', id]));
    expect([type, told]).toEqual(['stats', id]);
    expect(data.memory.usage.limit).toBe(64 * mib);
    expect(data.memory.usage.usage).toBeGreaterThan(0);
    expect(data.cpu.usage.total).toBeGreaterThan(0);
    expect(data.pids).toEqual({ current: expect.any(Number), limit: 50 });

    await using events = stage.stream(['events', '--interval', '100ms', id]);
    const seen = new Lines(events.stdout);
    events.stderr.resume();
    const isOf = (kind: string) => (line: string) => JSON.parse(line).type === kind;
    await seen.waitFor(isOf('stats'), 'statistics');
    const greedy = await stage.run(['exec', id, 'sh', '-c', 'x=a; while :; do x=$x$x; done']);
    expect(greedy.code).toBe(137);
    await seen.waitFor(isOf('oom'), 'the OOM');

    const groups = await stage.must(['exec', '-u', '5:6', '-g', '70', '-g', '80', id, 'sh', '-c', 'id -u; id -G']);
    expect(groups).toBe('5\n6 70 80\n');
    const capabilities = await stage.must(['exec', '--cap', 'CAP_NET_RAW', id, 'grep', 'CapEff', '/proc/self/status']);
    expect(BigInt(`0x${capabilities.split('\t')[1]?.trim()}`) & (1n << 13n)).toBe(1n << 13n);
    const label = await stage.run(['exec', '--process-label', 'x', id, 'true']);
    expect(label.code).toBe(0);
    for (const [args, reason] of [
      [['--cgroup', 'sub', id, 'true'], '--cgroup: a process of a container runs in the control group'],
      [['--preserve-fds', '1', id, 'true'], '--preserve-fds 1: descriptors of the host cannot be had in a guest'],
      [[id], 'exec failed: exec args cannot be empty'],
    ] as const) {
      const refused = await stage.run(['exec', ...args]);
      expect(refused).toMatchObject({ code: 255, stderr: expect.stringContaining(reason) });
    }

    const execPid = join(stage.dir, 'exec.pid');
    // It keeps the standard streams that it is given.
    const detached = [stage.kiln, 'exec', '--detach', '--user', '5', '--pid-file', execPid, id, 'sleep', '2000'];
    execFileSync(detached[0] ?? '', detached.slice(1), { env: stage.env, stdio: 'ignore' });
    const shown = await stage.must(['ps', id]);
    expect(shown).toMatch(/^UID +PID +PPID +C +STIME +TTY +TIME +CMD\n0 .* sleep 1000\n/);
    expect(shown).toMatch(/^5 .* sleep 2000$/m);
    const { pid } = await stage.state(id);
    const pids = JSON.parse(await stage.must(['ps', '--format', 'json', id]));
    expect(pids).toEqual([pid, Number(readFileSync(execPid, 'utf8'))]);
    expect(await stage.run(['ps', id, 'aux'])).toMatchObject({ code: 1, stderr: expect.stringContaining('ps aux: ') });

    await stage.must(['kill', id, 'KILL']);
    expect(await container.exit).toBe(137);
    expect(await events.exit).toBe(0);
  });

  it('runs an image’s archive, and leaves nothing of it', async () => {
    const layers = [busyboxLayer(), [{ kind: 'file', path: 'srv/hello', content: 'hello', uid: 1234 } as const]];
    const config = { Cmd: ['cat', 'hello'], WorkingDir: '/srv', User: 'kate', Env: ['A=from the image'] };
    const archive = join(stage.dir, 'image.tar');
    writeFileSync(archive, await imageArchive({ name: 'kiln/hello:1', layers, config }));
    const one = await stage.run(['run', '--image', archive, stage.id()], { stdin: '' });
    expect(one).toEqual({ code: 0, stdout: Buffer.from('hello'), stderr: '' });
    expect(bundles()).toEqual([]);

    const id = stage.id();
    const command = ['sh', '-c', 'id -u; id -G; echo $A; echo changed > hello; cat hello; exit 5'];
    const other = await stage.run(
      ['run', '--keep', '--image', archive, '--image-name', 'kiln/hello:1', id, '--', ...command],
      {
        stdin: '',
      },
    );
    expect(other).toEqual({ code: 5, stdout: Buffer.from('1234\n5678 777\nfrom the image\nchanged\n'), stderr: '' });
    const [bundle = ''] = bundles();
    expect(readFileSync(join(stage.dir, 'c', 'oci-bundles', bundle, 'rootfs/srv/hello'), 'utf8')).toBe('changed\n');
    const again = await stage.run(['run', '--image', archive, id]);
    expect(again).toMatchObject({ code: 1, stderr: expect.stringContaining('container with given ID already exists') });
    expect(bundles()).toEqual([bundle]);
    await stage.must(['delete', id]);
    expect(bundles()).toEqual([]);

    const bad = join(stage.dir, 'bad.tar');
    writeFileSync(
      bad,
      await imageArchive({ name: 'kiln/bad:1', layers: [[{ kind: 'file', path: '../x', content: '' }]] }),
    );
    const refused = await stage.run(['run', '--image', bad, id]);
    expect(refused).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('kiln run failed: cannot unpack a layer of the image: the tar stream names'),
    });
    const none = await stage.run(['run', '--image', join(stage.dir, 'none.tar'), id]);
    expect(none).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('none.tar: cannot be read as a tar archive'),
    });
    expect([bundles(), existsSync(join(stage.root, id))]).toEqual([[], false]);
  });
});
