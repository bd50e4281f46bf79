import { afterEach, describe, expect, it, vi } from 'vitest';
import { DeleteResponse } from '../../../gen/containerd/task.ts';
import { Status } from '../../../gen/containerd/task_types.ts';
import { KilnError } from '../../../src/errors.ts';
import { unknownTaskDeleted } from '../../../src/shim/delete-reply.ts';
import { Gate } from './scripted-container.ts';
import { Bench, exitedAt, id } from './task-bench.ts';
import { errorOf } from './task-client.ts';

const benches: Bench[] = [];
function bench(): Bench {
  const made = new Bench();
  benches.push(made);
  return made;
}
afterEach(async () => {
  for (const made of benches.splice(0)) await made.server.close(0);
});

describe('a whole life', () => {
  it('has every answer and every event, once and in order', async () => {
    const { client, container, events } = bench();
    const io = { stdin: '/f/in', stdout: '/f/out', stderr: '/f/err', terminal: false };
    const rootfs = [{ type: 'bind', source: '/s', target: '', options: ['rw'] }];
    expect(await client.create({ ...io, rootfs })).toEqual({ pid: 4242 });
    expect(await client.connect()).toEqual({ shimPid: process.pid, taskPid: 4242, version: '' });
    const created = { id, bundle: '/run/bundle', pid: 4242, execId: '', exitStatus: 0, exitedAt: undefined, ...io };
    expect(await client.state()).toEqual({ ...created, status: Status.CREATED });
    const waiting = client.wait();
    expect(await client.start()).toEqual({ pid: 4242 });
    expect(await client.state()).toEqual({ ...created, status: Status.RUNNING });
    expect(await client.pids()).toEqual({
      processes: [
        { pid: 4242, info: undefined },
        { pid: 7, info: undefined },
      ],
    });
    container.end(42);
    expect(await waiting).toEqual({ exitStatus: 42, exitedAt });
    const stopped = { ...created, exitStatus: 42, exitedAt };
    expect(await client.state()).toEqual({ ...stopped, status: Status.STOPPED });
    expect(await client.pids()).toEqual({ processes: [] });
    expect(await client.delete()).toEqual({ pid: 4242, exitStatus: 42, exitedAt });
    expect(await client.shutdown()).toEqual({});
    const exit = { pid: 4242, exitStatus: 42, exitedAt };
    expect(events).toEqual([
      {
        type: 'TaskCreate',
        message: { containerId: id, bundle: '/run/bundle', rootfs, io, checkpoint: '', pid: 4242 },
      },
      { type: 'TaskStart', message: { containerId: id, pid: 4242 } },
      { type: 'TaskExit', message: { containerId: id, id, ...exit } },
      { type: 'TaskDelete', message: { containerId: id, id: '', ...exit } },
    ]);
  });

  it('is the same by the name of version 3', async () => {
    const made = bench();
    const client = made.connect('containerd.task.v3.Task');
    await client.create();
    await client.start();
    made.container.end(0);
    expect((await client.delete()).exitStatus).toBe(0);
    expect(made.types).toEqual(['TaskCreate', 'TaskStart', 'TaskExit', 'TaskDelete']);
  });

  it.each(['Checkpoint', 'constructor'])('has no %s: that is Unimplemented', async (method) => {
    expect(await errorOf(bench().client.raw(method))).toBe(`Unimplemented: method ${method}`);
  });

  it('may be followed by another under the same id', async () => {
    const { client, slot } = bench();
    await client.create();
    await client.delete();
    expect(slot.busy).toBe(false);
    await client.create();
    expect(slot.busy).toBe(true);
  });
});

