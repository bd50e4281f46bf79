/** What a new kilnd finds of an earlier one, on a real disk, with real processes. */
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { CreateTaskRequest, ExecProcessRequest } from '../../../gen/containerd/task.ts';
import { Status } from '../../../gen/containerd/task_types.ts';
import { adoptContainer, adoptSandbox } from '../../../src/daemon/adopt.ts';
import type { Installation } from '../../../src/daemon/containers.ts';
import { containerDirectory, knownOf, takeStock, taskFile } from '../../../src/daemon/earlier.ts';
import type { ContainerContext } from '../../../src/daemon/endpoints.ts';
import { type HelperProcess, startHelper } from '../../../src/host/helper-process.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import { Timeline } from '../../../src/observe/timeline.ts';
import { Pods } from '../../../src/sandbox/pod.ts';
import { type AloneRecord, writeContainerRecord } from '../../../src/sandbox/record.ts';
import { noTask, type TaskRecord, type TaskState, writeTaskRecord } from '../../../src/shim/task-record.ts';

interface LogLine {
  readonly level: string;
  readonly msg: string;
}

let stateDir: string;
let log: LogLine[];
let helpers: HelperProcess[];
let released: string[];
const logger = loggerTo({ write: (line) => void log.push(JSON.parse(line) as LogLine) }, 'trace');
const errors = () => log.filter(({ level }) => level === 'error').map(({ msg }) => msg);
beforeEach(() => {
  stateDir = mkdtempSync(join(tmpdir(), 'kiln-earlier-'));
  for (const name of ['t', 'c', 'bundle']) mkdirSync(join(stateDir, name));
  log = [];
  helpers = [];
  released = [];
});
afterEach(async () => {
  for (const helper of helpers) await helper.kill();
  rmSync(stateDir, { recursive: true, force: true });
});

const create = Buffer.from(CreateTaskRequest.encode(CreateTaskRequest.fromPartial({ id: 'c1' })).finish());

function taskRecord(state: Partial<TaskState> = {}, bundle = join(stateDir, 'bundle')): TaskRecord {
  return {
    context: {
      ...{ namespace: 'ns', id: 'c1', bundle, address: '', ttrpcAddress: '', publishBinary: '', debug: false },
      ...{ maxShimVersion: 0, launcherStartedNs: 1n },
    },
    state: { create, execs: {}, pids: {}, stdinClosed: [], announced: [], due: [], deletedExecs: [], ...state },
  };
}

/** The directory of a container, with a process that was started for it. */
function leave(key: string): Promise<HelperProcess> {
  return leaveIn(containerDirectory(stateDir, key));
}

async function leaveIn(directory: string): Promise<HelperProcess> {
  mkdirSync(directory, { recursive: true });
  const what = { program: 'sleep', args: ['1000'], logName: 'log', title: 'sleep', hint: '' };
  const helper = await startHelper({ ...what, directory });
  helpers.push(helper);
  // It has its environment, by which it is found, a moment after it runs.
  await vi.waitFor(() => expect(readFileSync(`/proc/${helper.pid}/environ`, 'utf8')).not.toBe(''), { interval: 1 });
  return helper;
}

