import { existsSync } from 'node:fs';
import { afterEach, describe, expect, it, vi } from 'vitest';
import type { ExecProcessRequest, ReadOutputRequest } from '../../../gen/kiln/agent/v1/agent.ts';
import type { KilnError } from '../../../src/errors.ts';
import type { Container } from '../../../src/sandbox/container.ts';
import type { ExecRequest } from '../../../src/sandbox/exec.ts';
import { failure, outputOf, type Script, tellExit } from '../guest/scripted-agent.ts';
import { canMakeNetns, execRequest, type MemoryStdio, Workbench } from './workbench.ts';

const benches: Workbench[] = [];
afterEach(async () => {
  for (const made of benches.splice(0)) await made[Symbol.asyncDispose]();
});

/** For scripts, which are asked while the container is made. */
const latest = () => benches.at(-1)!;

interface Setup {
  readonly made: Workbench;
  readonly container: Container;
}

/** A container that runs. */
async function running(script: Script = {}): Promise<Setup> {
  const made = new Workbench(script);
  benches.push(made);
  const container = await made.create();
  await container.start();
  return { made, container };
}

function register({ made, container }: Setup, execId = 'e1', fields: Partial<ExecRequest> = {}) {
  const { request, stdio } = execRequest(made, execId, fields);
  return { exec: container.exec(request), stdio, request };
}

async function started(setup: Setup, execId = 'e1', fields: Partial<ExecRequest> = {}) {
  const registered = register(setup, execId, fields);
  await registered.exec.start();
  return registered;
}

async function errorOf(promise: Promise<unknown>): Promise<string> {
  try {
    await promise;
    return 'no error';
  } catch (error) {
    const { code, message } = error as KilnError;
    return `${code}: ${message}`;
  }
}

const text = (stdio: MemoryStdio) => Buffer.concat(stdio.written).toString();

/** Scripts that act on the process of this exec id, and treat the init as usual. */
const only = (execId: string, readOutput: NonNullable<Script['readOutput']>): NonNullable<Script['readOutput']> => {
  return (call) => {
    call.once('data', (request: ReadOutputRequest) => {
      call.on('data', () => {});
      if (request.execId === execId) readOutput(call);
    });
    call.on('error', () => {});
  };
};