describe('Create', () => {
  it('that fails is told to the client and to the log, and leaves nothing', async () => {
    const made = bench();
    made.creation = new Gate();
    made.creation.fail(new KilnError('not-found', 'no such layer: /x', { hint: 'pull the image again' }));
    expect(await errorOf(made.client.create())).toBe('NotFound: no such layer: /x (pull the image again)');
    expect(made.types).toEqual([]);
    expect(made.slot.busy).toBe(false);
    expect(made.log).toMatchObject([{ level: 'error', msg: 'Create failed', err: { message: 'no such layer: /x' } }]);
    expect(await errorOf(made.client.state())).toBe('NotFound: container c1 does not exist');
    // containerd's way after a failure.
    expect(await errorOf(made.client.delete())).toBe('NotFound: container c1 does not exist');
    expect(await made.client.shutdown()).toEqual({});
    made.creation = undefined;
    expect(await made.client.create()).toEqual({ pid: 4242 });
  });

  it('of another id is refused, a second one too, and one from a checkpoint', async () => {
    const { client } = bench();
    expect(await errorOf(client.create({ id: 'c2' }))).toBe(
      'InvalidArgument: this endpoint serves container c1, not c2',
    );
    expect(await errorOf(client.create({ checkpoint: '/c' }))).toBe(
      'Unimplemented: container c1: restoring from a checkpoint is not supported',
    );
    await client.create();
    expect(await errorOf(client.create())).toBe('AlreadyExists: container c1 already exists');
  });

  it('is refused while another is under way', async () => {
    const made = bench();
    made.creation = new Gate();
    const first = made.client.create();
    await made.creation.entered;
    expect(await errorOf(made.client.create())).toBe('AlreadyExists: container c1 already exists');
    expect(await errorOf(made.client.state())).toBe('NotFound: container c1 does not exist');
    made.creation.open();
    expect(await first).toEqual({ pid: 4242 });
  });

  it('is given up when its client goes away', async () => {
    const made = bench();
    made.creation = new Gate();
    const create = errorOf(made.client.create());
    await made.creation.entered;
    const aborted = new Promise((resolve) => made.signal?.addEventListener('abort', resolve));
    made.client.ttrpc.close();
    await Promise.all([create, aborted]);
    // The endpoint is as good as new.
    made.creation = undefined;
    expect(await made.connect().create()).toEqual({ pid: 4242 });
    expect(made.types).toEqual(['TaskCreate']);
  });

  it('is given up when its time has passed', async () => {
    const made = bench();
    made.creation = new Gate();
    expect(await errorOf(made.client.create({}, { timeoutMs: 20 }))).toMatch(/^DeadlineExceeded/);
    await new Promise<void>((resolve) => {
      if (made.signal?.aborted) resolve();
      else made.signal?.addEventListener('abort', () => resolve());
    });
    expect(made.signal?.aborted).toBe(true);
  });

  it('that succeeds for nobody is undone, without an event', async () => {
    const made = bench();
    const { container } = made;
    container.gates.destroy = new Gate();
    // Succeeds although its signal has been aborted: the last step cannot be called off.
    const creation = new Gate();
    made.creation = Object.assign(creation, { fail: () => creation.open() });
    const create = errorOf(made.client.create());
    await creation.entered;
    const printed = made.slot.forceDelete();
    await container.gates.destroy.entered;
    expect(made.slot.busy).toBe(true);
    container.gates.destroy.open();
    expect(DeleteResponse.decode(await printed)).toMatchObject({ pid: 0, exitStatus: 137 });
    expect(await create).toBe('Canceled: container c1 was deleted during Create');
    expect(made.types).toEqual([]);
    expect(made.slot.busy).toBe(false);
  });
});

