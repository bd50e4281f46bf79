import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { CreateTaskRequest, ExecProcessRequest } from '../../../gen/containerd/task.ts';
import {
  createRequestOf,
  deletedExecsOf,
  execRequestsOf,
  exitRecord,
  lastExitOf,
  noTask,
  readTaskRecord,
  removeTaskRecord,
  type TaskRecord,
  writeTaskRecord,
} from '../../../src/shim/task-record.ts';

let folder: string;
let file: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'kiln-task-'));
  file = join(folder, 'key.json');
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

const create = CreateTaskRequest.fromPartial({
  ...{ id: 'c1', bundle: '/b', stdin: '/f/in', stdout: 'binary:///l?a=b', terminal: true },
  rootfs: [{ type: 'overlay', source: 'overlay', target: '', options: ['lowerdir=/a:/b'] }],
  options: { typeUrl: 'x', value: Buffer.from([0, 255, 128]) },
});
const exec = ExecProcessRequest.fromPartial({
  id: 'c1',
  execId: 'e1',
  spec: { typeUrl: 'y', value: Buffer.from('{}') },
});

const record: TaskRecord = {
  context: {
    ...{ namespace: 'ns', id: 'c1', bundle: '/b', address: '/run/c.sock', ttrpcAddress: '/run/c.ttrpc' },
    ...{ publishBinary: '/bin/containerd', debug: true, maxShimVersion: 3 },
    launcherStartedNs: 1_700_000_000_123_456_789n,
  },
  state: {
    create: Buffer.from(CreateTaskRequest.encode(create).finish()),
    execs: { e1: Buffer.from(ExecProcessRequest.encode(exec).finish()) },
    pids: { e1: 77 },
    stdinClosed: ['e1'],
    announced: ['create', 'start ', 'added e1'],
    due: ['start e1'],
    deletedExecs: [{ execId: 'e0', pid: 76, status: 3, atMs: 1_700_000_000_123 }],
  },
};

describe("a task's record", () => {
  it('is read as it was written, requests and times to the last bit', () => {
    writeTaskRecord(file, record);
    const { context, state } = readTaskRecord(file);
    expect(context).toEqual(record.context);
    expect(state).toEqual(record.state);
    expect(createRequestOf(state)).toEqual(create);
    expect(execRequestsOf(state)).toEqual(new Map([['e1', exec]]));
    const exit = { status: 3, at: new Date(1_700_000_000_123) };
    expect(deletedExecsOf(state)).toEqual([{ execId: 'e0', pid: 76, exit }]);
  });

  it('of a task that is deleted has its last exit, and no request', () => {
    const lastExit = { pid: 4242, status: 137, atMs: 1_700_000_000_123 };
    const deleted = {
      execs: {},
      pids: {},
      stdinClosed: [],
      announced: ['delete'],
      due: [],
      deletedExecs: [],
      lastExit,
    };
    writeTaskRecord(file, { ...record, state: deleted });
    const { state } = readTaskRecord(file);
    expect(state).toEqual(deleted);
    const at = new Date(1_700_000_000_123);
    expect(lastExitOf(state)).toEqual({ execId: '', pid: 4242, exit: { status: 137, at } });
    expect(exitRecord({ execId: '', pid: 4242, exit: { status: 137, at } })).toEqual({ ...lastExit, execId: '' });
    expect(createRequestOf(state)).toBeUndefined();
    expect(execRequestsOf(state).size).toBe(0);
  });

  it('of a sandbox has when it was created, and no task', () => {
    const state = { ...noTask, sandbox: { createdAtMs: 1_700_000_000_123 } };
    writeTaskRecord(file, { ...record, state });
    expect(readTaskRecord(file).state).toEqual(state);
    expect(createRequestOf(readTaskRecord(file).state)).toBeUndefined();
  });

  it('is for root alone, replaced as a whole, and gone when removed, also twice', () => {
    writeTaskRecord(file, record);
    const before = statSync(file);
    writeTaskRecord(file, { ...record, state: { ...record.state, announced: [] } });
    expect(readTaskRecord(file).state.announced).toEqual([]);
    expect(statSync(file).ino).not.toBe(before.ino);
    expect(before.mode & 0o777).toBe(0o600);
    expect(readdirSync(folder)).toEqual(['key.json']);
    removeTaskRecord(file);
    removeTaskRecord(file);
    expect(existsSync(file)).toBe(false);
  });

  it('of a kilnd that did not write down what was on its way, nor deleted execs, is read', () => {
    writeTaskRecord(file, record);
    writeFileSync(file, readFileSync(file, 'utf8').replace(/,"due":.*?\}\]/, ''));
    expect(readTaskRecord(file).state).toEqual({ ...record.state, due: [], deletedExecs: [] });
  });

  it('that a killed kilnd was just writing leaves the one before', () => {
    writeTaskRecord(file, record);
    writeFileSync(`${file}.new`, readFileSync(file).subarray(0, 20));
    expect(readTaskRecord(file).state).toEqual(record.state);
    writeTaskRecord(file, record);
    expect(readdirSync(folder)).toEqual(['key.json']);
  });

  it.each([
    ['nothing', () => ''],
    ['half of one', (text: string) => text.slice(0, text.length / 2)],
    ['another version', (text: string) => text.replace('"version":1', '"version":2')],
    [
      'a status that is none',
      (text: string) => text.replace('"announced"', '"lastExit":{"pid":1,"status":256,"atMs":1},"announced"'),
    ],
    ['a request that is no base64', (text: string) => text.replace(/"create":"./, '"create":"?')],
    ['no launcher', (text: string) => text.replace('"context"', '"kontext"')],
  ])('that is %s is refused, with its path', (_what, change) => {
    writeTaskRecord(file, record);
    writeFileSync(file, change(readFileSync(file, 'utf8')));
    expect(() => readTaskRecord(file)).toThrow(
      expect.objectContaining({ code: 'invalid-argument', message: `${file} is not a record of a task` }),
    );
  });
});
