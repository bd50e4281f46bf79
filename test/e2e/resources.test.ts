import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { readdir } from 'node:fs/promises';
import { connect } from 'node:net';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import * as v1 from '../../gen/containerd/metrics_v1.ts';
import * as v2 from '../../gen/containerd/metrics_v2.ts';
import { hierarchiesIn, hostMounts, wordsOf } from '../../src/host/cgroups.ts';
import { containerdVersions, underKiln } from '../support/paths.ts';
import type { Scene } from '../support/scene.ts';
import { Lines, type RunningProgram, run } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';
import { errorOf, TaskClient } from '../unit/shim/task-client.ts';

const mib = 2 ** 20;

/** Keeps the CPU busy, and shows each file whose name it reads, then a line `end of` with the name. */
const busyShell = 'while :; do :; done & echo up; while read -r file; do cat "$file"; echo "end of $file"; done';
const cgroup = '/sys/fs/cgroup';
const cgroupMount = `type=cgroup,src=cgroup,dst=${cgroup},options=ro:nosuid:nodev:noexec`;

/** A shell in the container that the test talks to. */
class Shell {
  readonly lines: Lines;
  readonly #program: RunningProgram;

  constructor(program: RunningProgram) {
    this.#program = program;
    this.lines = new Lines(program.stdout);
    program.stderr.resume();
  }

  async show(file: string): Promise<string> {
    const from = this.lines.all.length;
    this.#program.stdin.write(`${file}\n`);
    const isEnd = (line: string) => line === `end of ${file}` && this.lines.all.lastIndexOf(line) >= from;
    await this.lines.waitFor(isEnd, `the end of ${file}`);
    return this.lines.all.slice(from, this.lines.all.lastIndexOf(`end of ${file}`)).join('\n');
  }
}

/** The one task's own socket: `ctr` has no verb for Update, and its start costs more time than Stats may take. */
async function taskClient(scene: Scene, id: string): Promise<TaskClient> {
  const [name = ''] = await readdir(join(scene.stateDir, 's'));
  const socket = connect(join(scene.stateDir, 's', name));
  await once(socket, 'connect');
  return new TaskClient(socket, id);
}

/** The parts of both kinds of metrics that the tests look at. */
async function metricsOf(client: TaskClient) {
  const { stats } = await client.stats();
  if (stats === undefined) throw new Error('no stats');
  if (stats.typeUrl === 'io.containerd.cgroups.v2.Metrics') {
    const { cpu, memory, pids } = v2.Metrics.decode(stats.value);
    return { cpu: cpu!.usageUsec, throttled: cpu!.nrThrottled, memory: memory!.usageLimit, pids: pids!.limit };
  }
  expect(stats.typeUrl).toBe('io.containerd.cgroups.v1.Metrics');
  const { cpu, memory, pids } = v1.Metrics.decode(stats.value);
  const { throttledPeriods } = cpu!.throttling!;
  return { cpu: cpu!.usage!.total, throttled: throttledPeriods, memory: memory!.usage!.limit, pids: pids!.limit };
}