describe('Start', () => {
  it('is announced before the exit of a program that ends at once, and before its own answer', async () => {
    const made = bench();
    const { client, container, events } = made;
    await client.create();
    container.gates.start = new Gate();
    const start = client.start();
    await container.gates.start.entered;
    const waiting = client.wait();
    container.end(3);
    await waiting;
    expect(made.types).toEqual(['TaskCreate']);
    container.gates.start.open();
    await start;
    await client.state();
    expect(events.map(({ type }) => type)).toEqual(['TaskCreate', 'TaskStart', 'TaskExit']);
  });

  it('twice is refused, one after the other and both at once', async () => {
    const made = bench();
    const { client, container } = made;
    await client.create();
    container.gates.start = new Gate();
    const first = client.start();
    await container.gates.start.entered;
    expect(await errorOf(client.start())).toBe('FailedPrecondition: cannot start container c1: it is starting');
    container.end(0);
    await client.wait();
    // The refused one must not let the exit overtake the start.
    expect(made.types).toEqual(['TaskCreate']);
    container.gates.start.open();
    await first;
    expect(await errorOf(client.start())).toMatch(/^FailedPrecondition: cannot start container c1: it is/);
    expect(made.types).toEqual(['TaskCreate', 'TaskStart', 'TaskExit']);
  });

  it('that fails is no start: the container is killed and deleted as one that was created', async () => {
    const made = bench();
    const { client, container } = made;
    await client.create();
    container.gates.start = new Gate();
    container.gates.start.fail(new KilnError('internal', 'crun: exec format error'));
    expect(await errorOf(client.start())).toBe('Internal: crun: exec format error');
    expect(made.log).toMatchObject([
      { level: 'error', msg: 'Start failed', err: { message: 'crun: exec format error' } },
    ]);
    expect((await client.state()).status).toBe(Status.CREATED);
    await client.kill(9);
    expect((await client.delete()).exitStatus).toBe(137);
    expect(made.types).toEqual(['TaskCreate', 'TaskExit', 'TaskDelete']);
  });

  it('after the exit is refused', async () => {
    const { client, container } = bench();
    await client.create();
    container.end(137);
    expect(await errorOf(client.start())).toBe('FailedPrecondition: cannot start container c1: it is stopped');
  });
});

describe('Wait', () => {
  it('answers everybody, whether they came before the start, during the run or after the exit', async () => {
    const { client, container } = bench();
    await client.create();
    const before = client.wait();
    await client.start();
    const during = client.wait();
    container.end(5);
    const answer = { exitStatus: 5, exitedAt };
    expect(await Promise.all([before, during, client.wait()])).toEqual([answer, answer, answer]);
  });

  it('that is open during Delete is answered, and a later one finds nothing', async () => {
    const { client } = bench();
    await client.create();
    const open = client.wait();
    await client.delete();
    expect((await open).exitStatus).toBe(137);
    expect(await errorOf(client.wait())).toBe('NotFound: container c1 does not exist');
  });

  it('leaves nothing behind when its client goes away', async () => {
    const made = bench();
    await made.client.create();
    for (let round = 0; round < 50; round++) {
      const visitor = made.connect();
      const waiting = errorOf(visitor.wait());
      await visitor.state();
      visitor.ttrpc.close();
      await waiting;
    }
    // The service's own is left: it announces the exit.
    await vi.waitFor(() => expect(made.container.exit.waiting).toBe(1), { interval: 1 });
  });

  it('goes on over a new connection when the old one is lost, and so does the task', async () => {
    const made = bench();
    await made.running();
    const old = errorOf(made.client.wait());
    made.client.ttrpc.close();
    expect(await old).toMatch(/^Unavailable/);
    const client = made.connect();
    expect((await client.connect()).taskPid).toBe(4242);
    expect((await client.pids()).processes.length).toBe(2);
    expect((await client.state()).status).toBe(Status.RUNNING);
    const waiting = client.wait();
    made.container.end(0);
    expect((await waiting).exitStatus).toBe(0);
    expect(made.types).toEqual(['TaskCreate', 'TaskStart', 'TaskExit']);
  });
});

describe('Kill', () => {
  it('passes signal and scope on, before the start and after it', async () => {
    const { client, container } = bench();
    await client.create();
    await client.kill(15, { all: true });
    expect(container.calls).toEqual(['kill 15 true']);
    expect((await client.wait()).exitStatus).toBe(143);
  });

  it('of what has ended is NotFound, which clients take for done', async () => {
    const { client, container } = bench();
    await client.create();
    container.end(0);
    expect(await errorOf(client.kill(9))).toBe('NotFound: container c1: process already finished');
    await client.delete();
    expect(await errorOf(client.kill(9))).toBe('NotFound: container c1 does not exist');
  });
});

