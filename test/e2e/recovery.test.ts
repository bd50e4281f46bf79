import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { containerdVersions } from '../support/paths.ts';
import type { Scene } from '../support/scene.ts';
import { Lines } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';
import { signal, waitForEnd } from '../support/wait-for-end.ts';

/** Kills kilnd; returns when it is gone. Somebody's relay starts the next one. */
async function killKilnd(scene: Scene): Promise<void> {
  const pids = scene.kilndPids();
  expect(pids.length).toBeGreaterThan(0);
  for (const pid of pids) signal(pid, 'SIGKILL');
  for (const pid of pids) await waitForEnd(pid, 20_000);
}

/** Counts for ever, a line every little while; a TERM ends it with 7. */
const counting = ['sh', '-c', 'trap "echo bye; exit 7" TERM; i=0; while :; do i=$((i+1)); echo $i; usleep 20000; done'];

describe.each(containerdVersions)('a kilnd that is killed under containerd %s', (version) => {
  const scene = useScene({ version });

  it('takes no container along: output, input, execs, exits and events go on', async () => {
    const id = scene.id();
    await using events = await scene.events();
    await using attached = scene.runStream(id, counting);
    const lines = new Lines(attached.stdout);
    await lines.waitFor((line) => line === '5', 'the first lines');
    const [before] = await scene.tasks();

    // An exec that talks with its client.
    await using talk = scene.containerd.ctrStream(
      [
        'task',
        'exec',
        '--fifo-dir',
        scene.fifoDir,
        '--exec-id',
        'talk',
        id,
        'sh',
        '-c',
        'while read -r x; do echo "got $x"; done; exit 3',
      ],
      { interactive: true },
    );
    const answers = new Lines(talk.stdout);
    talk.stdin.write('one\n');
    await answers.waitFor((line) => line === 'got one', 'an answer');

    const seen = lines.all.length;
    await killKilnd(scene);
    expect(await scene.tasks()).toEqual([{ id, pid: before?.pid, status: 'RUNNING' }]);
    await lines.waitFor(() => lines.all.length > seen + 20, 'more lines');
    talk.stdin.write('two\n');
    await answers.waitFor((line) => line === 'got two', 'an answer');

    // Once more, and what happens while no kilnd is there is not lost.
    const exec = await scene.containerd.ctr([
      ...['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', 'new', id, 'sh', '-c', 'echo fresh; exit 4'],
    ]);
    expect(exec).toMatchObject({ code: 4, stdout: Buffer.from('fresh\n') });
    await killKilnd(scene);
    talk.stdin.end();
    expect(await talk.exit).toBe(3);
    await scene.ctr(['task', 'kill', '--signal', 'SIGTERM', id]);
    expect(await attached.exit).toBe(7);
    expect(lines.all.slice(-2)[0] ?? '').toMatch(/bye|\d+/);

    // Nothing is lost; what was delivered when kilnd was killed may have come twice.
    const numbers = lines.all.filter((line) => /^\d+$/.test(line)).map(Number);
    const last = numbers.at(-1) ?? 0;
    expect(new Set(numbers).size).toBe(last);
    expect(lines.all).toContain('bye');
    await events.waitFor('/tasks/delete', id);
    const topics = events.of(id).filter(({ topic, event }) => topic.startsWith('/tasks/') && (event.id ?? id) === id);
    expect(topics.map(({ topic }) => topic).filter((topic) => !topic.includes('exec'))).toEqual([
      '/tasks/create',
      '/tasks/start',
      '/tasks/exit',
      '/tasks/delete',
    ]);
    expect(readFileSync(scene.kilndLog, 'utf8')).toContain('sandbox is taken over');
  });

  it.runIf(version === '2.1')('may be killed again and again under load', async () => {
    const id = scene.id();
    const flood = ['sh', '-c', 'trap "echo; echo bye; exit 7" TERM; i=0; while :; do i=$((i+1)); echo $i; done'];
    await using attached = scene.runStream(id, flood);
    let tail = '';
    attached.stdout.on('data', (chunk: Buffer) => {
      tail = (tail + chunk).slice(-4096);
    });
    attached.stderr.resume();
    await once(attached.stdout, 'data');
    for (let round = 0; round < 6; round += 1) {
      const exec = await scene.containerd.ctr([
        ...['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', `e${round}`, id, 'echo', `round ${round}`],
      ]);
      expect(exec).toMatchObject({ code: 0, stdout: Buffer.from(`round ${round}\n`) });
      await killKilnd(scene);
    }
    await scene.ctr(['task', 'kill', '--signal', 'SIGTERM', id]);
    expect(await attached.exit).toBe(7);
    expect(tail).toMatch(/\nbye\n$/);
  });
});
