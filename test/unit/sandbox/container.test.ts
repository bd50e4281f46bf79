import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import type { KilnError } from '../../../src/errors.ts';
import { guestStopGraceMs } from '../../../src/sandbox/limits.ts';
import { readContainerRecord } from '../../../src/sandbox/record.ts';
import { failure, helloResponse, outputOf, type Script } from '../guest/scripted-agent.ts';
import { canMakeNetns, execRequest, isAlive, Workbench } from './workbench.ts';

const benches: Workbench[] = [];
function bench(script: Script = {}): Workbench {
  const made = new Workbench(script);
  benches.push(made);
  return made;
}
afterEach(async () => {
  for (const made of benches.splice(0)) await made[Symbol.asyncDispose]();
});

async function errorOf(promise: Promise<unknown>): Promise<string> {
  try {
    await promise;
    return 'no error';
  } catch (error) {
    const { code, message } = error as KilnError;
    return `${code}: ${message}`;
  }
}

/** A handler that a test answers when it wants; `asked` resolves with the first call. */
function held() {
  const asked = Promise.withResolvers<void>();
  const answer = Promise.withResolvers<void>();
  answer.promise.catch(() => {});
  return {
    asked: asked.promise,
    answer: answer.resolve,
    fail: answer.reject,
    handler: ((_call: unknown, done: (error: unknown, response?: unknown) => void) => {
      asked.resolve();
      answer.promise.then(
        () => done(null, {}),
        (error: unknown) => done(error),
      );
    }) as never,
  };
}