describe('Delete', () => {
  it('of a running container is refused, and it runs on', async () => {
    const made = bench();
    await made.running();
    expect(await errorOf(made.client.delete())).toBe('FailedPrecondition: cannot delete container c1: it is running');
    expect((await made.client.state()).status).toBe(Status.RUNNING);
    made.container.end(1);
    expect((await made.client.delete()).exitStatus).toBe(1);
  });

  it('of one that was never started announces its exit and its end', async () => {
    const made = bench();
    await made.client.create();
    expect((await made.client.delete()).exitStatus).toBe(137);
    expect(made.types).toEqual(['TaskCreate', 'TaskExit', 'TaskDelete']);
  });

  it('twice at once is done once: the second waits and finds nothing', async () => {
    const made = bench();
    const { client, container } = made;
    await client.create();
    container.end(0);
    container.gates.delete = new Gate();
    const first = client.delete();
    await container.gates.delete.entered;
    const second = errorOf(client.delete());
    expect((await client.state()).status).toBe(Status.STOPPED);
    container.gates.delete.open();
    expect((await first).exitStatus).toBe(0);
    expect(await second).toBe('NotFound: container c1 does not exist');
    expect(container.calls).toEqual(['delete']);
    expect(made.types).toEqual(['TaskCreate', 'TaskExit', 'TaskDelete']);
  });

  it('that fails leaves the task, for another try', async () => {
    const { client, container } = bench();
    await client.create();
    container.end(0);
    container.gates.delete = new Gate();
    const first = errorOf(client.delete());
    await container.gates.delete.entered;
    const second = client.delete();
    const failing = container.gates.delete;
    delete container.gates.delete;
    failing.fail(new KilnError('internal', 'EBUSY'));
    expect(await first).toBe('Internal: EBUSY');
    expect((await second).exitStatus).toBe(0);
  });
});

describe('requests for somebody else', () => {
  it('find nothing, for another id, another process, and before Create', async () => {
    const { client } = bench();
    const all = (fields: { id?: string; execId?: string }) => [
      client.start(fields),
      client.state(fields),
      client.wait(fields),
      client.kill(9, fields),
      client.delete(fields),
      client.closeIo(fields),
    ];
    const answers = async (fields: { id?: string; execId?: string }) =>
      new Set(await Promise.all(all(fields).map(errorOf)));
    expect(await answers({})).toEqual(new Set(['NotFound: container c1 does not exist']));
    await client.create();
    expect(await answers({ id: 'c2' })).toEqual(new Set(['NotFound: container c2 does not exist']));
    expect(await answers({ execId: 'x' })).toEqual(new Set(['NotFound: container c1 has no process x']));
    expect(await errorOf(client.pids({ id: 'c2' }))).toBe('NotFound: container c2 does not exist');
  });

  it('are answered by Connect without a pid', async () => {
    const { client } = bench();
    expect((await client.connect()).taskPid).toBe(0);
    await client.create();
    expect((await client.connect({ id: 'c2' })).taskPid).toBe(0);
    expect((await client.connect()).taskPid).toBe(4242);
  });
});

it('CloseIO closes stdin, when that is what it says', async () => {
  const { client, container } = bench();
  await client.create();
  await client.closeIo({ stdin: false });
  expect(container.calls).toEqual([]);
  await client.closeIo();
  await client.closeIo();
  expect(container.calls).toEqual(['closeStdin', 'closeStdin']);
});

it('Shutdown does nothing while there is a task', async () => {
  const made = bench();
  await made.running();
  await made.client.shutdown({ now: true });
  expect((await made.client.state()).status).toBe(Status.RUNNING);
  expect(made.container.calls).toEqual(['start']);
});