describe.skipIf(!canMakeNetns)('an exec', () => {
  it('is killed with the process that stands for it on the host, or for want of it, and lets go of that at its end', async () => {
    const signals: number[] = [];
    const setup = await running({
      signalProcess: ({ request }, done) => {
        signals.push(request.signal);
        setup.made.agent.exit(128 + request.signal, request.execId);
        done(null, {});
      },
    });
    const ended = Promise.withResolvers<void>();
    const released = vi.fn();
    const standIn = { ended: ended.promise, [Symbol.dispose]: released };
    const { exec } = await started(setup, 'e1', { openStandIn: () => standIn });
    ended.resolve();
    expect((await exec.exit.wait()).status).toBe(137);
    await vi.waitFor(() => expect(released).toHaveBeenCalledOnce());

    const alone = await started(setup, 'e2', { openStandIn: () => undefined });
    expect((await alone.exec.exit.wait()).status).toBe(137);
    expect(signals).toEqual([9, 9]);

    const living = { ...standIn, ended: new Promise<void>(() => {}) };
    const other = await started(setup, 'e3', { openStandIn: () => living });
    setup.made.agent.exit(3, 'e3');
    expect((await other.exec.exit.wait()).status).toBe(3);
    await vi.waitFor(() => expect(released).toHaveBeenCalledTimes(2));
    expect(signals).toEqual([9, 9]);
  });

  it('is created, runs, has a pid of the guest, ends with its status, and is removed from the guest', async () => {
    const requests: ExecProcessRequest[] = [];
    const setup = await running({
      execProcess: ({ request }, done) => {
        requests.push(request);
        done(null, { pid: 77 });
      },
    });
    const { made } = setup;
    const { exec, stdio, request } = register(setup);
    expect([exec.state.kind, exec.pid]).toEqual(['created', 0]);
    expect(made.agent.calls).not.toContain('execProcess');
    await exec.start();
    expect([exec.state.kind, exec.pid]).toEqual(['running', 77]);
    expect(requests).toEqual([
      {
        ...{ id: 'c1', execId: 'e1', process: Buffer.from(request.process) },
        stdio: { stdin: true, stdout: true, stderr: false, terminal: false, width: 0, height: 0 },
        stdinEnded: false,
      },
    ]);
    made.agent.exit(42, 'e1');
    const exit = await exec.exit.wait();
    expect(exit.status).toBe(42);
    expect(exec.state).toEqual({ kind: 'stopped', exit });
    expect(await exec.delete()).toBe(exit);
    expect(exec.state).toEqual({ kind: 'deleted', exit });
    await vi.waitFor(() => expect(made.agent.calls.at(-1)).toBe('removeProcess'), { interval: 1 });
    expect(stdio.disposals).toBeGreaterThan(0);
    expect(existsSync(request.directory)).toBe(false);
    expect(setup.container.state).toEqual({ kind: 'running' });
    expect(made.logged('warn', 'error')).toEqual([]);
  });

  it('of a container that has ended is refused, registered before or not', async () => {
    const setup = await running();
    const early = register(setup, 'early');
    setup.made.agent.exit(0);
    await setup.container.exit.wait();
    const refused = 'failed-precondition: cannot run a process in container c1: it is stopped';
    expect(await errorOf(early.exec.start())).toBe(refused);
    expect(early.exec.state).toEqual({ kind: 'created' });
    expect(() => register(setup, 'late')).toThrow('cannot run a process in container c1: it is stopped');
    expect((await early.exec.delete()).status).toBe(255);
  });

  it('whose start fails is as it was, leaves nothing, and can be started again or deleted', async () => {
    let fail = true;
    const setup = await running({
      execProcess: (_call, done) =>
        fail ? done(failure('INVALID_ARGUMENT', 'exec: "nope": not found')) : done(null, { pid: 5 }),
    });
    const first = register(setup, 'a');
    expect(await errorOf(first.exec.start())).toBe('invalid-argument: exec: "nope": not found');
    expect([first.exec.state.kind, first.exec.pid]).toEqual(['created', 0]);
    expect(first.stdio.disposals).toBe(1);
    expect(existsSync(first.request.directory)).toBe(false);
    expect((await first.exec.delete()).status).toBe(255);
    expect(first.exec.exit.peek()?.status).toBe(255);
    expect(setup.made.agent.calls).not.toContain('removeProcess');
    const again = register(setup, 'a');
    await errorOf(again.exec.start());
    fail = false;
    await again.exec.start();
    expect(again.exec.state.kind).toBe('running');
  });

  it('whose stdio cannot be opened does not run', async () => {
    const setup = await running();
    const openStdio = () => Promise.reject(new Error('no such FIFO'));
    const { exec } = register(setup, 'a', { openStdio });
    await expect(exec.start()).rejects.toThrow('no such FIFO');
    expect(setup.made.agent.calls).not.toContain('execProcess');
    expect(exec.state.kind).toBe('created');
  });

  it('is started once, and deleted when it does not run', async () => {
    const asked = Promise.withResolvers<void>();
    const answer = Promise.withResolvers<void>();
    const setup = await running({
      execProcess: (_call, done) => {
        asked.resolve();
        void answer.promise.then(() => done(null, { pid: 9 }));
      },
    });
    const { exec } = register(setup);
    const starting = exec.start();
    await asked.promise;
    expect(await errorOf(exec.start())).toBe(
      'failed-precondition: cannot start exec e1 of container c1: it is starting',
    );
    expect(await errorOf(exec.kill(9))).toBe(
      'failed-precondition: cannot signal exec e1 of container c1: it is starting',
    );
    expect(await errorOf(exec.delete())).toBe(
      'failed-precondition: cannot delete exec e1 of container c1: it is starting',
    );
    answer.resolve();
    await starting;
    expect(await errorOf(exec.start())).toBe(
      'failed-precondition: cannot start exec e1 of container c1: it is running',
    );
    expect(await errorOf(exec.delete())).toBe(
      'failed-precondition: cannot delete exec e1 of container c1: it is running',
    );
  });

  it('takes signals while it runs: before there is a state that forbids them, after there is no process', async () => {
    const setup = await running();
    const { exec } = register(setup);
    expect(await errorOf(exec.kill(15))).toBe(
      'failed-precondition: cannot signal exec e1 of container c1: it is created',
    );
    await exec.start();
    await exec.kill(15);
    expect((await exec.exit.wait()).status).toBe(143);
    expect(await errorOf(exec.kill(9))).toBe('not-found: exec e1 of container c1: process already finished');
    expect(setup.container.state).toEqual({ kind: 'running' });
  });

  it.each(['FAILED_PRECONDITION', 'NOT_FOUND'] as const)(
    'whose signal the guest refuses with %s has ended, which its exit tells soon',
    async (status) => {
      const setup = await running({ signalProcess: (_call, done) => done(failure(status, 'has ended')) });
      const { exec } = await started(setup);
      expect(await errorOf(exec.kill(9))).toBe('not-found: exec e1 of container c1: process already finished');
      setup.made.agent.exit(0);
    },
  );

  it('that was deleted before its start never runs', async () => {
    const setup = await running();
    const { exec } = register(setup);
    const deleting = exec.delete();
    expect(await errorOf(exec.start())).toMatch(/^failed-precondition: cannot start exec e1 of container c1: it is/);
    expect((await deleting).status).toBe(255);
    expect(exec.exit.peek()?.status).toBe(255);
    expect(setup.made.agent.calls).not.toContain('execProcess');
  });

  it('closes its stdin when it is told to, before the start as well', async () => {
    const setup = await running();
    const { exec } = register(setup);
    exec.closeStdin();
    expect(setup.made.events).not.toContain('stdin closed');
    await exec.start();
    exec.closeStdin();
    expect(setup.made.events.filter((event) => event === 'stdin closed').length).toBe(2);
  });

  it('closes its stdin when it is told to while its start is under way', async () => {
    const called = Promise.withResolvers<() => void>();
    const setup = await running({
      execProcess: (_call, done) => called.resolve(() => done(null, { pid: 40 })),
    });
    const { exec } = register(setup);
    const starting = exec.start();
    const answer = await called.promise;
    exec.closeStdin();
    answer();
    await starting;
    expect(setup.made.events).toContain('stdin closed');
  });
});

