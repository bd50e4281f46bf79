import { readFileSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { busyboxImage, imageArchive } from '../support/images.ts';
import { containerdVersions, runtime, underKiln } from '../support/paths.ts';
import { Lines } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';
import { signal } from '../support/wait-for-end.ts';

/** Says that it runs, then does nothing until a signal ends it. */
const waiting = ['sh', '-c', 'trap "exit 143" TERM; echo up; while :; do sleep 1000 & wait $!; done'];

describe.each(containerdVersions)('a container under containerd %s', (version) => {
  const scene = useScene({ version });

  it('runs attached, prints, and is gone with --rm', async () => {
    const id = scene.id();
    const result = await scene.run(id, ['echo', 'hello']);
    expect(result).toEqual({ code: 0, stdout: Buffer.from('hello\n'), stderr: '' });
    expect(await scene.ctr(['container', 'ls', '-q'])).toBe('');
    expect(await scene.ctr(['snapshot', 'ls'])).not.toContain(id);
  });

  it('has an input and two outputs, and hands its exit code to ctr', async () => {
    const script = 'echo ready; cat; echo err >&2; exit 42';
    await using program = scene.runStream(scene.id(), ['sh', '-c', script], { interactive: true });
    const lines = new Lines(program.stdout);
    const errors = new Lines(program.stderr);
    await lines.waitFor((line) => line === 'ready', 'ready');
    program.stdin.end('in\n');
    expect(await program.exit).toBe(42);
    expect([lines.all, errors.all]).toEqual([['ready', 'in'], ['err']]);
  });

  it('without --rm stays as a container after its end, can be started again, and is removed by ctr', async () => {
    const id = scene.id();
    expect((await scene.run(id, ['echo', 'first'], { flags: [] })).stdout.toString()).toBe('first\n');
    expect(await scene.tasks()).toEqual([]);
    expect(await scene.ctr(['container', 'ls', '-q'])).toBe(`${id}\n`);
    const again = await scene.containerd.ctr(['task', 'start', '--fifo-dir', scene.fifoDir, id]);
    expect(again).toMatchObject({ code: 0, stdout: Buffer.from('first\n') });
    await scene.ctr(['container', 'rm', id]);
    expect(await scene.ctr(['container', 'ls', '-q'])).toBe('');
    expect(await scene.ctr(['snapshot', 'ls'])).not.toContain(id);
  });

  it('runs detached: task ls, ps, a live pid of the host, kill, the exit code in task rm', async () => {
    const id = scene.id();
    await using events = await scene.events();
    expect(await scene.run(id, waiting, { flags: ['-d'] })).toMatchObject({ code: 0, stderr: '' });

    const [task] = await scene.tasks();
    expect(task).toMatchObject({ id, status: 'RUNNING' });
    const pid = task?.pid ?? 0;
    expect(signal(pid, 0)).toBe(true);

    const processes = (await scene.ctr(['task', 'ps', id])).trim().split('\n').slice(1);
    expect(processes.map((row) => Number(row.trim().split(/\s+/)[0]))).toContain(pid);

    await scene.ctr(['task', 'kill', '--signal', 'SIGKILL', id]);
    await events.waitFor('/tasks/exit', id);
    expect(await scene.tasks()).toMatchObject([{ id, status: 'STOPPED' }]);
    const removed = await scene.containerd.ctr(['task', 'rm', id]);
    expect(removed.stderr).toContain('137');
    expect(signal(pid, 0)).toBe(false);
    expect(await scene.tasks()).toEqual([]);
    await scene.ctr(['container', 'rm', id]);
  });

  it('is created first and started later', async () => {
    const id = scene.id();
    await scene.ctr(['container', 'create', '--runtime', runtime, busyboxImage.name, id, 'false']);
    expect(await scene.tasks()).toEqual([]);
    expect((await scene.containerd.ctr(['task', 'start', '--fifo-dir', scene.fifoDir, id])).code).toBe(1);
    await scene.ctr(['container', 'rm', id]);
  });

  it('refuses to remove a running task, and does with --force', async () => {
    const id = scene.id();
    await scene.start(id, waiting);
    const refused = await scene.containerd.ctr(['task', 'rm', id]);
    expect(refused.code).not.toBe(0);
    expect(refused.stderr).toMatch(/must be stopped|running/);
    expect(await scene.tasks()).toMatchObject([{ id, status: 'RUNNING' }]);
    await scene.ctr(['task', 'rm', '--force', id]);
    expect(await scene.tasks()).toEqual([]);
    await scene.ctr(['container', 'rm', id]);
  });

  it('with a missing program fails in Create, names it, and never exits', async () => {
    const id = scene.id();
    await using events = await scene.events();
    const result = await scene.run(id, ['/no/such/program']);
    expect(result.code).toBe(1);
    expect(result.stderr).toMatch(/failed to create shim task|create task/);
    expect(result.stderr).toContain('/no/such/program');
    expect(result.stderr).toMatch(/no such file or directory|not found/i);
    expect(result.stdout.length).toBe(0);
    // A marker: when its events are there, those of the failed task would be too.
    const marker = scene.id('marker');
    await scene.run(marker, ['true']);
    await events.waitFor('/tasks/exit', marker);
    expect(
      events
        .of(id)
        .map(({ topic }) => topic)
        .filter((topic) => /start|exit/.test(topic)),
    ).toEqual([]);
  });
});

describe('a container', () => {
  const scene = useScene({ version: '2.1' });

  it.each([
    ['SIGKILL', 137, ['sleep', '1000']],
    ['SIGTERM', 143, ['sh', '-c', 'trap "exit 143" TERM; echo up; sleep 1000 & wait']],
  ] as const)('ended by %s exits with %i', async (name, code, command) => {
    const id = scene.id();
    await using events = await scene.events();
    await using program = scene.runStream(id, command);
    await events.waitFor('/tasks/start', id);
    if (command[0] === 'sh') await new Lines(program.stdout).waitFor((line) => line === 'up', 'up');
    program.stdout.resume();
    program.stderr.resume();
    await scene.ctr(['task', 'kill', '--signal', name, id]);
    expect(await program.exit).toBe(code);
    const exit = await events.waitFor('/tasks/exit', id);
    expect(exit.event.exit_status).toBe(code);
  });

  it('with a name that containerd already knows fails and leaves the first alone', async () => {
    const id = scene.id();
    await scene.start(id, waiting);
    const second = await scene.run(id, ['true'], { flags: [] });
    expect(second.code).toBe(1);
    expect(second.stderr).toContain('already exists');
    expect(await scene.tasks()).toMatchObject([{ id, status: 'RUNNING' }]);
    await scene.remove(id);
  });

  it('in two namespaces at once may carry the same name', async () => {
    const id = scene.id();
    await scene.ctr(['namespaces', 'create', 'other']);
    await scene.ctr(['image', 'import', '-'], { namespace: 'other', stdin: await imageArchive(busyboxImage) });
    await scene.start(id, waiting);
    await scene.start(id, waiting, { namespace: 'other' });
    const [one] = await scene.tasks();
    const [two] = await scene.tasks('other');
    expect(one?.pid).not.toBe(two?.pid);
    await scene.containerd.ctr(['task', 'rm', '--force', id], { namespace: 'other' });
    expect(await scene.tasks()).toMatchObject([{ id, status: 'RUNNING' }]);
    await scene.ctr(['container', 'rm', id], { namespace: 'other' });
    await scene.remove(id);
  });

  it.runIf(underKiln)('is served under version 3 of the task service where containerd wants that', async () => {
    const shim = '#!/bin/sh\nMAX_SHIM_VERSION=3 exec containerd-shim-kiln-v2 "$@"\n';
    await writeFile(join(scene.dir, 'shims', 'containerd-shim-kilnthree-v2'), shim, { mode: 0o755 });
    const id = scene.id();
    await scene.start(id, waiting, { runtime: 'io.containerd.kilnthree.v2' });
    const record = readFileSync(join(scene.containerd.bundles, 'default', id, 'bootstrap.json'), 'utf8');
    expect(JSON.parse(record)).toMatchObject({ version: 3, protocol: 'ttrpc' });
    expect(await scene.tasks()).toMatchObject([{ id, status: 'RUNNING' }]);
    await scene.remove(id);
  });

  it.runIf(underKiln)('shows containerd a process that has nothing of the host in its root', async () => {
    const id = scene.id();
    await scene.start(id, waiting);
    const [task] = await scene.tasks();
    const root = `/proc/${task?.pid}/root`;
    expect(() => readFileSync(`${root}/etc/passwd`)).toThrow('ENOENT');
    expect(readFileSync(`/proc/${task?.pid}/cmdline`, 'utf8')).toContain(id);
    await scene.remove(id);
  });
});
