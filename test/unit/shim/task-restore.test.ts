/** A task service that goes on where an earlier kilnd was killed, and requests that come a second time. */
import { setTimeout as delay } from 'node:timers/promises';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { DeleteResponse } from '../../../gen/containerd/task.ts';
import { Status } from '../../../gen/containerd/task_types.ts';
import { KilnError } from '../../../src/errors.ts';
import type { TaskProcess } from '../../../src/shim/task.ts';
import type { TaskState } from '../../../src/shim/task-record.ts';
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

const before = { pid: 77, status: Status.RUNNING };
const io = { stdin: '/f/in', stdout: '/f/out', stderr: '/f/err', terminal: false };
const exec = { execId: 'e1', stdin: '', stdout: '/f/exec', stderr: '', terminal: false };

const latest = (made: Bench): TaskState => made.saved.at(-1)!;

/** What is written down of a task that runs, with a process e1 beside its init. */
async function killed({ startExec = true, takesEvents = true } = {}): Promise<TaskState> {
  const made = bench();
  made.takesEvents = takesEvents;
  await made.client.create(io);
  await made.client.start();
  await made.client.exec(exec);
  if (startExec) await made.client.start({ execId: 'e1' });
  return latest(made);
}

/** A process that an earlier kilnd has started in the container. */
async function runningExec(made: Bench): Promise<TaskProcess & { end(status: number): void }> {
  const process = made.container.exec({
    ...{ execId: 'e1', directory: '/', process: '{}', terminal: false, terminalSize: undefined },
    openStdio: () => Promise.reject(new Error('not to be called')),
  });
  await process.start();
  return process;
}

/** The next kilnd, which finds the container and the processes as they were left. */
async function restored(state: TaskState) {
  const made = bench();
  made.container.state = { kind: 'running' };
  const process = await runningExec(made);
  await made.slot.restore(
    state,
    before,
    Promise.resolve({ container: made.container, execs: new Map([['e1', process]]) }),
  );
  return { made, process };
}