describe.skipIf(!canMakeNetns)('a container', () => {
  it('has its pid for as long as it lives, and gives everything back in the right order', async () => {
    const made = bench();
    const container = await made.create();
    expect(container.state).toEqual({ kind: 'created' });
    expect(made.vm?.disks).toEqual([
      ['ro0', '/cache/lower.erofs'],
      ['rw0', '/work/rw.ext4'],
    ]);
    expect(existsSync(made.directory)).toBe(true);
    await container.start();
    expect(container.state).toEqual({ kind: 'running' });
    expect(await container.processes()).toEqual([
      { pid: container.pid, execId: '' },
      { pid: 13, execId: '' },
    ]);
    expect(isAlive(container.pid)).toBe(true);
    made.agent.exit(42);
    const exit = await container.exit.wait();
    expect(isAlive(container.pid)).toBe(false);
    expect(exit.status).toBe(42);
    expect(container.state).toEqual({ kind: 'stopped', exit });
    expect(await container.processes()).toEqual([]);
    expect(await container.delete()).toBe(exit);
    expect(container.state).toEqual({ kind: 'deleted', exit });
    expect(made.agent.calls).toEqual([
      ...['hello', 'createContainer', 'readOutput', 'writeStdin'],
      ...['startContainer', 'listProcesses', 'readStats', 'removeContainer'],
    ]);
    expect(made.events).toEqual(['stdin started', 'vm killed', 'rootfs released']);
    expect(made.clean).toBe(true);
    expect(made.logged('warn', 'error')).toEqual([]);
  });

  it.each([
    ['127.0.0.11', ['relayQueries', 'serveNameservers', 'startContainer']],
    ['10.0.0.1', ['startContainer']],
  ])('whose name server is at %s is started by %j', async (nameserver, expected) => {
    const made = bench();
    made.resolvConf = join(made.root, 'resolv.conf');
    writeFileSync(made.resolvConf, 'nameserver 10.0.0.1\n');
    const container = await made.create();
    // As it is at the start.
    writeFileSync(made.resolvConf, `nameserver ${nameserver}\n`);
    await container.start();
    const names = ['relayQueries', 'serveNameservers', 'startContainer'];
    expect(made.agent.calls.filter((name) => names.includes(name))).toEqual(expected);
    expect(readContainerRecord(made.directory)).toMatchObject({ resolvConf: made.resolvConf });
  });

  it.each([
    [['ended-stdin'], true, true],
    [['ended-stdin'], false, false],
    [[], true, false],
  ])(
    'in a guest with features %j whose stdin is empty (%j) is started with its end (%j)',
    async (features, isEmpty, told) => {
      const requests: boolean[] = [];
      const made = bench({
        hello: (_call, done) => done(null, helloResponse({ features })),
        startContainer: ({ request }, done) => {
          requests.push(request.stdinEnded);
          done(null, {});
        },
        execProcess: ({ request }, done) => {
          requests.push(request.stdinEnded);
          done(null, { pid: 77 });
        },
      });
      made.stdio.stdinIsEmpty = isEmpty;
      const container = await made.create();
      await container.start();
      const { request, stdio } = execRequest(made, 'e1');
      stdio.stdinIsEmpty = isEmpty;
      await container.exec(request).start();
      expect(requests).toEqual([told, told]);
      await container.processes();
      expect(made.agent.calls.filter((name) => name === 'writeStdin').length).toBe(told ? 0 : 2);
    },
  );

  it('gives its VM back as soon as it has ended, with its filesystems flushed', async () => {
    const removed = held();
    const made = bench({ removeContainer: removed.handler });
    const container = await made.create();
    await container.start();
    made.agent.exit(0);
    await container.exit.wait();
    await removed.asked;
    expect(made.events).not.toContain('vm killed');
    removed.answer();
    await made.vm?.wait();
    expect(made.events).toContain('vm killed');
    // All else stays until Delete.
    expect(made.events).not.toContain('rootfs released');
  });

  it('writes its timeline to the log once, whoever deletes it and how often', async () => {
    const made = bench();
    const container = await made.create();
    await container.start();
    made.agent.exit(0);
    await container.exit.wait();
    await Promise.all([container.delete(), container.destroy(), container.destroy()]);
    await container.destroy();
    const timelines = made.log.filter(({ msg }) => msg === 'timeline');
    expect(timelines.length).toBe(1);
    const marks = timelines[0]?.marks as { name: string }[];
    expect(new Set(marks.map(({ name }) => name))).toEqual(
      new Set([
        ...['vmm-spawned', 'agent-connected', 'kernel-up', 'rootfs-ready', 'rootfs-attached'],
        ...['created', 'started', 'exited', 'deleted'],
      ]),
    );
    expect(made.events.filter((event) => event === 'rootfs released')).toEqual(['rootfs released']);
  });

  it('announces its exit after its output', async () => {
    const output = Promise.withResolvers<void>();
    const made = bench({
      readOutput: (call) =>
        void output.promise.then(() => {
          call.write(outputOf('the last line'));
          call.end();
        }),
    });
    const container = await made.create();
    await container.start();
    made.agent.exit(0);
    // The guest has told of the exit: a round trip on the same connection comes after it.
    expect(await errorOf(container.kill(0, false))).toBe('no error');
    expect(container.exit.peek()).toBeUndefined();
    output.resolve();
    await container.exit.wait();
    expect(Buffer.concat(made.stdio.written).toString()).toBe('the last line');
  });

  it('that is started twice is refused, also while it starts', async () => {
    const start = held();
    const made = bench({ startContainer: start.handler });
    const container = await made.create();
    const first = container.start();
    await start.asked;
    expect(await errorOf(container.start())).toBe('failed-precondition: cannot start container c1: it is starting');
    expect(await errorOf(container.delete())).toBe('failed-precondition: cannot delete container c1: it is starting');
    start.answer();
    await first;
    expect(await errorOf(container.start())).toBe('failed-precondition: cannot start container c1: it is running');
    expect(await errorOf(container.delete())).toBe('failed-precondition: cannot delete container c1: it is running');
  });

  it('that ends at once is not stopped before it was running', async () => {
    const start = held();
    const made = bench({ startContainer: start.handler });
    const container = await made.create();
    const starting = container.start();
    await start.asked;
    made.agent.exit(7);
    expect(await errorOf(container.kill(0, false))).toBe('no error');
    expect(container.exit.peek()).toBeUndefined();
    expect(container.state).toEqual({ kind: 'starting' });
    start.answer();
    await starting;
    expect((await container.exit.wait()).status).toBe(7);
  });

  it('whose start the guest refuses is as it was, and can be deleted', async () => {
    const start = held();
    const made = bench({ startContainer: start.handler });
    const container = await made.create();
    start.fail(failure('INTERNAL', 'cannot start container "c1": exec format error'));
    expect(await errorOf(container.start())).toBe('internal: cannot start container "c1": exec format error');
    expect(container.state).toEqual({ kind: 'created' });
    expect((await container.delete()).status).toBe(137);
    expect(made.clean).toBe(true);
  });

  it('whose stdin cannot be opened does not run', async () => {
    const made = bench();
    const container = await made.create();
    made.stdio.startError = new Error('ENOENT: the FIFO is gone');
    await expect(container.start()).rejects.toThrow('the FIFO is gone');
    expect(made.agent.calls).not.toContain('startContainer');
    expect(container.state).toEqual({ kind: 'created' });
  });

  it('that was killed before its start ends with 137, and starts no more', async () => {
    const made = bench();
    const container = await made.create();
    await container.kill(9, true);
    expect((await container.exit.wait()).status).toBe(137);
    expect(await errorOf(container.start())).toBe('failed-precondition: cannot start container c1: it is stopped');
    expect(await errorOf(container.kill(9, true))).toBe('not-found: container c1: process already finished');
  });

  it('passes CloseIO on in any state', async () => {
    const made = bench();
    const container = await made.create();
    container.closeStdin();
    await container.delete();
    container.closeStdin();
    expect(made.events.filter((event) => event === 'stdin closed').length).toBe(2);
  });

  it('is killed when somebody ends the process that stands for it', async () => {
    const made = bench();
    const container = await made.create();
    await container.start();
    process.kill(container.pid, 'SIGTERM');
    expect((await container.exit.wait()).status).toBe(137);
    expect(made.agent.calls).toContain('signalProcess');
  });
});

