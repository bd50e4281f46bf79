import { mkdir, mkdtemp, readFile, rm, stat } from 'node:fs/promises';
import type { Socket } from 'node:net';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { kilndPids } from '../support/leftovers.ts';
import { containerdVersions, distBin, underKiln } from '../support/paths.ts';
import type { Scene } from '../support/scene.ts';
import { bytes, Lines, run } from '../support/spawn.ts';
import { startKilnd } from '../support/start-kilnd.ts';
import { openStdout } from '../support/stdout-fifo.ts';
import { useScene } from '../support/use-scene.ts';
import { signal, waitForEnd } from '../support/wait-for-end.ts';

const waiting = ['sh', '-c', 'trap "exit 143" TERM; echo up; while :; do sleep 1000 & wait $!; done'];

/** @throws Error when ctr has removed the FIFO */
function reading(scene: Scene, id: string): Socket {
  const reader = openStdout(scene, id);
  if (reader === undefined) throw new Error(`the stdout of ${id} is not there`);
  return reader;
}

/** Reads until so many lines have come, and leaves: all that was taken out of the FIFO. */
async function readLines(scene: Scene, id: string, count: number): Promise<string> {
  let read = '';
  for await (const chunk of reading(scene, id) as AsyncIterable<Buffer>) {
    read += chunk;
    if (read.split('\n').length > count) break;
  }
  return read;
}

/**
 * Waits until the container's shell has made the file /ready, after its traps. Before they are set a signal is lost: an
 * init without a handler does not get it.
 */
async function untilReady(scene: Scene, id: string): Promise<void> {
  const ready = ['sh', '-c', 'until [ -e /ready ]; do usleep 1000; done'];
  await scene.ctr(['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', 'ready', id, ...ready]);
}

describe.each(containerdVersions)('a restart of containerd %s', (version) => {
  const scene = useScene({ version });

  it.each(['SIGTERM', 'SIGKILL'] as const)(
    'by %s leaves a running task running, and its exit is delivered',
    async (how) => {
      const id = scene.id();
      await scene.start(id, ['sh', '-c', 'trap "exit 44" TERM; : >/ready; sleep 1000 & wait']);
      await untilReady(scene, id);
      const [before] = await scene.tasks();

      if (how === 'SIGKILL') await scene.containerd.kill();
      else await scene.containerd.stop();
      expect(signal(before?.pid ?? 0, 0)).toBe(true);
      await scene.containerd.restart();

      expect(await scene.tasks()).toEqual([{ id, pid: before?.pid, status: 'RUNNING' }]);
      await using events = await scene.events();
      const attached = scene.containerd.ctr(['task', 'attach', id]);
      await scene.ctr(['task', 'kill', '--signal', 'SIGTERM', id]);
      const exit = await events.waitFor('/tasks/exit', id);
      expect(exit.event).toMatchObject({ exit_status: 44, pid: before?.pid });
      // attach waits for the task, and takes its exit code.
      expect((await attached).code).toBe(44);
      await scene.purge();
    },
  );

  it('does not lose the exit of a task that ended meanwhile', async () => {
    const id = scene.id();
    await scene.start(id, ['sh', '-c', 'sleep 2; exit 5']);
    const [task] = await scene.tasks();
    await scene.containerd.stop();
    await waitForEnd(task?.pid ?? 0, 60_000);
    await scene.containerd.restart();
    // containerd 1.7 and 2 take a task without processes for a leak and delete it at their start: with runc it is gone.
    const status = async () => (await scene.tasks()).find((each) => each.id === id)?.status ?? 'gone';
    // The process that was waited for ends a moment before the task does.
    await expect.poll(status, { timeout: 30_000 }).toMatch(version === '1.6' ? 'STOPPED' : /^(STOPPED|gone)$/);
    if ((await status()) === 'STOPPED') {
      const removed = await scene.containerd.ctr(['task', 'rm', id]);
      expect(removed.stderr).toContain('5');
    }
    await scene.ctr(['container', 'rm', id]);
  });

  it('keeps the output of a task that runs on', async () => {
    const id = scene.id();
    const file = join(scene.dir, 'restart.log');
    const script = 'trap "echo after; exit 0" TERM; echo before; sleep 1000 & wait';
    await scene.start(id, ['sh', '-c', script], { flags: ['--log-uri', `file://${file}`] });
    // Its trap is set by then.
    await expect.poll(() => readFile(file, 'utf8'), { timeout: 30_000 }).toBe('before\n');
    await scene.containerd.restart();
    await using events = await scene.events();
    await scene.ctr(['task', 'kill', '--signal', 'SIGTERM', id]);
    await events.waitFor('/tasks/exit', id);
    await scene.remove(id);
    expect(await readFile(file, 'utf8')).toBe('before\nafter\n');
  });

  it('loses no byte of a FIFO whose reader comes late, leaves and comes back', async () => {
    const id = scene.id();
    const script = [
      'trap "go=1" USR1; trap "echo end; exit 0" TERM; : >/ready',
      'while [ -z "$go" ]; do sleep 1000 & wait $!; done',
      'i=0; while :; do echo line $i; i=$((i+1)); sleep 0.02; done',
    ].join('; ');
    // Not ctr's own copying, which ends with ctr.
    await scene.start(id, ['sh', '-c', script]);
    await untilReady(scene, id);
    await scene.ctr(['task', 'kill', '--signal', 'SIGUSR1', id]);

    let read = await readLines(scene, id, 5);
    await scene.containerd.stop();
    read += await readLines(scene, id, 5);
    const reader = reading(scene, id);
    await scene.containerd.restart();
    await scene.ctr(['task', 'kill', '--signal', 'SIGTERM', id]);
    read += (await bytes(reader)).toString();
    await scene.remove(id);

    const lines = read.trimEnd().split('\n');
    expect(lines.pop()).toBe('end');
    expect(lines.length).toBeGreaterThanOrEqual(10);
    expect(lines).toEqual(lines.map((_line, n) => `line ${n}`));
  });
});