describe('a task that is taken over', () => {
  it('is as it was, with its processes, and the world hears nothing of it', async () => {
    const { made } = await restored(await killed());
    const common = { id, bundle: '/run/bundle', status: Status.RUNNING, exitStatus: 0, exitedAt: undefined };
    expect(await made.client.state()).toEqual({ ...common, ...io, pid: 4242, execId: '' });
    expect(await made.client.state({ execId: 'e1' })).toEqual({ ...common, ...exec, pid: 100 });
    expect(await made.client.connect()).toMatchObject({ taskPid: 4242 });
    expect(made.slot.busy).toBe(true);
    expect(made.types).toEqual([]);
    expect(await errorOf(made.client.create(io))).toBe('AlreadyExists: container c1 already exists');
  });

  it("tells of the exits that come, each once and the init's last, and of its deletion", async () => {
    const { made, process } = await restored(await killed());
    const waiting = made.client.wait();
    made.container.end(3);
    expect((await waiting).exitStatus).toBe(3);
    expect(made.types).toEqual([]);
    process.end(137);
    expect(await made.client.delete({ execId: 'e1' })).toMatchObject({ pid: 100, exitStatus: 137 });
    expect(await made.client.delete()).toEqual({ pid: 4242, exitStatus: 3, exitedAt });
    expect(made.events.map(({ message }) => (message as { id?: string }).id)).toEqual(['e1', id, '']);
    expect(made.types).toEqual(['TaskExit', 'TaskExit', 'TaskDelete']);
  });

  it('tells of an exit that came while no kilnd was there', async () => {
    const state = await killed();
    const made = bench();
    const process = await runningExec(made);
    process.end(137);
    made.container.state = { kind: 'running' };
    made.container.end(5);
    await made.slot.restore(
      state,
      before,
      Promise.resolve({ container: made.container, execs: new Map([['e1', process]]) }),
    );
    expect((await made.client.state()).status).toBe(Status.STOPPED);
    expect(await made.client.wait()).toEqual({ exitStatus: 5, exitedAt });
    expect(made.events).toEqual([
      { type: 'TaskExit', message: { containerId: id, id: 'e1', pid: 100, exitStatus: 137, exitedAt } },
      { type: 'TaskExit', message: { containerId: id, id, pid: 4242, exitStatus: 5, exitedAt } },
    ]);
  });

  it('tells what was on its way to containerd before what has happened since, each once', async () => {
    const state = await killed({ takesEvents: false });
    expect([state.announced, state.due]).toEqual([[], ['create', 'start ', 'added e1', 'start e1']]);
    const made = bench();
    made.takesEvents = false;
    const process = await runningExec(made);
    process.end(4);
    made.container.state = { kind: 'running' };
    made.container.end(5);
    const adopting = Promise.resolve({ container: made.container, execs: new Map([['e1', process]]) });
    await made.slot.restore(state, before, adopting);
    await made.client.wait();
    const told = ['TaskCreate', 'TaskStart', 'TaskExecAdded', 'TaskExecStarted', 'TaskExit', 'TaskExit'];
    expect(made.types).toEqual(told);
    // Requests that come again, because their answers got lost too, tell nothing more.
    expect(await made.replaying().create(io)).toEqual({ pid: 4242 });
    expect(await made.replaying().start({ execId: 'e1' })).toEqual({ pid: 100 });
    expect(made.types).toEqual(told);
  });

  it('that was deleted is told of if that was on its way', async () => {
    const first = bench();
    await first.running();
    await first.client.kill(9);
    first.takesEvents = false;
    await first.client.delete();
    expect(latest(first).due).toEqual(['delete']);
    const made = bench();
    await made.slot.restore(latest(first), before, undefined);
    expect(made.types).toEqual(['TaskDelete']);
    await vi.waitFor(() =>
      expect(latest(made)).toMatchObject({ due: [], announced: expect.arrayContaining(['delete']) }),
    );
  });

  it('does not tell again of an exit that containerd has heard of', async () => {
    const first = bench();
    await first.running();
    first.container.end(5);
    await first.client.wait();
    await first.client.state();
    expect(first.types.at(-1)).toBe('TaskExit');
    await vi.waitFor(() => expect(latest(first).announced).toContain('exit '));
    const made = bench();
    made.container.state = { kind: 'running' };
    made.container.end(5);
    await made.slot.restore(latest(first), before, Promise.resolve({ container: made.container, execs: new Map() }));
    expect((await made.client.delete()).exitStatus).toBe(5);
    expect(made.types).toEqual(['TaskDelete']);
  });

  it('knows what containerd has taken after a little while, and one write is enough', async () => {
    const made = bench();
    await made.running();
    const written = made.saved.length;
    made.container.end(5);
    await made.client.wait();
    expect([made.types.at(-1), made.saved.length]).toEqual(['TaskExit', written]);
    await vi.waitFor(() => expect(made.saved.length).toBe(written + 1));
    expect(latest(made)).toMatchObject({ due: [], announced: ['create', 'start ', 'exit '] });
    await delay(700);
    expect(made.saved.length).toBe(written + 1);
  });

  it('knows what containerd has taken with the next change, if that comes before, and after the end nothing', async () => {
    const made = bench();
    await made.running();
    made.container.end(5);
    await made.client.delete();
    expect(latest(made)).toMatchObject({ announced: ['create', 'start ', 'exit ', 'delete'] });
    const written = made.saved.length;
    await delay(700);
    expect(made.saved.length).toBe(written);

    const gone = bench();
    await gone.running();
    gone.container.end(5);
    await gone.client.wait();
    const writtenOfGone = gone.saved.length;
    await gone.slot.forceDelete();
    await delay(700);
    expect(gone.saved.length).toBe(writtenOfGone);
  });

  it('has the processes that were registered and not started, which can be', async () => {
    const state = await killed({ startExec: false });
    const made = bench();
    made.container.state = { kind: 'running' };
    await made.slot.restore(state, before, Promise.resolve({ container: made.container, execs: new Map() }));
    expect(await made.client.state({ execId: 'e1' })).toMatchObject({ ...exec, pid: 0, status: Status.CREATED });
    expect(await made.client.start({ execId: 'e1' })).toEqual({ pid: 100 });
    expect(made.types).toEqual(['TaskExecStarted']);
  });

  it('is written down as before, also for the kilnd after the next', async () => {
    const state = await killed();
    const { made, process } = await restored(state);
    // A change: everything is written anew.
    made.container.end(0);
    process.end(0);
    await made.client.delete({ execId: 'e1' });
    const { create, announced } = latest(made);
    expect(create).toEqual(state.create);
    expect(announced).toEqual([...state.announced, 'exit e1', 'exit ']);
    expect(latest(made).execs).toEqual({});
  });

  it('does not know more than the latest of its deleted processes', async () => {
    const made = bench();
    await made.running();
    for (let n = 0; n < 40; n += 1) {
      const execId = `e${n}`;
      await made.client.exec({ ...exec, execId });
      await made.client.start({ execId });
      made.container.execs[n]?.end(0);
      await made.client.delete({ execId });
    }
    const { announced, deletedExecs } = latest(made);
    expect(deletedExecs.map(({ execId }) => execId)).toEqual(Array.from({ length: 32 }, (_, n) => `e${n + 8}`));
    expect(announced.length).toBe(2 + 3 * 32);
    expect(announced.slice(0, 5)).toEqual(['create', 'start ', 'added e8', 'start e8', 'exit e8']);
  });

  it('tells of a deleted process what was on its way', async () => {
    const first = bench();
    await first.running();
    first.takesEvents = false;
    await first.client.exec(exec);
    await first.client.start({ execId: 'e1' });
    first.container.execs[0]?.end(6);
    await first.client.delete({ execId: 'e1' });
    const made = bench();
    made.container.state = { kind: 'running' };
    await made.slot.restore(latest(first), before, Promise.resolve({ container: made.container, execs: new Map() }));
    expect(made.events).toEqual(first.events.slice(2));
    expect(made.types).toEqual(['TaskExecAdded', 'TaskExecStarted', 'TaskExit']);
  });

  it('that was deleted is not there, and its last exit is for the launcher', async () => {
    const first = bench();
    await first.running();
    await first.client.kill(9);
    await first.client.delete();
    expect(latest(first).create).toBeUndefined();
    const made = bench();
    await made.slot.restore(latest(first), before, undefined);
    expect(made.slot.busy).toBe(false);
    expect(await errorOf(made.client.state())).toBe('NotFound: container c1 does not exist');
    expect(await errorOf(made.client.delete())).toBe('NotFound: container c1 does not exist');
    expect(DeleteResponse.decode(await made.slot.forceDelete())).toEqual({ pid: 4242, exitStatus: 137, exitedAt });
    expect(made.types).toEqual([]);
  });

  it('that cannot be is as if it had never been, and the log tells', async () => {
    const made = bench();
    const refused = Promise.reject(new KilnError('internal', 'no'));
    await made.slot.restore(await killed(), before, refused);
    expect(made.slot.busy).toBe(false);
    expect(await errorOf(made.client.state())).toBe('NotFound: container c1 does not exist');
    expect(made.log.filter(({ level }) => level === 'error').map(({ msg }) => msg)).toEqual([
      'cannot take the task over',
    ]);
  });
});