describe.skipIf(!canMakeNetns)('a signal', () => {
  it.each(['FAILED_PRECONDITION', 'NOT_FOUND'] as const)(
    'that the guest refuses with %s, since the process has ended, finds no process',
    async (status) => {
      const made = bench({ signalProcess: (_call, done) => done(failure(status, 'it is stopped')) });
      const container = await made.create();
      expect(await errorOf(container.kill(15, false))).toBe('not-found: container c1: process already finished');
      made.agent.exit(0);
    },
  );

  it("that does not exist is the guest's error", async () => {
    const made = bench({
      signalProcess: (_call, done) => done(failure('INVALID_ARGUMENT', 'there is no signal 99')),
    });
    const container = await made.create();
    expect(await errorOf(container.kill(99, false))).toBe('invalid-argument: there is no signal 99');
    made.agent.exit(0);
  });

  it('to a container whose VM was killed finds no process, after the exit', async () => {
    const made = bench({ signalProcess: () => made.vm?.end({ signal: 'SIGKILL' }) });
    const container = await made.create();
    expect(await errorOf(container.kill(9, false))).toBe('not-found: container c1: process already finished');
    expect(container.exit.peek()?.status).toBe(137);
  });
});

describe.skipIf(!canMakeNetns)('the end of the VM', () => {
  // Its agent gets a moment to shut the guest down, but not when it cannot be reached again.
  it('comes at once when nobody can reach its agent any more', { timeout: guestStopGraceMs - 500 }, async () => {
    const made = bench();
    const container = await made.create();
    await container.start();
    made.vm?.loseChannel();
    expect((await container.exit.wait()).status).toBe(255);
    expect(made.events).toContain('vm killed');
    await container.delete();
    expect(made.clean).toBe(true);
  });

  it.each([
    ['killed from outside', { signal: 'SIGKILL' }, 137],
    ['stopped by its guest', { code: 0, guestStopped: true, consoleTail: 'Kernel panic' }, 255],
    ['crashed', { signal: 'SIGSEGV' }, 255],
    ['ended with an error', { code: 1 }, 255],
  ] as const)('%s: %o ends the container with %i', async (_how, end, status) => {
    const made = bench();
    const container = await made.create();
    await container.start();
    made.vm?.end(end);
    const exit = await container.exit.wait();
    expect(exit.status).toBe(status);
    expect(isAlive(container.pid)).toBe(false);
    expect(made.logged('error')).toEqual(
      ['the VM ended while the container was alive: the connection to the guest was lost'].map((line) =>
        expect.stringContaining(line),
      ),
    );
    expect(await container.delete()).toBe(exit);
    expect(made.clean).toBe(true);
    expect(made.events).toContain('rootfs released');
  });

  it('during Start fails the start, then ends the container', async () => {
    const start = held();
    const made = bench({ startContainer: start.handler });
    const container = await made.create();
    const starting = errorOf(container.start());
    await start.asked;
    made.vm?.end({ signal: 'SIGKILL' });
    expect(await starting).toBe('unavailable: the connection to the guest was lost');
    expect((await container.exit.wait()).status).toBe(137);
    expect((await container.delete()).status).toBe(137);
    expect(made.clean).toBe(true);
  });
});