describe('the stock that a new kilnd takes', () => {
  it('is nothing in a state folder that is new', async () => {
    for (const name of ['t', 'c']) rmSync(join(stateDir, name), { recursive: true });
    expect((await takeStock(stateDir, logger)).size).toBe(0);
    expect(log).toEqual([]);
  });

  it('are the tasks that containerd still has, whose containers are left alone', async () => {
    writeTaskRecord(taskFile(stateDir, 'aa'), taskRecord());
    const helper = await leave('aa');
    expect(await takeStock(stateDir, logger)).toEqual(new Map([['aa', { version: 1, ...taskRecord() }]]));
    expect(existsSync(containerDirectory(stateDir, 'aa'))).toBe(true);
    expect(existsSync(taskFile(stateDir, 'aa'))).toBe(true);
    process.kill(helper.pid, 0);
    expect(log).toEqual([]);
  });

  it('has nothing of a task whose bundle is gone, which is ended and removed', async () => {
    writeTaskRecord(taskFile(stateDir, 'aa'), taskRecord({}, join(stateDir, 'nowhere')));
    const helper = await leave('aa');
    expect((await takeStock(stateDir, logger)).size).toBe(0);
    expect((await helper.exited).signal).toBe('SIGKILL');
    expect([readdirSync(join(stateDir, 't')), readdirSync(join(stateDir, 'c'))]).toEqual([[], []]);
    expect(log).toMatchObject([{ level: 'warn', killed: [helper.pid], directories: ['aa'] }]);
  });

  it('are the sandboxes, too, but not one that was just being made or is shut down', async () => {
    const state = (sandbox?: TaskState['sandbox']) => ({ ...noTask, ...(sandbox && { sandbox }) });
    writeTaskRecord(taskFile(stateDir, 'aa'), { ...taskRecord(), state: state({ createdAtMs: 1 }) });
    writeTaskRecord(taskFile(stateDir, 'bb'), { ...taskRecord(), state: state() });
    const kept = await leave('aa');
    const left = await leave('bb');
    expect([...(await takeStock(stateDir, logger)).keys()]).toEqual(['aa', 'bb']);
    await left.exited;
    process.kill(kept.pid, 0);
    expect(readdirSync(join(stateDir, 'c'))).toEqual(['aa']);
  });

  it('has nothing of a Create that was under way, beside a task that stays', async () => {
    writeTaskRecord(taskFile(stateDir, 'aa'), taskRecord());
    const kept = await leave('aa');
    const left = await leave('bb');
    mkdirSync(join(containerDirectory(stateDir, 'bb'), 'deep/er'), { recursive: true });
    expect([...(await takeStock(stateDir, logger)).keys()]).toEqual(['aa']);
    await left.exited;
    process.kill(kept.pid, 0);
    expect(readdirSync(join(stateDir, 'c'))).toEqual(['aa']);
    expect(log).toMatchObject([{ level: 'warn', killed: [left.pid], directories: ['bb'] }]);
  });

  it('has nothing of the pool but virtual machines of containers that stay', async () => {
    const [taken, waiting, unnoted] = ['taken', 'waiting', 'unnoted'].map((name) => join(stateDir, 'p', name)) as [
      string,
      string,
      string,
    ];
    writeTaskRecord(taskFile(stateDir, 'aa'), taskRecord());
    const helper = await leave('aa');
    writeContainerRecord(containerDirectory(stateDir, 'aa'), { ...containerRecord(helper), vmDirectory: taken });
    const kept = await leaveIn(taken);
    // One waits, one was taken for a Create that was under way.
    const [idle, lost] = [await leaveIn(waiting), await leaveIn(unnoted)];
    await leave('bb');
    expect([...(await takeStock(stateDir, logger)).keys()]).toEqual(['aa']);
    await Promise.all([idle.exited, lost.exited]);
    process.kill(kept.pid, 0);
    expect(readdirSync(join(stateDir, 'p'))).toEqual(['taken']);
  });

  it('has no record that cannot be read or is half written; the log tells, and the others are there', async () => {
    writeTaskRecord(taskFile(stateDir, 'aa'), taskRecord());
    writeFileSync(taskFile(stateDir, 'bb'), '{"version":1');
    writeFileSync(`${taskFile(stateDir, 'aa')}.new`, '{"ver');
    expect([...(await takeStock(stateDir, logger)).keys()]).toEqual(['aa']);
    expect(readdirSync(join(stateDir, 't'))).toEqual(['aa.json']);
    expect(errors()).toEqual(['cannot read what an earlier kilnd has written down: its task is lost']);
  });

  it('has the record of a task that is deleted, for the answer that got lost', async () => {
    const lastExit = { pid: 7, status: 0, atMs: 1 };
    const state: TaskState = {
      execs: {},
      pids: {},
      stdinClosed: [],
      announced: ['delete'],
      due: [],
      deletedExecs: [],
      lastExit,
    };
    writeTaskRecord(taskFile(stateDir, 'aa'), { ...taskRecord(), state });
    expect((await takeStock(stateDir, logger)).get('aa')?.state).toEqual(state);
  });
});

function containerRecord(standIn: HelperProcess, fields: Partial<AloneRecord> = {}): AloneRecord {
  const script = `: >${join(stateDir, 'poststop-ran')}`;
  return {
    place: 'alone',
    ...{ version: 1, id: 'c1', terminal: false, session: 's', answerLimitMs: 1000, vmm: 'qemu', vm: {} },
    standIn: standIn.identity!,
    hooks: {
      ...{ prestart: [], createRuntime: [], poststart: [], bundle: stateDir, ociVersion: '1.2.1', annotations: {} },
      poststop: [{ name: 'poststop hook', path: '/bin/sh', args: ['sh', '-c', script] }],
    },
    disks: { lower: '/l', writable: null },
    oomKills: 0,
    ...fields,
  };
}