describe('while a task is taken over', () => {
  it('State and Connect are answered from what is written down, and all else waits', async () => {
    const made = bench();
    made.container.state = { kind: 'running' };
    const process = await runningExec(made);
    const gate = new Gate();
    const adopting = gate.pass().then(() => ({ container: made.container, execs: new Map([['e1', process]]) }));
    const restoring = made.slot.restore(await killed(), before, adopting);
    expect(made.slot.busy).toBe(true);
    expect(await made.client.state()).toEqual({
      ...{ id, bundle: '/run/bundle', ...before, ...io, execId: '', exitStatus: 0, exitedAt: undefined },
    });
    expect((await made.client.connect()).taskPid).toBe(77);
    const order: string[] = [];
    const note = (name: string) => (): void => void order.push(name);
    const others = [
      made.client.kill(10, { execId: 'e1' }).then(note('kill')),
      made.client.wait({ execId: 'e1' }).then(note('wait')),
      made.client.state({ execId: 'e1' }).then(note('state of e1')),
    ];
    // A round trip: the others have arrived.
    await made.client.state();
    expect(order).toEqual([]);
    gate.open();
    await Promise.all([restoring, ...others]);
    expect(order.toSorted()).toEqual(['kill', 'state of e1', 'wait']);
    expect((await made.client.connect()).taskPid).toBe(4242);
  });

  it("the launcher's delete waits for it, and ends what was taken over in silence", async () => {
    const made = bench();
    made.container.state = { kind: 'running' };
    const gate = new Gate();
    const adopting = gate.pass().then(() => ({ container: made.container, execs: new Map() }));
    const restoring = made.slot.restore(await killed({ startExec: false }), before, adopting);
    const deleted = made.slot.forceDelete();
    await made.client.state();
    expect(made.container.calls).toEqual([]);
    gate.open();
    await restoring;
    expect(DeleteResponse.decode(await deleted)).toMatchObject({ pid: 4242, exitStatus: 137 });
    expect(made.container.calls).toEqual(['destroy']);
    expect(made.types).toEqual([]);
  });
});

