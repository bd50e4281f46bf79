import { afterEach, describe, expect, it } from 'vitest';
import { ProcessDetails } from '../../../gen/containerd/runc_details.ts';
import { Status } from '../../../gen/containerd/task_types.ts';
import { KilnError } from '../../../src/errors.ts';
import { Gate } from './scripted-container.ts';
import { Bench, exitedAt, id } from './task-bench.ts';
import { errorOf } from './task-client.ts';

const benches: Bench[] = [];
afterEach(async () => {
  for (const made of benches.splice(0)) await made.server.close(0);
});

/** A task that runs. */
async function running(): Promise<Bench> {
  const made = new Bench();
  benches.push(made);
  await made.running();
  made.events.length = 0;
  return made;
}

/** Events as `type process`. */
function told(made: Bench): string[] {
  return made.events.map(({ type, message }) => {
    const { execId, id: process } = message as { execId?: string; id?: string };
    return `${type} ${execId ?? process ?? ''}`.trim();
  });
}

describe('a whole life of an exec', () => {
  it('has every answer and every event, once and in order', async () => {
    const made = await running();
    const { client, container, events } = made;
    const io = { stdin: '/f/in', stdout: '/f/out', stderr: '/f/err', terminal: false };
    const execId = 'e1';
    expect(await client.exec(io)).toEqual({});
    const created = { id, execId, bundle: '/run/bundle', pid: 0, exitStatus: 0, exitedAt: undefined, ...io };
    expect(await client.state({ execId })).toEqual({ ...created, status: Status.CREATED });
    const waiting = client.wait({ execId });
    expect(await client.start({ execId })).toEqual({ pid: 100 });
    expect(await client.state({ execId })).toEqual({ ...created, pid: 100, status: Status.RUNNING });
    await client.closeIo({ execId });
    container.execs[0]?.end(42);
    expect(await waiting).toEqual({ exitStatus: 42, exitedAt });
    const stopped = { ...created, pid: 100, status: Status.STOPPED, exitStatus: 42, exitedAt };
    expect(await client.state({ execId })).toEqual(stopped);
    expect(await client.delete({ execId })).toEqual({ pid: 100, exitStatus: 42, exitedAt });
    expect(await errorOf(client.state({ execId }))).toBe('NotFound: container c1 has no process e1');
    expect(events).toEqual([
      { type: 'TaskExecAdded', message: { containerId: id, execId } },
      { type: 'TaskExecStarted', message: { containerId: id, execId, pid: 100 } },
      { type: 'TaskExit', message: { containerId: id, id: execId, pid: 100, exitStatus: 42, exitedAt } },
    ]);
    expect(container.execs[0]?.calls).toEqual(['start', 'closeStdin', 'delete']);
    // The task has noticed nothing.
    expect((await client.state()).status).toBe(Status.RUNNING);
    expect(container.calls).toEqual(['start']);
  });

  it('leaves its id for another', async () => {
    const made = await running();
    const { client, container } = made;
    for (const status of [1, 2]) {
      await client.exec();
      await client.start({ execId: 'e1' });
      container.execs.at(-1)?.end(status);
      expect((await client.delete({ execId: 'e1' })).exitStatus).toBe(status);
    }
    const once = ['TaskExecAdded e1', 'TaskExecStarted e1', 'TaskExit e1'];
    expect(told(made)).toEqual([...once, ...once]);
  });

  it('may come before the start of the task', async () => {
    const made = new Bench();
    benches.push(made);
    await made.client.create();
    await made.client.exec();
    expect(await made.client.start({ execId: 'e1' })).toEqual({ pid: 100 });
    expect((await made.client.state()).status).toBe(Status.CREATED);
  });
});