describe('what is known of a container before it is taken over', () => {
  const state = (told: Partial<TaskState>): TaskState => ({ ...noTask, ...told });

  it.each([
    ['that was created', {}, { announced: ['create'], due: ['start e1'] }, Status.CREATED],
    ['that runs', {}, { announced: ['create', 'start '] }, Status.RUNNING],
    ['whose start containerd has not taken', {}, { announced: ['create'], due: ['start '] }, Status.RUNNING],
    ['that has ended', { exit: { status: 1, atMs: 1 } }, { announced: ['start '] }, Status.STOPPED],
  ])('%s', async (_what, fields, told, status) => {
    const helper = await leave('aa');
    writeContainerRecord(containerDirectory(stateDir, 'aa'), containerRecord(helper, fields));
    expect(knownOf(containerDirectory(stateDir, 'aa'), state(told))).toEqual({ pid: helper.pid, status });
  });

  it.each([
    ['was not started', false, Status.CREATED],
    ['was started', true, Status.RUNNING],
  ])('is of a pod that %s what its own record says', async (_what, started, status) => {
    const helper = await leave('aa');
    const { disks: _, ...common } = containerRecord(helper);
    writeContainerRecord(containerDirectory(stateDir, 'aa'), { ...common, place: 'pod', started });
    expect(knownOf(containerDirectory(stateDir, 'aa'), noTask)).toEqual({ pid: helper.pid, status });
  });

  it('is nothing without a record that can be read', async () => {
    await leave('aa');
    const directory = containerDirectory(stateDir, 'aa');
    expect(knownOf(directory, noTask)).toEqual({ pid: 0, status: Status.UNKNOWN });
    writeFileSync(join(directory, 'container.json'), 'x');
    expect(knownOf(directory, noTask)).toEqual({ pid: 0, status: Status.UNKNOWN });
  });
});