describe("the launcher's delete", () => {
  it('of a living task ends it and says nothing, since containerd does', async () => {
    const made = bench();
    await made.running();
    const waiting = made.client.wait();
    const { pid, exitStatus } = DeleteResponse.decode(await made.slot.forceDelete());
    expect({ pid, exitStatus }).toEqual({ pid: 4242, exitStatus: 137 });
    expect((await waiting).exitStatus).toBe(137);
    expect(made.types).toEqual(['TaskCreate', 'TaskStart']);
    expect(made.slot.busy).toBe(false);
  });

  it('after Delete prints how the task ended', async () => {
    const made = bench();
    await made.running();
    made.container.end(42);
    await made.client.delete();
    expect(DeleteResponse.decode(await made.slot.forceDelete())).toEqual({ pid: 4242, exitStatus: 42, exitedAt });
    expect(made.container.calls).toEqual(['start', 'delete']);
  });

  it('without a task prints that it was killed', async () => {
    const made = bench();
    const printed = DeleteResponse.decode(await made.slot.forceDelete());
    expect(printed).toMatchObject({ pid: 0, exitStatus: 137 });
    expect(DeleteResponse.decode(unknownTaskDeleted())).toMatchObject({ pid: 0, exitStatus: 137 });
  });

  it('does not tell of an older task when the last Create has failed', async () => {
    const made = bench();
    await made.running();
    made.container.end(3);
    await made.client.delete();
    made.creation = new Gate();
    made.creation.fail(new Error('disk full'));
    expect(await errorOf(made.client.create())).toBe('Internal: disk full');
    expect(DeleteResponse.decode(await made.slot.forceDelete())).toMatchObject({ pid: 0, exitStatus: 137 });
  });

  it('during Create gives it up, waits for it, and leaves nothing', async () => {
    const made = bench();
    made.creation = new Gate();
    const create = errorOf(made.client.create());
    await made.creation.entered;
    expect(DeleteResponse.decode(await made.slot.forceDelete())).toMatchObject({ pid: 0, exitStatus: 137 });
    expect(await create).toBe('Canceled: container c1 was deleted during Create');
    expect(made.types).toEqual([]);
    expect(made.slot.busy).toBe(false);
  });

  it('during Start and during Delete is silent as well', async () => {
    const starting = bench();
    await starting.client.create();
    const gate = new Gate();
    starting.container.gates.start = gate;
    const start = starting.client.start();
    await gate.entered;
    const printed = starting.slot.forceDelete();
    gate.open();
    await Promise.all([start, printed]);
    expect(starting.types).toEqual(['TaskCreate']);

    const deleting = bench();
    await deleting.running();
    const held = new Gate();
    deleting.container.gates.delete = held;
    deleting.container.end(0);
    await deleting.client.wait();
    const deletion = deleting.client.delete();
    await held.entered;
    await deleting.slot.forceDelete();
    held.open();
    await deletion;
    expect(deleting.types).toEqual(['TaskCreate', 'TaskStart', 'TaskExit']);
  });

  it('is the end of the service: a Create that comes later is refused', async () => {
    const made = bench();
    await made.slot.forceDelete();
    expect(await errorOf(made.client.create())).toBe('Unavailable: container c1 is being deleted');
  });

  it('succeeds when something cannot be released, and the log tells what', async () => {
    const made = bench();
    await made.running();
    made.container.gates.destroy = new Gate();
    made.container.gates.destroy.fail(new Error('EBUSY: rmdir /run/kiln/c/x'));
    expect(DeleteResponse.decode(await made.slot.forceDelete())).toMatchObject({ pid: 4242, exitStatus: 137 });
    expect(made.slot.busy).toBe(false);
    expect(made.log).toMatchObject([{ level: 'error', err: { message: 'EBUSY: rmdir /run/kiln/c/x' } }]);
  });
});

it('what belongs to the conversation is no error in the log, what does not is', async () => {
  const made = bench();
  await errorOf(made.client.state());
  await made.client.create();
  made.container.gates.processes = new Gate();
  made.container.gates.processes.fail(new KilnError('unavailable', 'the connection to the guest was lost'));
  await errorOf(made.client.pids());
  expect(made.log.map(({ level, msg }) => `${level} ${msg}`)).toEqual(['debug State failed', 'error Pids failed']);
});
