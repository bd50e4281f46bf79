import { createHash } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { containerdVersions } from '../support/paths.ts';
import type { Scene } from '../support/scene.ts';
import { Lines, type RunOptions, type RunResult } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';

const idle = ['sh', '-c', 'trap "exit 0" TERM; echo up; while :; do sleep 1000 & wait $!; done'];

/** One container, in which the test runs one process after the other. */
class Running {
  readonly id: string;
  readonly #scene: Scene;
  #count = 0;

  constructor(scene: Scene, id: string) {
    this.#scene = scene;
    this.id = id;
  }

  static async start(scene: Scene, command: readonly string[] = idle, flags: readonly string[] = []): Promise<Running> {
    const id = scene.id();
    const result = await scene.run(id, command, { flags: ['-d', ...flags] });
    expect(result).toMatchObject({ code: 0, stderr: '' });
    return new Running(scene, id);
  }

  arguments(command: readonly string[], flags: readonly string[] = []): string[] {
    this.#count += 1;
    const exec = ['task', 'exec', '--fifo-dir', this.#scene.fifoDir];
    const id = flags.includes('--exec-id') ? [] : ['--exec-id', `e${this.#count}`];
    return [...exec, ...id, ...flags, this.id, ...command];
  }

  exec(command: readonly string[], flags: readonly string[] = [], options: RunOptions = {}): Promise<RunResult> {
    return this.#scene.containerd.ctr(this.arguments(command, flags), options);
  }
}

describe.each(containerdVersions)('exec under containerd %s', (version) => {
  const scene = useScene({ version });

  it('runs processes beside the init: codes, streams, user, folder, many at once, failures, and the right events', async () => {
    await using events = await scene.events();
    const container = await Running.start(scene, idle, ['--env', 'FROM=spec']);
    const { id } = container;

    expect(await container.exec(['echo', 'hello'])).toEqual({ code: 0, stdout: Buffer.from('hello\n'), stderr: '' });
    expect((await container.exec(['sh', '-c', 'exit 42'])).code).toBe(42);
    expect(await container.exec(['sh', '-c', 'echo out; echo err >&2; exit 3'])).toMatchObject({
      code: 3,
      stdout: Buffer.from('out\n'),
      stderr: 'err\n',
    });
    expect((await container.exec(['sh', '-c', 'kill -9 $$'])).code).toBe(137);

    const input = Buffer.alloc(1 << 20, 'kiln');
    const copied = await container.exec(['cat'], [], { stdin: input });
    expect(createHash('sha256').update(copied.stdout).digest('hex')).toBe(
      createHash('sha256').update(input).digest('hex'),
    );

    const place = await container.exec(
      ['sh', '-c', 'pwd; id -u; id -g; echo $FROM'],
      ['--cwd', '/tmp', '--user', '1000:2000'],
    );
    expect(place.stdout.toString()).toBe('/tmp\n1000\n2000\nspec\n');

    const missing = await container.exec(['/no/such/program']);
    expect(missing.code).not.toBe(0);
    expect(missing.stderr).toContain('exec: "/no/such/program": stat /no/such/program: no such file or directory');

    // A process that stays behind holds stdout open; the exit does not wait for it.
    const left = await container.exec(['sh', '-c', 'sleep 1000 & echo started'], ['--detach']);
    expect(left.code).toBe(0);

    const numbers = Array.from({ length: 8 }, (_, index) => index);
    const many = await Promise.all(numbers.map((n) => container.exec(['sh', '-c', `echo ${n}; exit ${n}`])));
    expect(many.map(({ code, stdout }) => `${code} ${stdout}`)).toEqual(numbers.map((n) => `${n} ${n}\n`));

    // The same id again, now that the first is deleted; while it runs it is refused.
    expect((await container.exec(['true'], ['--exec-id', 'same'])).code).toBe(0);
    await using holder = scene.containerd.ctrStream(
      container.arguments(['sh', '-c', 'echo in; cat'], ['--exec-id', 'same']),
      { interactive: true },
    );
    await new Lines(holder.stdout).waitFor((line) => line === 'in', 'in');
    const twice = await container.exec(['true'], ['--exec-id', 'same']);
    expect(twice.code).not.toBe(0);
    expect(twice.stderr).toMatch(/already/);

    const rows = (await scene.ctr(['task', 'ps', id])).trim().split('\n').slice(1);
    expect(rows.some((row) => row.includes('same'))).toBe(true);
    holder.stdin.end();
    expect(await holder.exit).toBe(0);

    const topics = events
      .of(id)
      .filter(({ topic, event }) => topic.startsWith('/tasks/') && (event.exec_id === 'e2' || event.id === 'e2'))
      .map(({ topic, event }) => `${topic} ${event.exit_status ?? ''}`.trim());
    expect(topics).toEqual(['/tasks/exec-added', '/tasks/exec-started', '/tasks/exit 42']);
    expect(await scene.tasks()).toMatchObject([{ id, status: 'RUNNING' }]);

    // A signal goes to the exec alone.
    await using trapping = scene.containerd.ctrStream(
      container.arguments(
        ['sh', '-c', 'trap "exit 9" USR1; echo in; while :; do sleep 1000 & wait $!; done'],
        ['--exec-id', 'usr'],
      ),
    );
    await new Lines(trapping.stdout).waitFor((line) => line === 'in', 'in');
    await scene.ctr(['task', 'kill', '--exec-id', 'usr', '--signal', 'SIGUSR1', id]);
    expect(await trapping.exit).toBe(9);
    expect(await scene.tasks()).toMatchObject([{ id, status: 'RUNNING' }]);

    // The init's end takes the others along, and its exit is the last.
    await using last = scene.containerd.ctrStream(
      container.arguments(['sh', '-c', 'echo in; sleep 1000'], ['--exec-id', 'last']),
    );
    await new Lines(last.stdout).waitFor((line) => line === 'in', 'in');
    await scene.ctr(['task', 'kill', '--signal', 'SIGKILL', id]);
    expect(await last.exit).toBe(137);
    await events.waitFor('/tasks/exit', id);
    const exits = events.of(id).filter(({ topic }) => topic === '/tasks/exit');
    await events.lines.waitFor(
      (line) => line.includes('/tasks/exit') && line.includes(`"id":"${id}"`),
      'exit of the init',
    );
    const order = events
      .of(id)
      .filter(({ topic }) => topic === '/tasks/exit')
      .map(({ event }) => event.id);
    expect(order.indexOf('last')).toBeGreaterThanOrEqual(0);
    expect(order.indexOf(id)).toBe(order.length - 1);
    expect(exits.length).toBeGreaterThan(0);

    const late = await container.exec(['true']);
    expect(late.code).not.toBe(0);
    expect(late.stderr).toMatch(/stopped/);
    await scene.remove(id);
  });
});