describe.skipIf(!canMakeNetns)('destroy', () => {
  it('kills the container from inside and flushes it before its VM is ended', async () => {
    const removed = held();
    const made = bench({ removeContainer: removed.handler });
    const container = await made.create();
    await container.start();
    const destroyed = container.destroy();
    await removed.asked;
    expect(made.agent.calls).toContain('signalProcess');
    expect(made.events).not.toContain('vm killed');
    removed.answer();
    await destroyed;
    expect(container.exit.peek()?.status).toBe(137);
    expect(made.events.slice(-2)).toEqual(['vm killed', 'rootfs released']);
    expect(made.clean).toBe(true);
    expect(made.logged('warn', 'error')).toEqual([]);
  });

  it('does not wait for a reader that stalls', async () => {
    const made = bench({
      readOutput: (call) => {
        call.write(outputOf('unread'));
      },
    });
    made.stdio.stalled = true;
    const container = await made.create();
    await container.start();
    await container.destroy();
    expect(made.agent.calls).toContain('removeContainer');
    expect(made.clean).toBe(true);
  });

  it('during a start fails the start', async () => {
    const start = held();
    const made = bench({ startContainer: start.handler, signalProcess: start.handler });
    const container = await made.create();
    const starting = errorOf(container.start());
    await start.asked;
    const destroyed = container.destroy();
    start.fail(failure('INTERNAL', 'killed'));
    await destroyed;
    expect(await starting).toBe('internal: killed');
    expect(container.exit.peek()?.status).toBe(137);
  });

  it('that cannot release something says so, has released all else, and the next time is content', async () => {
    const made = bench();
    made.releaseRootfs = async () => {
      throw new Error('EBUSY');
    };
    const container = await made.create();
    await container.kill(9, true);
    await expect(container.delete()).rejects.toThrow('EBUSY');
    expect(made.clean).toBe(true);
    expect((await container.delete()).status).toBe(137);
  });

  it("of a VM that cannot be ended in peace is told in the log, and is nobody's unhandled rejection", async () => {
    const made = bench();
    const container = await made.create();
    made.vm!.hooks.kill = async () => {
      throw new Error('cannot remove /sys/fs/cgroup/x');
    };
    made.agent.exit(0);
    await container.exit.wait();
    await expect(container.delete()).rejects.toThrow('cannot remove /sys/fs/cgroup/x');
    expect(made.logged('warn')).toContainEqual(expect.stringContaining('cannot end the VM: cannot remove'));
  });

  it('has no exec ids but those that were given, whatever the guest calls its processes', async () => {
    const made = bench({
      listProcesses: (_call, done) =>
        done(null, {
          processes: [
            { pid: 12, execId: '', init: true },
            { pid: 13, execId: 'x\u001b[2J', init: false },
          ],
        }),
    });
    const container = await made.create();
    expect(await container.processes()).toEqual([
      { pid: container.pid, execId: '' },
      { pid: 13, execId: '' },
    ]);
  });
});