describe.skipIf(!canMakeNetns)('the terminal of an exec', () => {
  it('has the size that was told last before the start, and later ones at once', async () => {
    const sizes: unknown[] = [];
    const setup = await running({
      execProcess: ({ request }, done) => {
        sizes.push(request.stdio);
        done(null, { pid: 9 });
      },
      resizeTerminal: ({ request }, done) => {
        sizes.push(request);
        done(null, {});
      },
    });
    const { exec } = register(setup, 'e1', { terminal: true, terminalSize: { width: 1, height: 2 } });
    await exec.resize({ width: 80, height: 24 });
    expect(sizes).toEqual([]);
    await exec.start();
    await exec.resize({ width: 100, height: 50 });
    expect(sizes).toEqual([
      { stdin: true, stdout: true, stderr: false, terminal: true, width: 80, height: 24 },
      { id: 'c1', execId: 'e1', width: 100, height: 50 },
    ]);
    setup.made.agent.exit(0, 'e1');
    await exec.exit.wait();
    await exec.resize({ width: 1, height: 1 });
    expect(sizes.length).toBe(2);
  });

  it('that it has not is resized in vain', async () => {
    const setup = await running();
    const { exec } = await started(setup);
    await exec.resize({ width: 80, height: 24 });
    expect(setup.made.agent.calls).not.toContain('resizeTerminal');
  });
});