interface LogLine {
  msg: string;
  level: string;
  id?: string;
  vmmPid?: number;
  marks?: { name: string; at_ms: number }[];
}

async function logLines(scene: Scene): Promise<LogLine[]> {
  const text = await readFile(scene.kilndLog, 'utf8');
  return text
    .split('\n')
    .filter(Boolean)
    .map((line) => JSON.parse(line) as LogLine);
}

describe.runIf(underKiln)('kilnd', () => {
  const scene = useScene({ version: '2.1' });

  it('is started by the first container, and serves the next ones', async () => {
    await scene.stopKilnd();
    expect(scene.kilndPids()).toEqual([]);
    await scene.run(scene.id(), ['true']);
    const pids = scene.kilndPids();
    expect(pids.length).toBe(1);
    await scene.run(scene.id(), ['true']);
    expect(scene.kilndPids()).toEqual(pids);
  });

  it('is one, also when several containers are the first', async () => {
    await scene.stopKilnd();
    const results = await Promise.all([1, 2, 3].map(() => scene.run(scene.id(), ['true'])));
    expect(results.map(({ code, stderr }) => ({ code, stderr }))).toEqual(results.map(() => ({ code: 0, stderr: '' })));
    expect(scene.kilndPids().length).toBe(1);
  });

  it('can be started by hand, and is then used', async () => {
    await scene.stopKilnd();
    const kilnd = await startKilnd(scene.kilnEnv);
    await scene.run(scene.id(), ['true']);
    expect(scene.kilndPids()).toEqual([kilnd.pid]);
    kilnd.kill('SIGTERM');
    expect(await kilnd.exit).toBe(0);
    await scene.assertNothingLeft({ daemonMayRun: false });
  });

  it('refuses to be two in one state folder', async () => {
    await scene.run(scene.id(), ['true']);
    const pids = scene.kilndPids();
    const second = await run(join(distBin, 'kilnd'), [], { env: { ...process.env, ...scene.kilnEnv } });
    expect(second.code).not.toBe(0);
    expect(second.stderr).toContain(scene.stateDir);
    expect(second.stderr).toContain('KILN_STATE_DIR');
    expect(scene.kilndPids()).toEqual(pids);
    expect((await scene.run(scene.id(), ['true'])).code).toBe(0);
  });

  it('is another one for another state folder', async () => {
    await scene.run(scene.id(), ['true']);
    const env = { ...scene.kilnEnv, KILN_STATE_DIR: join(scene.dir, 'k2'), KILN_CACHE_DIR: join(scene.dir, 'c2') };
    await mkdir(env.KILN_STATE_DIR);
    const other = await startKilnd(env);
    expect(scene.kilndPids()).not.toContain(other.pid);
    expect(scene.kilndPids().length).toBe(1);
    other.kill('SIGTERM');
    expect(await other.exit).toBe(0);
  });

  it('shows where the time of a start went, while the container runs and afterwards', async () => {
    const id = scene.id();
    const env = { ...process.env, ...scene.kilnEnv };
    const timeline = (...args: string[]) => run(join(distBin, 'kiln'), ['timeline', id, ...args], { env });
    const marks = async (): Promise<string[]> => {
      const { stdout } = await timeline('--json');
      return (JSON.parse(stdout.toString()) as { marks: { name: string }[] }).marks.map(({ name }) => name);
    };
    await scene.start(id, ['sleep', '1000']);
    expect((await marks()).at(-1)).toBe('started');
    await scene.remove(id);
    expect((await marks()).slice(-2)).toEqual(['exited', 'deleted']);
    const drawn = (await timeline()).stdout.toString();
    expect(drawn).toMatch(new RegExp(`^default/${id}: \\d+ ms\n`));
    expect(drawn).toMatch(/^vm-restored +[\d.]+ +[\d.]+ +█+$/m);
    expect((await timeline('--html')).stdout.toString()).toContain('<th>vm-restored</th>');
  });

  it('shows its state and stops on command', async () => {
    await scene.run(scene.id(), ['true']);
    const env = { ...process.env, ...scene.kilnEnv };
    const status = await run(join(distBin, 'kiln'), ['status'], { env });
    expect(status).toMatchObject({ code: 0, stderr: '' });
    expect(JSON.parse(status.stdout.toString())).toMatchObject({ pid: scene.kilndPids()[0], containers: [] });
    const [pid = 0] = scene.kilndPids();
    expect(await run(join(distBin, 'kiln'), ['stop'], { env })).toMatchObject({ code: 0 });
    await waitForEnd(pid, 20_000);
    const gone = await run(join(distBin, 'kiln'), ['status'], { env });
    expect(gone.code).not.toBe(0);
    expect(gone.stderr).toContain(scene.stateDir);
  });

  it('ends by itself when it has been idle, and the next container starts it again', async () => {
    await scene.configure('[daemon]\nidle_timeout_s = 1\n');
    try {
      await scene.run(scene.id(), ['true']);
      const [pid] = scene.kilndPids();
      if (pid !== undefined) await waitForEnd(pid, 20_000);
      await scene.assertNothingLeft({ daemonMayRun: false });
      expect((await scene.run(scene.id(), ['echo', 'again'])).stdout.toString()).toBe('again\n');
    } finally {
      await scene.configure('');
    }
  });

  it('does not count a running container as idle', async () => {
    await scene.configure('[daemon]\nidle_timeout_s = 1\n');
    try {
      const id = scene.id();
      const result = await scene.run(id, ['sh', '-c', 'sleep 3; echo still here']);
      expect(result.stdout.toString()).toBe('still here\n');
    } finally {
      await scene.configure('');
    }
  });

  it('told to stop, waits for the running container and takes no new one', async () => {
    const id = scene.id();
    await using program = scene.runStream(id, ['sh', '-c', 'echo up; read -r x; echo "<$x>"; exit 6'], {
      interactive: true,
    });
    program.stderr.resume();
    const lines = new Lines(program.stdout);
    await lines.waitFor((line) => line === 'up', 'up');
    const [pid = 0] = scene.kilndPids();
    signal(pid, 'SIGTERM');
    const refused = await scene.run(scene.id(), ['true']);
    expect(refused.code).toBe(1);
    expect(refused.stderr).toContain('stopping');
    program.stdin.end('bye\n');
    expect(await program.exit).toBe(6);
    expect(lines.all).toEqual(['up', '<bye>']);
    await waitForEnd(pid, 20_000);
    await scene.assertNothingLeft({ daemonMayRun: false });
  });

  it('told twice, ends the container, and its exit is told', async () => {
    const id = scene.id();
    await using events = await scene.events();
    await scene.start(id, waiting);
    const [pid = 0] = scene.kilndPids();
    signal(pid, 'SIGTERM');
    // The first has been seen when a new container is refused.
    expect((await scene.run(scene.id(), ['true'])).stderr).toContain('stopping');
    signal(pid, 'SIGTERM');
    expect((await events.waitFor('/tasks/exit', id)).event.exit_status).toBe(137);
    await waitForEnd(pid, 20_000);
    await scene.purge();
    await scene.assertNothingLeft();
  });

  it('killed together with a VM: the task has ended for containerd, and nothing stays', async () => {
    const id = scene.id();
    await using events = await scene.events();
    await scene.start(id, waiting);
    const [pid = 0] = scene.kilndPids();
    const up = (await logLines(scene)).findLast(({ msg }) => msg === 'sandbox is up');
    signal(pid, 'SIGKILL');
    signal(up?.vmmPid ?? 0, 'SIGKILL');
    await waitForEnd(pid, 5_000);
    const exit = await events.waitFor('/tasks/exit', id);
    expect([137, 255]).toContain(exit.event.exit_status);
    await scene.purge();
    await scene.assertNothingLeft();
    expect((await scene.run(scene.id(), ['echo', 'on we go'])).stdout.toString()).toBe('on we go\n');
  });

  it('writes a log of JSON lines, with the timeline of each container in order', async () => {
    const id = scene.id('timed');
    await scene.run(id, ['true']);
    const lines = await logLines(scene);
    const timeline = lines.find((line) => line.msg === 'timeline' && line.id === id);
    const marks = timeline?.marks ?? [];
    expect(marks.map(({ name }) => name).sort()).toEqual(
      [
        ...['launcher', 'request', 'vm-restored', 'agent-connected', 'rootfs-ready', 'rootfs-attached'],
        ...['created', 'started', 'exited', 'deleted'],
      ].sort(),
    );
    const times = marks.map((mark) => mark.at_ms);
    expect(times).toEqual([...times].sort((a, b) => a - b));
    expect((await stat(scene.kilndLog)).mode & 0o007).toBe(0);
  });

  it("keeps a container's environment out of its log", async () => {
    await scene.configure('[daemon]\nlog_level = "trace"\n');
    await scene.run(scene.id(), ['true'], { flags: ['--rm', '--env', 'PASSWORD=swordfish-in-env'] });
    expect(await readFile(scene.kilndLog, 'utf8')).not.toContain('swordfish-in-env');
    await scene.configure('');
  });
});