describe('a container that cannot be taken over has ended', () => {
  const installation = {
    host: {} as Installation['host'],
    pods: new Pods(),
    load: () => {
      throw new Error('no configuration');
    },
  };
  const exec = (execId: string) =>
    Buffer.from(
      ExecProcessRequest.encode(
        ExecProcessRequest.fromPartial({
          ...{ id: 'c1', execId },
          spec: { typeUrl: 'opencontainers/runtime-spec/1/Process', value: Buffer.from('{"args":["id"],"cwd":"/"}') },
        }),
      ).finish(),
    );

  const context = (): ContainerContext => ({
    ...{ namespace: 'ns', id: 'c1' },
    directory: containerDirectory(stateDir, 'aa'),
    directoryOf: (id) => containerDirectory(stateDir, id),
    timeline: new Timeline(),
    logger,
    holds: { holdFifo: async () => {}, releaseFifo: async (path: string) => void released.push(path) },
  });

  function adopt(state: Partial<TaskState> = {}) {
    return adoptContainer(installation, taskRecord(state).state, context(), new AbortController().signal);
  }

  it('be it a sandbox', async () => {
    const helper = await leave('aa');
    const { disks: _, ...common } = containerRecord(helper);
    writeContainerRecord(containerDirectory(stateDir, 'aa'), { ...common, place: 'pod', started: true });
    const sandbox = await adoptSandbox(installation, context(), new AbortController().signal);
    expect((await sandbox.exit.wait()).status).toBe(255);
    expect(errors()).toEqual(['cannot take the sandbox over: it has ended']);
    await sandbox.stop();
    expect(sandbox.describe()).toEqual({ processStatus: 'stopped' });
    await expect(sandbox.ping()).rejects.toThrow('container c1 has ended');
    await sandbox.destroy();
    expect((await helper.exited).signal).toBe('SIGKILL');
    expect(existsSync(containerDirectory(stateDir, 'aa'))).toBe(false);
  });

  it('be it a sandbox whose end is known', async () => {
    const helper = await leave('aa');
    const { disks: _, ...common } = containerRecord(helper, { exit: { status: 137, atMs: 1_700_000_000_123 } });
    writeContainerRecord(containerDirectory(stateDir, 'aa'), { ...common, place: 'pod', started: true });
    const sandbox = await adoptSandbox(installation, context(), new AbortController().signal);
    expect(await sandbox.exit.wait()).toEqual({ status: 137, at: new Date(1_700_000_000_123) });
    expect(errors()).toEqual([]);
    await sandbox.destroy();
  });

  it('with the exit that was written down, and no error', async () => {
    const helper = await leave('aa');
    const record = containerRecord(helper, { exit: { status: 42, atMs: 1_700_000_000_123 } });
    writeContainerRecord(containerDirectory(stateDir, 'aa'), record);
    const { container, execs } = await adopt({ execs: { e1: exec('e1'), e2: exec('e2') }, pids: { e1: 77, e2: 0 } });
    const exit = { status: 42, at: new Date(1_700_000_000_123) };
    expect([container.id, container.pid]).toEqual(['c1', helper.pid]);
    expect(await container.exit.wait()).toEqual(exit);
    // One that was started ended with it; one that was not has no exit.
    expect([...execs.keys()]).toEqual(['e1']);
    expect(execs.get('e1')?.pid).toBe(77);
    expect(await execs.get('e1')?.exit.wait()).toEqual(exit);
    expect(errors()).toEqual([]);
    await container.delete();
    expect((await helper.exited).signal).toBe('SIGKILL');
    expect(existsSync(containerDirectory(stateDir, 'aa'))).toBe(false);
    expect(existsSync(join(stateDir, 'poststop-ran'))).toBe(true);
  });

  it('with the virtual machine that it had from the pool', async () => {
    const helper = await leave('aa');
    const vmDirectory = join(stateDir, 'p', 'taken');
    const vm = await leaveIn(vmDirectory);
    const exit = { status: 0, atMs: 1_700_000_000_123 };
    writeContainerRecord(containerDirectory(stateDir, 'aa'), containerRecord(helper, { exit, vmDirectory }));
    const { container } = await adopt();
    await container.delete();
    await vm.exited;
    expect(readdirSync(join(stateDir, 'p'))).toEqual([]);
  });

  it('whose loggers see their streams end: the relay lets go of them', async () => {
    const helper = await leave('aa');
    const directory = containerDirectory(stateDir, 'aa');
    writeContainerRecord(directory, containerRecord(helper, { exit: { status: 0, atMs: 1_700_000_000_123 } }));
    mkdirSync(join(directory, 'e1'));
    const fifos = ['logger-stdout', 'logger-stderr', 'e1/logger-stdout'].map((name) => join(directory, name));
    for (const fifo of fifos) writeFileSync(fifo, '');
    const { container } = await adopt({});
    expect(released).toEqual([]);
    await container.delete();
    expect(released.toSorted()).toEqual(fifos.toSorted());
  });

  it('with an exit that nobody saw, and the log tells why', async () => {
    const helper = await leave('aa');
    writeContainerRecord(containerDirectory(stateDir, 'aa'), containerRecord(helper));
    const before = Date.now();
    const { container, execs } = await adopt({ execs: { e1: exec('e1') }, pids: { e1: 77 } });
    const { status, at } = await container.exit.wait();
    expect(status).toBe(255);
    expect(at.getTime()).toBeGreaterThanOrEqual(before);
    expect((await execs.get('e1')?.exit.wait())?.status).toBe(255);
    expect(errors()).toEqual(['cannot take the container over: it has ended']);
    await container.destroy();
    expect((await helper.exited).signal).toBe('SIGKILL');
  });

  it.each([
    ['nothing was written down of it', () => {}],
    ['what was written down cannot be read', (file: string) => writeFileSync(file, '{')],
  ])('where %s', async (_what, write) => {
    const helper = await leave('aa');
    write(join(containerDirectory(stateDir, 'aa'), 'container.json'));
    const { container } = await adopt();
    expect([container.id, container.pid]).toEqual(['c1', 0]);
    expect((await container.exit.wait()).status).toBe(255);
    await container.delete();
    expect((await helper.exited).signal).toBe('SIGKILL');
    expect(existsSync(containerDirectory(stateDir, 'aa'))).toBe(false);
    expect(existsSync(join(stateDir, 'poststop-ran'))).toBe(false);
  });
});
