/** Containers of an earlier kilnd, with a scripted agent that says that it is theirs. */
import { existsSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, it, vi } from 'vitest';
import type { DescribeContainerResponse, ReadOutputRequest } from '../../../gen/kiln/agent/v1/agent.ts';
import { KilnError } from '../../../src/errors.ts';
import { isAlive } from '../../../src/host/process-identity.ts';
import { Positions } from '../../../src/sandbox/positions.ts';
import { readContainerRecord } from '../../../src/sandbox/record.ts';
import { failure, helloResponse, outputOf, type Script, tellKills } from '../guest/scripted-agent.ts';
import { canMakeNetns, execRequest, session, Workbench } from './workbench.ts';

const benches: Workbench[] = [];
afterEach(async () => {
  for (const made of benches.splice(0)) await made[Symbol.asyncDispose]();
});

/** A guest in which the container is as `described` says. */
function bench(described: Partial<DescribeContainerResponse> = {}, script: Script = {}): Workbench {
  const made = new Workbench({
    hello: (_call, done) => done(null, helloResponse({ session })),
    describeContainer: (_call, done) => done(null, { started: true, paused: false, execs: [], ...described }),
    ...script,
  });
  benches.push(made);
  return made;
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

describe.skipIf(!canMakeNetns)('a container that is taken over', () => {
  it('runs on under its pid, and ends as any other, giving everything back', async () => {
    const made = bench();
    const ran = join(made.root, 'poststop-ran');
    made.hooks = {
      poststop: [{ name: 'poststop hook', path: '/bin/sh', args: ['sh', '-c', `: >${ran}`] }],
    };
    const record = await made.leave();
    const { container, execs } = await made.adopt(record);
    expect(container.state).toEqual({ kind: 'running' });
    expect([container.id, container.pid, container.terminal]).toEqual(['c1', record.standIn.pid, false]);
    expect(execs.size).toBe(0);
    expect(made.clocksKept).toHaveLength(1);
    expect(made.events).toEqual(['rootfs taken over: /cache/lower.erofs /work/rw.ext4', 'stdin taken over']);
    expect(made.agent.calls).not.toContain('startContainer');
    expect(await errorOf(container.start())).toBe('failed-precondition: cannot start container c1: it is running');
    expect(isAlive(record.standIn)).toBe(true);
    made.agent.exit(7);
    const exit = await container.exit.wait();
    expect(exit.status).toBe(7);
    expect(isAlive(record.standIn)).toBe(false);
    expect(readContainerRecord(made.directory)?.exit).toEqual({ status: 7, atMs: exit.at.getTime() });
    expect(await container.delete()).toBe(exit);
    expect(made.events.slice(2)).toEqual(['vm killed', 'rootfs released']);
    expect(made.clean).toBe(true);
    expect(existsSync(ran)).toBe(true);
    expect(made.logged('warn', 'error')).toEqual([]);
  });

  it('is written down as it was, for the kilnd after the next', async () => {
    const made = bench();
    const record = await made.leave({ oomKills: 2 });
    await made.adopt(record);
    expect(readContainerRecord(made.directory)).toEqual(record);
  });

  it('has its devices of the host on, and tells of one that it cannot keep from others', async () => {
    const made = bench();
    const devices = [
      { slot: 'ro5', serial: 'ro5', file: '/dev/read', device: true },
      { slot: 'rw5', serial: 'rw5', file: '/dev/gone', device: true },
    ] as const;
    const record = await made.leave({ devices: [...devices] });
    await made.adopt(record);
    expect(readContainerRecord(made.directory)).toEqual(record);
    expect(made.logged('warn').join()).toMatch(/a device of the host that a container has .* '\/dev\/gone'/);
  });

  it('has its name servers on', async () => {
    const made = bench();
    const resolvConf = join(made.root, 'resolv.conf');
    writeFileSync(resolvConf, 'nameserver 127.0.0.11\n');
    await made.adopt(await made.leave({ resolvConf }));
    await vi.waitFor(() =>
      expect(made.agent.calls).toEqual(expect.arrayContaining(['relayQueries', 'serveNameservers'])),
    );
    expect(readContainerRecord(made.directory)).toMatchObject({ resolvConf });
  });

  it('that was not started is created, and can be started', async () => {
    const made = bench({ started: false });
    const { container } = await made.adopt(await made.leave());
    expect(container.state).toEqual({ kind: 'created' });
    expect(made.events).not.toContain('stdin taken over');
    await container.start();
    expect(container.state).toEqual({ kind: 'running' });
    expect(made.events.at(-1)).toBe('stdin started');
    expect(made.agent.calls).toContain('startContainer');
  });

  it('that was frozen is paused, and can be resumed', async () => {
    const made = bench({ paused: true });
    const { container } = await made.adopt(await made.leave());
    expect(container.state).toEqual({ kind: 'paused' });
    await container.resume();
    expect(container.state).toEqual({ kind: 'running' });
  });

  it('has its output read on from where its reader was', async () => {
    const asked: ReadOutputRequest[] = [];
    const made = bench(
      {},
      {
        readOutput: (call) => {
          call.once('data', (request: ReadOutputRequest) => {
            asked.push(request);
            call.write(outputOf('rest'));
            void made.agent.exited().then(() => call.end());
          });
          call.on('error', () => {});
        },
      },
    );
    const record = await made.leave();
    const file = join(made.directory, 'positions');
    {
      using positions = new Positions(file);
      positions.write('stdout', 5_000_000_000);
    }
    await made.adopt(record);
    await vi.waitFor(() => expect(Buffer.concat(made.stdio.written).toString()).toBe('rest'), { interval: 1 });
    expect(asked.map(({ delivered }) => delivered)).toEqual([5_000_000_000n]);
    using positions = new Positions(file);
    await vi.waitFor(() => expect(positions.read()).toEqual({ stdout: 5_000_000_004, stderr: 0 }), { interval: 1 });
  });

  it('tells of memory that runs out from now on, not of what was told before', async () => {
    const watched = Promise.withResolvers<(kills: bigint) => void>();
    const made = bench({}, { waitProcess: (call) => watched.resolve((kills) => tellKills(call, kills)) });
    const { container } = await made.adopt(await made.leave({ oomKills: 3 }));
    let told = 0;
    const heard = Promise.withResolvers<void>();
    container.oom.listen(() => {
      told += 1;
      heard.resolve();
    });
    expect(container.oom.kills).toBe(3);
    const tell = await watched.promise;
    tell(3n);
    tell(4n);
    await heard.promise;
    expect([told, container.oom.kills]).toEqual([1, 4]);
    expect(readContainerRecord(made.directory)?.oomKills).toBe(4);
  });

  it('that is ended from outside afterwards is killed with its stand-in', async () => {
    const made = bench();
    const { container } = await made.adopt(await made.leave());
    process.kill(container.pid, 'SIGKILL');
    expect((await container.exit.wait()).status).toBe(137);
    expect(made.logged('warn')).toEqual(['the process that stands for the container was ended: killing the container']);
  });

  it('has the processes beside its init that the guest still has', async () => {
    const made = bench({
      execs: [
        { pid: 77, execId: 'e1', init: false },
        { pid: 79, execId: 'unknown', init: false },
      ],
    });
    const record = await made.leave();
    const requests = ['e1', 'gone'].map((execId) => execRequest(made, execId));
    // The directory of one that runs is there.
    mkdirSync(join(made.directory, 'exec-e1'));
    writeFileSync(join(made.directory, 'exec-e1', 'positions'), Buffer.alloc(16));
    const { container, execs } = await made.adopt(
      record,
      requests.map(({ request }) => request),
    );
    expect([...execs.keys()]).toEqual(['e1']);
    const exec = execs.get('e1');
    expect([exec?.pid, exec?.state.kind]).toEqual([77, 'running']);
    expect(made.agent.calls).not.toContain('execProcess');
    expect(made.events.filter((event) => event === 'stdin taken over').length).toBe(2);
    made.agent.exit(6, 'e1');
    expect((await exec?.exit.wait())?.status).toBe(6);
    expect(await exec?.delete()).toMatchObject({ status: 6 });
    expect(existsSync(join(made.directory, 'exec-e1'))).toBe(false);
    expect(container.state).toEqual({ kind: 'running' });
  });

  it('takes its processes along when it ends', async () => {
    const made = bench({ execs: [{ pid: 77, execId: 'e1', init: false }] });
    const { container, execs } = await made.adopt(await made.leave(), [execRequest(made, 'e1').request]);
    await container.kill(15, true);
    const order: string[] = [];
    await Promise.all([
      execs
        .get('e1')
        ?.exit.wait()
        .then(({ status }) => order.push(`e1 ${status}`)),
      container.exit.wait().then(({ status }) => order.push(`init ${status}`)),
    ]);
    expect(order).toEqual(['e1 137', 'init 143']);
    await container.delete();
    expect(made.clean).toBe(true);
  });
});

describe.skipIf(!canMakeNetns)('a container that cannot be taken over', () => {
  it('because its VM has ended is not found, and what is left of it stays', async () => {
    const made = bench();
    const record = await made.leave();
    const gone = () => Promise.reject(new KilnError('not-found', 'QEMU (pid 5) has ended'));
    expect(await errorOf(made.adopt(record, [], { adopt: gone }))).toBe('not-found: QEMU (pid 5) has ended');
    expect(made.clean).toBe(false);
    expect(isAlive(record.standIn)).toBe(true);
    expect(made.events).toEqual([]);
  });

  it('because its stand-in has ended is not found, and its VM is ended', async () => {
    const made = bench();
    const record = await made.leave();
    const other = { ...record, standIn: { ...record.standIn, startTime: '1' } };
    expect(await errorOf(made.adopt(other))).toBe('not-found: the process that stands for container c1 has ended');
    expect(made.events).toEqual(['vm killed']);
    expect(made.stdio.disposals).toBe(1);
  });

  it('because the guest does not know it has its VM ended', async () => {
    const made = bench({}, { describeContainer: (_call, done) => done(failure('NOT_FOUND', 'no container "c1"')) });
    expect(await errorOf(made.adopt(await made.leave()))).toBe('not-found: no container "c1"');
    expect(made.events).toEqual(['vm killed']);
  });

  it('because its agent does not call again in time has its VM ended', async () => {
    const made = bench();
    made.vmHooks.acceptAgent = (signal) =>
      new Promise((_resolve, reject) => signal.addEventListener('abort', () => reject(signal.reason)));
    const record = await made.leave({ answerLimitMs: 50 });
    await expect(made.adopt(record)).rejects.toThrow('VMM and agent did not both answer the next kilnd within 0.05 s');
    expect(made.events).toEqual(['vm killed']);
  });
});

it.skipIf(!canMakeNetns)('a program in the guest that calls in the place of the agent is turned away', async () => {
  let calls = 0;
  const made = bench(
    {},
    { hello: (_call, done) => done(null, helloResponse({ session: calls++ === 0 ? '' : session })) },
  );
  const { container } = await made.adopt(await made.leave());
  expect(container.state).toEqual({ kind: 'running' });
  expect(calls).toBe(2);
  expect(made.logged('warn')).toEqual([
    'a program in the guest has dialled the port of the agent: the caller is not the agent of this VM',
  ]);
});