describe('Exec', () => {
  it('under an id that is in use is AlreadyExists, also after the exit, until Delete', async () => {
    const made = await running();
    const { client, container } = made;
    await client.exec();
    const taken = 'AlreadyExists: container c1 has a process e1 already';
    expect(await errorOf(client.exec())).toBe(taken);
    await client.start({ execId: 'e1' });
    container.execs[0]?.end(0);
    await client.wait({ execId: 'e1' });
    expect(await errorOf(client.exec())).toBe(taken);
    expect(container.execs.length).toBe(1);
    expect(told(made).filter((event) => event.startsWith('TaskExecAdded'))).toEqual(['TaskExecAdded e1']);
  });

  it('without an id, for another container, or before Create is refused', async () => {
    const made = await running();
    expect(await errorOf(made.client.exec({ execId: '' }))).toBe(
      'InvalidArgument: container c1: a process needs an exec id',
    );
    expect(await errorOf(made.client.exec({ id: 'c2' }))).toBe('NotFound: container c2 does not exist');
    const early = new Bench();
    benches.push(early);
    expect(await errorOf(early.client.exec())).toBe('NotFound: container c1 does not exist');
    expect(told(made)).toEqual([]);
  });

  it('with a spec that cannot be read is refused, tells nobody, and leaves the id free', async () => {
    const made = await running();
    const spec = { typeUrl: 'x/opencontainers/runtime-spec/1/Process', value: Buffer.from('{"args":') };
    expect(await errorOf(made.client.exec({ spec }))).toBe('InvalidArgument: exec e1: malformed');
    expect(await errorOf(made.client.exec({ spec: undefined }))).toBe('InvalidArgument: exec e1: malformed');
    expect(told(made)).toEqual([]);
    expect(await made.client.exec()).toEqual({});
  });

  it('in a task that has ended is FailedPrecondition', async () => {
    const made = await running();
    made.container.end(0);
    await made.client.wait();
    expect(await errorOf(made.client.exec())).toBe(
      'FailedPrecondition: cannot run a process in container c1: it is stopped',
    );
    expect(await errorOf(made.client.start({ execId: 'e1' }))).toBe('NotFound: container c1 has no process e1');
  });
});

describe('the start of an exec', () => {
  it('is announced before its exit, however soon that comes', async () => {
    const made = await running();
    const { client, container } = made;
    await client.exec();
    const exec = container.execs[0]!;
    exec.gates.start = new Gate();
    const start = client.start({ execId: 'e1' });
    await exec.gates.start.entered;
    const waiting = client.wait({ execId: 'e1' });
    exec.end(3);
    await waiting;
    expect(told(made)).toEqual(['TaskExecAdded e1']);
    exec.gates.start.open();
    await start;
    await client.state();
    expect(told(made)).toEqual(['TaskExecAdded e1', 'TaskExecStarted e1', 'TaskExit e1']);
  });

  it('that fails is no start: it can be deleted, with no event of an exit', async () => {
    const made = await running();
    const { client, container } = made;
    await client.exec();
    const exec = container.execs[0]!;
    exec.gates.start = new Gate();
    exec.gates.start.fail(new KilnError('invalid-argument', 'exec: "nope": not found'));
    expect(await errorOf(client.start({ execId: 'e1' }))).toBe('InvalidArgument: exec: "nope": not found');
    expect((await client.state({ execId: 'e1' })).status).toBe(Status.CREATED);
    expect(await client.delete({ execId: 'e1' })).toMatchObject({ pid: 0, exitStatus: 255 });
    expect(told(made)).toEqual(['TaskExecAdded e1']);
    expect(await client.exec()).toEqual({});
  });

  it('twice is refused', async () => {
    const { client } = await running();
    await client.exec();
    await client.start({ execId: 'e1' });
    expect(await errorOf(client.start({ execId: 'e1' }))).toBe(
      'FailedPrecondition: cannot start exec e1 of container c1: it is running',
    );
  });
});

describe('Wait for an exec', () => {
  it('answers everybody, whether they came before the start, during the run or after the exit', async () => {
    const { client, container } = await running();
    await client.exec();
    const before = client.wait({ execId: 'e1' });
    await client.start({ execId: 'e1' });
    const during = client.wait({ execId: 'e1' });
    container.execs[0]?.end(5);
    const answer = { exitStatus: 5, exitedAt };
    expect(await Promise.all([before, during, client.wait({ execId: 'e1' })])).toEqual([answer, answer, answer]);
  });

  it('that is deleted before its start is answered with 255', async () => {
    const { client } = await running();
    await client.exec();
    const waiting = client.wait({ execId: 'e1' });
    await client.delete({ execId: 'e1' });
    expect((await waiting).exitStatus).toBe(255);
  });
});