describe.skipIf(!canMakeNetns)("an exec's exit", () => {
  it('comes before that of the container, which ends it', async () => {
    const ends = Promise.withResolvers<void>();
    const setup = await running({
      waitProcess: (call) => {
        const { agent } = latest();
        const told = call.request.execId === '' ? agent.exited('') : ends.promise.then(() => 137);
        void told.then((exitStatus) => tellExit(call, { exitStatus }));
      },
    });
    const { exec } = await started(setup);
    setup.made.agent.exit(3);
    // A round trip on the same connection comes after the guest has told of the exit.
    await setup.made.container?.processes();
    expect(setup.container.exit.peek()).toBeUndefined();
    ends.resolve();
    const order: string[] = [];
    await Promise.all([
      exec.exit.wait().then(() => order.push('exec')),
      setup.container.exit.wait().then(() => order.push('container')),
    ]);
    expect(order).toEqual(['exec', 'container']);
    expect((await setup.container.exit.wait()).status).toBe(3);
  });

  it.each([
    ['killed from outside', { signal: 'SIGKILL' }, 137],
    ['crashed', { signal: 'SIGSEGV' }, 255],
  ] as const)("is the container's when the VM is %s", async (_how, end, status) => {
    const setup = await running();
    const { exec } = await started(setup);
    setup.made.vm?.end(end);
    expect((await exec.exit.wait()).status).toBe(status);
    expect((await setup.container.exit.wait()).status).toBe(status);
    expect((await exec.delete()).status).toBe(status);
    await setup.container.delete();
    expect(setup.made.clean).toBe(true);
    expect(setup.made.logged('error').length).toBe(1);
  });

  it('does not wait for a child that holds the pipe, once its own output is delivered', async () => {
    const call = Promise.withResolvers<{ write(message: { data: Buffer }): unknown; end(): void }>();
    const setup = await running({
      readOutput: only('e1', (output) => call.resolve(output)),
      waitProcess: (call) => {
        const { execId } = call.request;
        const stdoutBytes = execId === '' ? undefined : 5n;
        void latest()
          .agent.exited(execId)
          .then((exitStatus) => tellExit(call, { exitStatus, stdoutBytes }));
      },
    });
    const { exec, stdio } = await started(setup);
    setup.made.agent.exit(0, 'e1');
    const output = await call.promise;
    output.write({ data: Buffer.from('12') });
    await vi.waitFor(() => expect(text(stdio)).toBe('12'), { interval: 1 });
    expect(exec.exit.peek()).toBeUndefined();
    const before = performance.now();
    output.write({ data: Buffer.from('345') });
    await exec.exit.wait();
    // The grace of a second is for readers that stall, and not used here.
    expect(performance.now() - before).toBeLessThan(700);
    // The child's output still arrives.
    output.write({ data: Buffer.from(' late') });
    await vi.waitFor(() => expect(text(stdio)).toBe('12345 late'), { interval: 1 });
    output.end();
    await exec.drained;
    expect((await exec.delete()).status).toBe(0);
  });

  it('is held back by a reader that stalls, for a grace and no longer', async () => {
    const setup = await running({
      readOutput: only('e1', (call) => {
        call.write(outputOf('unread'));
        call.end();
      }),
    });
    const { request, stdio } = execRequest(setup.made, 'e1');
    stdio.stalled = true;
    const exec = setup.container.exec(request);
    await exec.start();
    const before = performance.now();
    setup.made.agent.exit(0, 'e1');
    await exec.exit.wait();
    const took = performance.now() - before;
    expect(took).toBeGreaterThan(900);
    expect(took).toBeLessThan(5000);
    expect(exec.state.kind).toBe('stopped');
    // As the container's end does to all of them.
    await exec.release();
    await exec.delete();
    expect(stdio.stdout?.destroyed).toBe(true);
  });

  it.each([
    ['a count of 2^63 bytes', { stdoutBytes: 1n << 63n }],
    ['a count of 2^64 - 1 bytes', { stdoutBytes: (1n << 64n) - 1n, stderrBytes: (1n << 64n) - 1n }],
    ['a status of 4,000,000,255', { exitStatus: 4_000_000_255 }],
  ])('comes in spite of a guest that tells %s', async (_what, fields) => {
    const setup = await running({
      readOutput: only('e1', () => {}),
      waitProcess: (call) => {
        void latest()
          .agent.exited(call.request.execId)
          .then(() => tellExit(call, fields));
      },
    });
    const { exec } = await started(setup);
    setup.made.agent.exit(0, 'e1');
    const { status } = await exec.exit.wait();
    expect(status).toBeGreaterThanOrEqual(0);
    expect(status).toBeLessThan(256);
  });
});