describe.runIf(underKiln).each(containerdVersions)('the resources of a container under containerd %s', (version) => {
  const scene = useScene({ version });

  it('are shown, changed while it runs, and stay as they are while it is paused', async () => {
    await using events = await scene.events();
    const id = scene.id();
    await using program = scene.runStream(id, ['sh', '-c', busyShell], {
      interactive: true,
      flags: ['--memory-limit', String(128 * mib), '--mount', cgroupMount],
    });
    const shell = new Shell(program);
    await shell.lines.waitFor((line) => line === 'up', 'up');
    const client = await taskClient(scene, id);

    // What it takes of the host counts for the group that ctr has named.
    const groups = hierarchiesIn(hostMounts).map(({ directory }) => join(directory, 'default', id));
    expect(groups.length).toBeGreaterThan(0);
    for (const group of groups) {
      const programs = wordsOf(group, 'cgroup.procs').map((pid) => readFileSync(`/proc/${pid}/comm`, 'utf8').trim());
      expect(programs.sort()).toEqual(['kiln-standin', 'qemu-system-x86']);
    }

    // Stats.
    const table = await scene.ctr(['task', 'metrics', id]);
    expect(table).toMatch(/pids\.current +\d/);
    expect(table).toContain(String(128 * mib));
    expect(await scene.ctr(['task', 'metrics', '--format', 'json', id])).toContain(String(128 * mib));
    const first = await metricsOf(client);
    expect(first).toMatchObject({ memory: BigInt(128 * mib), throttled: 0n });
    expect(first.cpu).toBeGreaterThan(0n);
    const times: number[] = [];
    for (let i = 0; i < 21; i += 1) {
      const before = performance.now();
      await client.stats();
      times.push(performance.now() - before);
    }
    const median = times.sort((a, b) => a - b)[10] ?? 0;
    // containerd's own limit (metrics.shimstats). How fast it is tells the benchmark: this machine may have other work.
    expect(median).toBeLessThan(2000);

    // Update.
    await client.update({
      memory: { limit: 96 * mib, reservation: 32 * mib, swap: 100 * mib },
      cpu: { shares: 512, quota: 50_000, period: 100_000, cpus: '0', mems: '0' },
      pids: { limit: 50 },
      blockIO: { weight: 500 },
      unified: { 'memory.high': String(90 * mib) },
    });
    const shown = {
      'memory.max': String(96 * mib),
      'memory.low': String(32 * mib),
      'memory.swap.max': String(4 * mib),
      'memory.high': String(90 * mib),
      'cpu.weight': '20',
      'cpu.max': '50000 100000',
      'cpuset.cpus': '0',
      'cpuset.mems': '0',
      'pids.max': '50',
      'io.weight': 'default 4950',
    };
    for (const [file, content] of Object.entries(shown)) {
      expect(`${file}: ${await shell.show(`${cgroup}/${file}`)}`).toBe(`${file}: ${content}`);
    }
    expect(await metricsOf(client)).toMatchObject({ memory: BigInt(96 * mib), pids: 50n });
    // A period alone keeps the quota, which crun would drop.
    await client.update({ cpu: { period: 200_000 } });
    expect(await shell.show(`${cgroup}/cpu.max`)).toBe('50000 200000');

    // What the virtual machine cannot keep is refused, and nothing is changed then.
    const refused = async (resources: object) => errorOf(client.update({ pids: { limit: 7 }, ...resources }));
    expect(await refused({ memory: { limit: 4096 * mib } })).toMatch(
      /^ResourceExhausted: a memory limit of 4096 MiB is more than the \d+ MiB that the container's virtual machine has/,
    );
    expect(await refused({ cpu: { quota: 900_000, period: 100_000 } })).toMatch(
      /^ResourceExhausted: a CPU quota of 900000 µs in each 100000 µs is 9 CPUs, more than the \d that/,
    );
    expect(await refused({ cpu: { cpus: '0-63' } })).toMatch(/^ResourceExhausted: CPU 0-63 of "0-63" does not exist/);
    expect(await refused({ cpu: { realtimeRuntime: 5 } })).toMatch(/^Unimplemented: resources.cpu.realtimeRuntime/);
    expect(await refused({ unified: { 'pids.max': '8', 'memory.high': 'much' } })).toMatch(
      /^InvalidArgument: cannot set memory.high to "much": the kernel refuses the value/,
    );
    expect(await shell.show(`${cgroup}/pids.max`)).toBe('50');

    // Pause: from inside nothing goes on, and what was written is on the disk.
    expect(await errorOf(client.resume())).toBe(`FailedPrecondition: cannot resume container ${id}: it is running`);
    await scene.ctr(['task', 'pause', id]);
    await events.waitFor('/tasks/paused', id);
    expect(await scene.tasks()).toMatchObject([{ id, status: 'PAUSED' }]);
    const paused = await metricsOf(client);
    expect(await errorOf(client.pause())).toBe(`FailedPrecondition: cannot pause container ${id}: it is paused`);
    expect((await metricsOf(client)).cpu).toBe(paused.cpu);
    await client.kill(15);
    expect(await scene.tasks()).toMatchObject([{ id, status: 'PAUSED' }]);
    const refusedRemoval = await scene.containerd.ctr(['task', 'rm', id]);
    expect(refusedRemoval.code).not.toBe(0);
    await scene.ctr(['task', 'resume', id]);
    await events.waitFor('/tasks/resumed', id);
    expect(await scene.tasks()).toMatchObject([{ id, status: 'RUNNING' }]);
    expect(await shell.show(`${cgroup}/cpuset.cpus`)).toBe('0');
    expect((await metricsOf(client)).cpu).toBeGreaterThan(paused.cpu);

    // SIGKILL ends a paused one.
    await scene.ctr(['task', 'pause', id]);
    await scene.ctr(['task', 'kill', '--signal', 'SIGKILL', id]);
    expect((await events.waitFor('/tasks/exit', id)).event.exit_status).toBe(137);
    expect(await program.exit).toBe(137);
    client.ttrpc.close();
    await scene.ctr(['container', 'rm', id]);
  });
});