describe('the signals of an exec', () => {
  it('are its own', async () => {
    const { client, container } = await running();
    await client.exec();
    expect(await errorOf(client.kill(15, { execId: 'e1' }))).toBe(
      'FailedPrecondition: cannot signal exec e1 of container c1: it is created',
    );
    await client.start({ execId: 'e1' });
    await client.kill(15, { execId: 'e1' });
    expect((await client.wait({ execId: 'e1' })).exitStatus).toBe(143);
    expect(await errorOf(client.kill(15, { execId: 'e1' }))).toBe(
      'NotFound: exec e1 of container c1: process already finished',
    );
    expect(container.calls).toEqual(['start']);
  });
});

describe('Delete of an exec', () => {
  it('that runs is refused, and it runs on', async () => {
    const { client } = await running();
    await client.exec();
    await client.start({ execId: 'e1' });
    expect(await errorOf(client.delete({ execId: 'e1' }))).toBe(
      'FailedPrecondition: cannot delete exec e1 of container c1: it is running',
    );
    expect((await client.state({ execId: 'e1' })).status).toBe(Status.RUNNING);
  });

  it('twice at once is done once', async () => {
    const { client, container } = await running();
    await client.exec();
    await client.start({ execId: 'e1' });
    const exec = container.execs[0]!;
    exec.end(0);
    exec.gates.delete = new Gate();
    const first = client.delete({ execId: 'e1' });
    await exec.gates.delete.entered;
    const second = errorOf(client.delete({ execId: 'e1' }));
    // A round trip: the second has arrived.
    await client.state();
    exec.gates.delete.open();
    expect((await first).exitStatus).toBe(0);
    expect(await second).toBe('NotFound: container c1 has no process e1');
    expect(exec.calls).toEqual(['start', 'delete']);
  });
});

describe("the init's exit", () => {
  it('is told last, after those of all execs that ran', async () => {
    const made = await running();
    const { client, container } = made;
    for (const execId of ['a', 'b', 'unstarted']) await client.exec({ execId });
    for (const execId of ['a', 'b']) await client.start({ execId });
    container.end(0);
    await client.wait();
    await client.state();
    expect(told(made).filter((event) => event.startsWith('TaskExit'))).toEqual([]);
    container.execs[1]?.end(137);
    container.execs[0]?.end(137);
    expect((await client.delete()).exitStatus).toBe(0);
    expect(told(made).slice(5)).toEqual(['TaskExit b', 'TaskExit a', 'TaskExit c1', 'TaskDelete']);
  });

  it("is not told twice, nor an exec's after the launcher's delete", async () => {
    const made = await running();
    await made.client.exec();
    await made.client.start({ execId: 'e1' });
    await made.slot.forceDelete();
    made.container.execs[0]?.end(137);
    expect(await errorOf(made.client.state())).toBe('NotFound: container c1 does not exist');
    expect(told(made)).toEqual(['TaskExecAdded e1', 'TaskExecStarted e1']);
  });
});

it('Pids names the execs, as runc does', async () => {
  const { client } = await running();
  for (const execId of ['a', 'b']) await client.exec({ execId });
  await client.start({ execId: 'b' });
  const { processes } = await client.pids();
  expect(processes.map(({ pid }) => pid)).toEqual([4242, 7, 101]);
  expect(processes.map(({ info }) => info?.typeUrl)).toEqual([
    undefined,
    undefined,
    'containerd.runc.v1.ProcessDetails',
  ]);
  expect(ProcessDetails.decode(processes[2]!.info!.value)).toEqual({ execId: 'b' });
});

it('ResizePty goes to the process that it names, and to nobody else', async () => {
  const { client, container } = await running();
  await client.exec({ terminal: true });
  await client.resizePty({ execId: 'e1', width: 80, height: 24 });
  expect(container.execs[0]?.calls).toEqual(['resize 80 24']);
  await client.resizePty({ width: 100, height: 50 });
  expect(container.calls).toEqual(['start', 'resize 100 50']);
  expect(await errorOf(client.resizePty({ execId: 'x', width: 1, height: 1 }))).toBe(
    'NotFound: container c1 has no process x',
  );
});