describe.skipIf(!canMakeNetns)('the execs of a container', () => {
  it('are forgotten when they are deleted, a hundred one after the other under one id', async () => {
    const setup = await running();
    for (let round = 0; round < 100; round++) {
      const { exec } = await started(setup, 'again');
      setup.made.agent.exit(round, 'again');
      expect((await exec.exit.wait()).status).toBe(round);
      await exec.delete();
    }
    setup.made.agent.calls.length = 0;
    // One that was not forgotten would still be waited for.
    setup.made.agent.exit(0);
    expect((await setup.container.exit.wait()).status).toBe(0);
    expect((await setup.container.delete()).status).toBe(0);
    expect(setup.made.clean).toBe(true);
  });

  it('stand in the list of processes with their names, and the init with its pid of the host', async () => {
    const setup = await running({
      listProcesses: (_call, done) =>
        done(null, {
          processes: [
            { pid: 12, execId: '', init: true },
            { pid: 77, execId: 'e1', init: false },
            { pid: 78, execId: '', init: false },
          ],
        }),
    });
    register(setup, 'e1');
    expect(await setup.container.processes()).toEqual([
      { pid: setup.container.pid, execId: '' },
      { pid: 77, execId: 'e1' },
      { pid: 78, execId: '' },
    ]);
  });

  it('that run are ended by destroy, with their stdio released', async () => {
    const setup = await running();
    const { exec, stdio } = await started(setup);
    const unstarted = register(setup, 'unstarted');
    await setup.container.destroy();
    expect(exec.exit.peek()?.status).toBe(137);
    expect(stdio.disposals).toBeGreaterThan(0);
    expect(unstarted.exec.exit.peek()).toBeUndefined();
    expect(setup.made.clean).toBe(true);
    expect(setup.made.logged('warn', 'error')).toEqual([]);
  });

  it('that the guest does not remove are deleted nevertheless, and the log tells', async () => {
    const setup = await running({ removeProcess: (_call, done) => done(failure('INTERNAL', 'EBUSY')) });
    const { exec } = await started(setup);
    setup.made.agent.exit(1, 'e1');
    await exec.exit.wait();
    expect((await exec.delete()).status).toBe(1);
    await vi.waitFor(
      () =>
        expect(setup.made.logged('warn')).toContainEqual(
          expect.stringMatching(/^cannot remove the process from the guest: EBUSY/),
        ),
      { interval: 1 },
    );
  });

  it('that are deleted do not wait for the guest, but the next one with the exec id does', async () => {
    const removal = Promise.withResolvers<void>();
    const setup = await running({ removeProcess: (_call, done) => void removal.promise.then(() => done(null, {})) });
    const { exec } = await started(setup);
    setup.made.agent.exit(1, 'e1');
    await exec.exit.wait();
    await exec.delete();
    const execs = () => setup.made.agent.calls.filter((call) => call === 'execProcess').length;
    const next = register(setup, 'e1').exec;
    const starting = next.start();
    await vi.waitFor(() => expect(setup.made.agent.calls).toContain('removeProcess'), { interval: 1 });
    await setup.container.processes();
    expect(execs()).toBe(1);
    removal.resolve();
    await starting;
    expect(execs()).toBe(2);
  });
});