describe.runIf(underKiln)('the launcher', () => {
  const shim = join(distBin, 'containerd-shim-kiln-v2');

  it('says its version and what it is, without a kilnd', async () => {
    const version = await run(shim, ['-v']);
    expect(version).toMatchObject({ code: 0, stderr: '' });
    expect(version.stdout.toString()).toMatch(/kiln/i);
    const info = await run(shim, ['-info']);
    expect(info).toMatchObject({ code: 0, stderr: '' });
    expect(info.stdout.toString('latin1')).toContain('io.containerd.kiln.v2');
  });

  it.each([
    ['no action', []],
    ['an unknown action', ['-namespace', 'default', '-id', 'x', 'dance']],
    ['an unknown flag', ['-nonsense', 'start']],
    ['no id', ['-namespace', 'default', 'start']],
    ['an id that is a path', ['-namespace', 'default', '-id', '../../x', 'start']],
  ] as const)('with %s fails, and says why on stdout alone', async (_what, args) => {
    const stateDir = await mkdtemp('/tmp/kt-');
    try {
      const result = await run(shim, args, { env: { ...process.env, KILN_STATE_DIR: stateDir } });
      expect(result.code).not.toBe(0);
      expect(result.stderr).toBe('');
      expect(result.stdout.length).toBeGreaterThan(5);
    } finally {
      // kilnd checks the id, so it may have been started.
      for (const pid of kilndPids(stateDir)) {
        signal(pid, 'SIGTERM');
        await waitForEnd(pid, 20_000);
      }
      await rm(stateDir, { recursive: true });
    }
  });
});
