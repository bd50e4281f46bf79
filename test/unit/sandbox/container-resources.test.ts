/** Pause, statistics, limits and OOM of a container, with a scripted agent. */
import { afterEach, describe, expect, it } from 'vitest';
import { type CgroupFile, ReadStatsResponse } from '../../../gen/kiln/agent/v1/agent.ts';
import type { KilnError } from '../../../src/errors.ts';
import type { Container } from '../../../src/sandbox/container.ts';
import { failure, type Script, tellExit, tellKills, type WaitCall } from '../guest/scripted-agent.ts';
import { canMakeNetns, Workbench } from './workbench.ts';

const mib = 2 ** 20;

const benches: Workbench[] = [];
async function running(script: Script = {}): Promise<{ made: Workbench; container: Container }> {
  const made = new Workbench(script);
  benches.push(made);
  const container = await made.create();
  await container.start();
  return { made, container };
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

const stats = (fields: Parameters<typeof ReadStatsResponse.fromPartial>[0]): NonNullable<Script['readStats']> => {
  return (_call, done) => done(null, ReadStatsResponse.fromPartial(fields));
};

describe.skipIf(!canMakeNetns)('a container', () => {
  it('is pausing while the guest freezes it, paused after that, and running when resumed', async () => {
    const asked = Promise.withResolvers<() => void>();
    const { container, made } = await running({
      pauseContainer: (_call, done) => asked.resolve(() => done(null, {})),
    });
    const paused = container.pause();
    const answer = await asked.promise;
    expect(container.state).toEqual({ kind: 'pausing' });
    expect(await errorOf(container.resume())).toBe('failed-precondition: cannot resume container c1: it is pausing');
    answer();
    await paused;
    expect(container.state).toEqual({ kind: 'paused' });
    expect(await errorOf(container.pause())).toBe('failed-precondition: cannot pause container c1: it is paused');
    await container.resume();
    expect(container.state).toEqual({ kind: 'running' });
    expect(made.agent.calls).toContain('resumeContainer');
  });

  it('that cannot be frozen is still running', async () => {
    const { container } = await running({ pauseContainer: (_call, done) => done(failure('INTERNAL', 'busy')) });
    expect(await errorOf(container.pause())).toBe('internal: busy');
    expect(container.state).toEqual({ kind: 'running' });
  });

  it('that is killed while it is being paused is stopped, and the pause says so', async () => {
    const asked = Promise.withResolvers<() => void>();
    // The removal waits, so that the VM is there until the answer.
    const removal = Promise.withResolvers<void>();
    const { container, made } = await running({
      pauseContainer: (_call, done) => asked.resolve(() => done(null, {})),
      removeContainer: (_call, done) => void removal.promise.then(() => done(null, {})),
    });
    const paused = errorOf(container.pause());
    const answer = await asked.promise;
    made.agent.exit(137);
    await container.exit.wait();
    answer();
    expect(await paused).toBe('failed-precondition: cannot pause container c1: it is stopped');
    removal.resolve();
    expect(container.state.kind).toBe('stopped');
  });

  it('can be killed while it is paused', async () => {
    const { container } = await running();
    await container.pause();
    await container.kill(9, false);
    expect((await container.exit.wait()).status).toBe(137);
    expect(container.state.kind).toBe('stopped');
    await container.delete();
  });

  it('tells what it uses, and after its end what it had used', async () => {
    let usage = 1n;
    const { container } = await running({
      readStats: (_call, done) =>
        done(null, ReadStatsResponse.fromPartial({ values: { 'memory.current': usage++ }, cpuPeriodUs: 100_000n })),
    });
    expect(await container.stats()).toMatchObject({
      memory: { usageBytes: 1n, limitBytes: null },
      cpuMax: { quotaUs: null, periodUs: 100_000n },
      pids: { current: 0n, limit: null },
    });
    await container.kill(15, false);
    await container.exit.wait();
    expect((await container.stats()).memory.usageBytes).toBe(2n);
    expect((await container.stats()).memory.usageBytes).toBe(2n);
  });

  it('whose VM was lost has no statistics', async () => {
    const { container, made } = await running();
    made.vm?.end({ signal: 'SIGKILL' });
    await container.exit.wait();
    expect(await errorOf(container.stats())).toBe('not-found: container c1 has ended, and nobody knows what it used');
  });

  it('tells each time that memory has run out once, and what only the last count shows before its exit', async () => {
    const watched = Promise.withResolvers<WaitCall>();
    const { container, made } = await running({
      waitProcess: watched.resolve,
      readStats: stats({ memoryEvents: { oom_kill: 7n } }),
    });
    const call = await watched.promise;
    const seen: string[] = [];
    const told = Promise.withResolvers<void>();
    container.oom.listen(() => {
      seen.push('oom');
      told.resolve();
    });
    tellKills(call, 3n);
    await told.promise;
    tellKills(call, 3n);
    tellExit(call, { exitStatus: 137 });
    made.agent.exit(137);
    await container.exit.wait().then(() => seen.push('exit'));
    expect(seen).toEqual(['oom', 'oom', 'exit']);
  });

  it('gets limits as files, those that its VM can keep', async () => {
    const written: CgroupFile[][] = [];
    const { container } = await running({
      setLimits: (call, done) => {
        written.push(call.request.files);
        done(null, {});
      },
      readStats: stats({ values: { 'memory.max': BigInt(64 * mib) }, cpuPeriodUs: 100_000n }),
    });
    await container.update({ memory: { limit: 96 * mib }, cpu: { quota: 150_000 } });
    await container.update({});
    expect(written).toEqual([
      [
        { name: 'memory.max', content: String(96 * mib) },
        { name: 'cpu.max', content: '150000 100000' },
      ],
    ]);
    expect(await errorOf(container.update({ memory: { limit: 513 * mib } }))).toBe(
      "resource-exhausted: a memory limit of 513 MiB is more than the 512 MiB that the container's virtual machine has",
    );
    expect(await errorOf(container.update({ cpu: { quota: 250_000 } }))).toContain('is 2.5 CPUs, more than the 2');
    expect(written.length).toBe(1);
  });

  it('gets more memory where its VM can grow, up to what that can have', async () => {
    const { container, made } = await running({ readStats: stats({ cpuPeriodUs: 100_000n }) });
    const grown: number[] = [];
    const vm = made.vm;
    if (vm === undefined) throw new Error('no VM');
    vm.memoryGrowth = { limitMib: 1024, growTo: async (to) => void grown.push(to) };
    await container.update({ memory: { limit: 600 * mib } });
    // What it has been given it keeps.
    await container.update({ memory: { limit: 550 * mib } });
    expect(grown).toEqual([600 + 128]);
    expect(await errorOf(container.update({ memory: { limit: 1000 * mib } }))).toContain(
      'a memory limit of 1000 MiB is more than the 896 MiB',
    );
    expect(grown.length).toBe(1);
  });

  it('that has ended gets no limits', async () => {
    const { container } = await running();
    await container.kill(15, false);
    await container.exit.wait();
    expect(await errorOf(container.update({ pids: { limit: 5 } }))).toBe(
      'failed-precondition: cannot update container c1: it is stopped',
    );
  });

  it("hands the guest's reason for a limit that it refuses over, and takes the next", async () => {
    let answers = 0;
    const { container } = await running({
      setLimits: (_call, done) => {
        answers += 1;
        if (answers === 1)
          done(failure('INVALID_ARGUMENT', 'cannot set pids.max to "-7": the kernel refuses the value'));
        else done(null, {});
      },
    });
    const first = errorOf(container.update({ unified: { 'pids.max': '-7' } }));
    const second = errorOf(container.update({ pids: { limit: 5 } }));
    expect(await first).toBe('invalid-argument: cannot set pids.max to "-7": the kernel refuses the value');
    expect(await second).toBe('no error');
  });
});
