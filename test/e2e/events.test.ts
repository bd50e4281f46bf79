import { describe, expect, it } from 'vitest';
import { busyboxImage, imageArchive } from '../support/images.ts';
import { containerdVersions, underKiln } from '../support/paths.ts';
import { useScene } from '../support/use-scene.ts';

const lifeOfATask = ['/tasks/create', '/tasks/start', '/tasks/exit', '/tasks/delete'];
const ofTasks = (topic: string): boolean => topic.startsWith('/tasks/');

/** `ctr events` prints a timestamp as RFC 3339 before 2.0 and as its protobuf fields since. */
function milliseconds(timestamp: unknown): number {
  if (typeof timestamp === 'string') return new Date(timestamp).getTime();
  const { seconds, nanos } = timestamp as { seconds: number; nanos?: number };
  return seconds * 1000 + (nanos ?? 0) / 1e6;
}

// runc's shim may end before its TaskDelete is out, so that this event is now and then never seen: try again. Kiln has
// one try.
const tries = { retry: underKiln ? 0 : 5 };

describe.each(containerdVersions)('events under containerd %s', tries, (version) => {
  const scene = useScene({ version });

  it('tell the life of a task in order, each exactly once, with its pid and exit code', async () => {
    await using log = await scene.events();
    const id = scene.id();
    await scene.run(id, ['sh', '-c', 'exit 9']);
    await log.waitFor('/tasks/delete', id);
    // A second task behind it: had something been sent twice, it would be there by then.
    const marker = scene.id('marker');
    await scene.run(marker, ['true']);
    await log.waitFor('/tasks/delete', marker);

    const events = log.of(id).filter(({ topic }) => ofTasks(topic));
    expect(events.map(({ topic }) => topic)).toEqual(lifeOfATask);
    const [create, start, exit, remove] = events.map(({ event }) => event);
    expect(create?.pid).toBeGreaterThan(0);
    expect(create?.bundle).toBe(`${scene.containerd.bundles}/default/${id}`);
    expect(create?.io).toMatchObject({ stdout: expect.stringContaining('/fifo/') });
    expect(start?.pid).toBe(create?.pid);
    expect(exit).toMatchObject({ id, pid: create?.pid, exit_status: 9 });
    expect(remove).toMatchObject({ pid: create?.pid, exit_status: 9, exited_at: exit?.exited_at });
    const age = Date.now() - milliseconds(exit?.exited_at);
    expect(age).toBeGreaterThan(-2_000);
    expect(age).toBeLessThan(120_000);
  });

  it('of a task that dies at once still say that it started first', async () => {
    await using log = await scene.events();
    const id = scene.id();
    await scene.start(id, ['true']);
    await log.waitFor('/tasks/exit', id);
    expect(
      log
        .of(id)
        .map(({ topic }) => topic)
        .filter(ofTasks),
    ).toEqual(['/tasks/create', '/tasks/start', '/tasks/exit']);
    await scene.remove(id);
    await log.waitFor('/tasks/delete', id);
  });
});

describe('events', tries, () => {
  const scene = useScene({ version: '2.1' });

  it('go to the namespace of their task', async () => {
    await using log = await scene.events();
    const id = scene.id();
    await scene.containerd.ctr(['namespaces', 'create', 'other']);
    await scene.ctr(['image', 'import', '-'], { namespace: 'other', stdin: await imageArchive(busyboxImage) });
    // `ctr events` shows all namespaces and names each.
    const one = scene.run(id, ['sh', '-c', 'exit 1']);
    const two = scene.run(id, ['sh', '-c', 'exit 2'], { namespace: 'other' });
    await Promise.all([one, two]);
    for (const namespace of ['default', 'other']) {
      await log.lines.waitFor((line) => line.includes(` ${namespace} /tasks/delete `), `the end in ${namespace}`);
    }
    for (const [namespace, status] of [
      ['default', 1],
      ['other', 2],
    ] as const) {
      const events = log.of(id).filter((event) => event.namespace === namespace && ofTasks(event.topic));
      expect(events.map(({ topic }) => topic)).toEqual(lifeOfATask);
      expect(events[2]?.event.exit_status).toBe(status);
    }
  });

  it('say 137 of a task that was killed', async () => {
    await using log = await scene.events();
    const id = scene.id();
    await scene.start(id, ['sleep', '1000']);
    await scene.ctr(['task', 'kill', '--signal', 'SIGKILL', id]);
    expect((await log.waitFor('/tasks/exit', id)).event.exit_status).toBe(137);
    await scene.remove(id);
    expect((await log.waitFor('/tasks/delete', id)).event.exit_status).toBe(137);
    expect(log.of(id).filter(({ topic }) => topic === '/tasks/exit').length).toBe(1);
  });
});