describe('a request that comes a second time', () => {
  it('Create: is answered with the task that is there', async () => {
    const made = bench();
    await made.client.create(io);
    expect(await made.replaying().create(io)).toEqual({ pid: 4242 });
    expect(made.types).toEqual(['TaskCreate']);
    expect(await errorOf(made.client.create(io))).toBe('AlreadyExists: container c1 already exists');
  });

  it('Create: is begun anew where nothing is there', async () => {
    const made = bench();
    expect(await made.replaying().create(io)).toEqual({ pid: 4242 });
    expect(made.types).toEqual(['TaskCreate']);
  });

  it('Start: is answered with the process that runs, and starts one that does not', async () => {
    const made = bench();
    await made.client.create(io);
    expect(await made.replaying().start()).toEqual({ pid: 4242 });
    expect(await made.replaying().start()).toEqual({ pid: 4242 });
    expect(made.container.calls).toEqual(['start']);
    expect(made.types).toEqual(['TaskCreate', 'TaskStart']);
    await made.client.exec(exec);
    expect(await made.replaying().start({ execId: 'e1' })).toEqual({ pid: 100 });
    expect(await made.replaying().start({ execId: 'e1' })).toEqual({ pid: 100 });
    expect(made.container.execs[0]?.calls).toEqual(['start']);
    expect(made.types.slice(2)).toEqual(['TaskExecAdded', 'TaskExecStarted']);
    expect(await errorOf(made.client.start())).toBe('FailedPrecondition: cannot start container c1: it is running');
  });

  it('Start: of a process that has ended since is answered, too, with the start told before the exit', async () => {
    const { made, process } = await restored(await killed({ takesEvents: false }));
    process.end(4);
    expect(await made.replaying().start({ execId: 'e1' })).toEqual({ pid: 100 });
    expect(made.types).toEqual(['TaskCreate', 'TaskStart', 'TaskExecAdded', 'TaskExecStarted', 'TaskExit']);
  });

  it('Exec: is answered when it is the same, and refused when it is another', async () => {
    const made = bench();
    await made.running();
    await made.client.exec(exec);
    expect(await made.replaying().exec(exec)).toEqual({});
    expect(made.container.execs.length).toBe(1);
    expect(made.types.filter((type) => type === 'TaskExecAdded').length).toBe(1);
    const taken = 'AlreadyExists: container c1 has a process e1 already';
    expect(await errorOf(made.replaying().exec({ ...exec, stdout: '/f/other' }))).toBe(taken);
    expect(await errorOf(made.client.exec(exec))).toBe(taken);
  });

  it('Kill: of a process that has ended is done; what else goes wrong is told', async () => {
    const made = bench();
    await made.running();
    expect(await made.client.kill(9)).toEqual({});
    expect(await made.replaying().kill(9)).toEqual({});
    expect(await errorOf(made.client.kill(9))).toBe('NotFound: container c1: process already finished');
    const other = bench();
    await other.running();
    other.container.gates.kill = new Gate();
    other.container.gates.kill.fail(new KilnError('internal', 'EIO'));
    expect(await errorOf(other.replaying().kill(9))).toBe('Internal: EIO');
  });

  it('Delete: is answered with the last exit, and told of once', async () => {
    const made = bench();
    await made.running();
    await made.client.kill(9);
    const answer = await made.client.delete();
    expect(await made.replaying().delete()).toEqual(answer);
    expect(made.types.filter((type) => type === 'TaskDelete').length).toBe(1);
    expect(await errorOf(made.client.delete())).toBe('NotFound: container c1 does not exist');
  });

  it('Delete: of a process is answered with its exit, also by the next kilnd, until its name is used again', async () => {
    const first = bench();
    await first.running();
    await first.client.exec(exec);
    await first.client.start({ execId: 'e1' });
    first.container.execs[0]?.end(6);
    const answer = await first.client.delete({ execId: 'e1' });
    expect(answer).toEqual({ pid: 100, exitStatus: 6, exitedAt });
    expect(await first.replaying().delete({ execId: 'e1' })).toEqual(answer);
    expect(await errorOf(first.client.delete({ execId: 'e1' }))).toBe('NotFound: container c1 has no process e1');
    const made = bench();
    made.container.state = { kind: 'running' };
    await made.slot.restore(latest(first), before, Promise.resolve({ container: made.container, execs: new Map() }));
    expect(await made.replaying().delete({ execId: 'e1' })).toEqual(answer);
    expect(await errorOf(made.replaying().delete({ execId: 'e2' }))).toBe('NotFound: container c1 has no process e2');
    expect(made.types).toEqual([]);
    await made.client.exec(exec);
    expect(made.types).toEqual(['TaskExecAdded']);
    expect(await made.replaying().delete({ execId: 'e1' })).toMatchObject({ pid: 0 });
  });

  it('Delete: to the next kilnd is told of if the earlier one did not get to it', async () => {
    const first = bench();
    await first.running();
    await first.client.kill(9);
    first.takesEvents = false;
    const answer = await first.client.delete();
    const made = bench();
    await made.slot.restore(latest(first), before, undefined);
    expect(await made.replaying().delete()).toEqual(answer);
    expect(made.types).toEqual(['TaskDelete']);
    expect(latest(made).announced).toContain('delete');
  });

  it('Pause and Resume: are answered when they are done already, and done when not', async () => {
    const made = bench();
    await made.running();
    expect(await made.replaying().pause()).toEqual({});
    expect(await made.replaying().pause()).toEqual({});
    expect((await made.client.state()).status).toBe(Status.PAUSED);
    expect(await made.replaying().resume()).toEqual({});
    expect(await made.replaying().resume()).toEqual({});
    expect((await made.client.state()).status).toBe(Status.RUNNING);
    expect(await errorOf(made.client.resume())).toBe('FailedPrecondition: cannot resume container c1: it is running');
  });

  it('is told of to a containerd that has not heard of it yet, in the right order', async () => {
    const first = bench();
    first.takesEvents = false;
    await first.client.create(io);
    await first.client.start();
    expect(latest(first).announced).toEqual([]);
    const made = bench();
    made.container.state = { kind: 'running' };
    await made.slot.restore(latest(first), before, Promise.resolve({ container: made.container, execs: new Map() }));
    const client = made.connect(undefined, 2);
    expect(await client.create(io)).toEqual({ pid: 4242 });
    expect(await client.start()).toEqual({ pid: 4242 });
    expect(made.types).toEqual(['TaskCreate', 'TaskStart']);
    expect(made.container.calls).toEqual([]);
  });
});