describe.runIf(underKiln)('a container', () => {
  const scene = useScene({ version: '2.1' });

  it('that is paused has what it wrote on its disk, and can be removed by force', async () => {
    const id = scene.id();
    await using program = scene.runStream(
      id,
      ['sh', '-c', 'mkdir /a; echo precious > /a/file; echo written; sleep 1000'],
      { flags: [] },
    );
    program.stderr.resume();
    await new Lines(program.stdout).waitFor((line) => line === 'written', 'written');
    await scene.ctr(['task', 'pause', id]);
    const found = await run('find', [scene.dir, '-name', '*.ext4', '-path', '*/work/*']);
    const disk = join(scene.dir, 'copy.ext4');
    await run('cp', ['--sparse=always', found.stdout.toString().trim(), disk]);
    // As after a power failure: its journal is replayed, then it must be without fault.
    const check = await run('e2fsck', ['-fy', disk]);
    expect(check.code, check.stdout.toString()).toBeLessThan(2);
    const file = await run('debugfs', ['-R', 'cat upper/a/file', disk]);
    expect(file.stdout.toString()).toBe('precious\n');
    // The waiting `ctr run` deletes the task, too: either may be first.
    await scene.containerd.ctr(['task', 'rm', '--force', id]);
    await program.exit;
    await scene.ctr(['container', 'rm', id]);
  });

  const hog = 'dd if=/dev/zero of=/dev/null bs=200M';
  const script = `${hog}; echo "ended with $?"; cat /proc/self/oom_score_adj; read -r _; exec ${hog}`;
  it.each([
    ['of its own limit', ['--memory-limit', String(64 * mib)]],
    ['of the virtual machine, without a limit', ['--annotation', 'io.kiln.memory_mib=256']],
  ])('that runs out of memory %s is told of, loses only the process, and dies with its init', async (_, flags) => {
    await using events = await scene.events();
    const id = scene.id();
    await using program = scene.runStream(id, ['sh', '-c', script], { interactive: true, flags });
    const output = new Lines(program.stdout);
    program.stderr.resume();
    await output.waitFor((line) => line === 'ended with 137', 'the end of the first hog');
    await output.waitFor((line) => line === '0', "the container's own OOM score");
    await events.waitFor('/tasks/oom', id);
    expect(await scene.tasks()).toMatchObject([{ id, status: 'RUNNING' }]);
    expect(await scene.ctr(['task', 'metrics', '--format', 'json', id])).toMatch(/"oom_kill": 1\b/);
    program.stdin.write('\n');
    expect(await program.exit).toBe(137);
    await events.waitFor('/tasks/exit', id);
    const topics = events.of(id).map(({ topic }) => topic);
    expect(topics.filter((topic) => /oom|start|exit/.test(topic))).toEqual([
      '/tasks/start',
      '/tasks/oom',
      '/tasks/oom',
      '/tasks/exit',
    ]);
    await scene.ctr(['container', 'rm', id]);
  });
});
