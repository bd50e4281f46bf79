import { readFileSync, rmSync } from 'node:fs';
import { z } from 'zod';
import { CreateTaskRequest, ExecProcessRequest } from '../../gen/containerd/task.ts';
import { KilnError } from '../errors.ts';
import { replaceFile } from '../host/replace-file.ts';
import type { EndedProcess } from './task.ts';

/*
 * What kilnd writes down of a task, so that the next kilnd can answer for it when this one is killed: what containerd has
 * asked for, and what containerd has been told. (What the container is made of stands in sandbox/record.ts.) The file
 * lives from Create until the launcher's `delete`, so it outlives the task: a Delete whose answer got lost is answered
 * from it. It is replaced with every change, complete, by rename(2).
 */

/** Protobuf bytes in base64. */
const encoded = z.base64().transform((text): Buffer => Buffer.from(text, 'base64'));

const exit = z.object({ pid: z.int().nonnegative(), status: z.int().min(0).max(255), atMs: z.number() });

const execExit = z.object({ ...exit.shape, execId: z.string() });

const sandboxState = z.object({ createdAtMs: z.number() });

const taskState = z.object({
  /** The CreateTaskRequest of the task; absent when it is deleted. */
  create: encoded.optional(),
  /** Of what CreateSandbox has made; absent when it is shut down. */
  sandbox: sandboxState.optional(),
  /** The ExecProcessRequests of its execs, by exec id. */
  execs: z.record(z.string(), encoded),
  /** The pid that containerd has for an exec that was started, by exec id. */
  pids: z.record(z.string(), z.int().nonnegative()),
  /** The processes (init: the empty exec id) whose stdin was closed by CloseIO. */
  stdinClosed: z.array(z.string()),
  /** Names of the events that containerd has taken; see announcer.ts. */
  announced: z.array(z.string()),
  /** … and of those that were on their way to it. */
  due: z.array(z.string()).default([]),
  /** Of a task that is deleted. */
  lastExit: exit.optional(),
  /** Of the execs that were deleted last, the latest at the end. */
  deletedExecs: z.array(execExit).default([]),
});

/** What the launcher was started with: as LauncherContext of control/request.ts. */
const launcherContext = z.object({
  namespace: z.string(),
  id: z.string(),
  bundle: z.string(),
  address: z.string(),
  ttrpcAddress: z.string(),
  publishBinary: z.string(),
  debug: z.boolean(),
  maxShimVersion: z.int().nonnegative(),
  launcherStartedNs: z.string().transform(BigInt),
});

const taskRecord = z.object({ version: z.literal(1), context: launcherContext, state: taskState });

export type TaskState = z.output<typeof taskState>;
export type SandboxState = z.output<typeof sandboxState>;
export type TaskRecord = Omit<z.output<typeof taskRecord>, 'version'>;

/** What the task was created with; undefined when it is deleted. */
export function createRequestOf({ create }: TaskState): CreateTaskRequest | undefined {
  return create && CreateTaskRequest.decode(create);
}

/** The state of an endpoint that has never had a task. */
export const noTask: TaskState = {
  execs: {},
  pids: {},
  stdinClosed: [],
  announced: [],
  due: [],
  deletedExecs: [],
};

/** What its execs were asked for with, by exec id. */
export function execRequestsOf({ execs }: TaskState): Map<string, ExecProcessRequest> {
  return new Map(Object.entries(execs).map(([execId, bytes]) => [execId, ExecProcessRequest.decode(bytes)]));
}

/** The task's init, if it is deleted. */
export function lastExitOf({ lastExit }: TaskState): EndedProcess | undefined {
  return lastExit && { execId: '', ...endedOf(lastExit) };
}

/** The execs that were deleted last. */
export function deletedExecsOf({ deletedExecs }: TaskState): EndedProcess[] {
  return deletedExecs.map((deleted) => ({ execId: deleted.execId, ...endedOf(deleted) }));
}

function endedOf({ pid, status, atMs }: z.output<typeof exit>): Pick<EndedProcess, 'pid' | 'exit'> {
  return { pid, exit: { status, at: new Date(atMs) } };
}

/** A deleted process as it is written down. */
export function exitRecord({ execId, pid, exit: { status, at } }: EndedProcess): z.output<typeof execExit> {
  return { execId, pid, status, atMs: at.getTime() };
}

export function writeTaskRecord(file: string, { context, state }: TaskRecord): void {
  const base64 = (bytes: Buffer) => bytes.toString('base64');
  const json = {
    version: 1,
    context: { ...context, launcherStartedNs: String(context.launcherStartedNs) },
    state: {
      ...state,
      create: state.create && base64(state.create),
      execs: Object.fromEntries(Object.entries(state.execs).map(([execId, bytes]) => [execId, base64(bytes)])),
    },
  };
  replaceFile(file, JSON.stringify(json));
}

/** @throws KilnError invalid-argument for a file that is no record, or of another version */
export function readTaskRecord(file: string): TaskRecord {
  try {
    return taskRecord.parse(JSON.parse(readFileSync(file, 'utf8')));
  } catch (cause) {
    throw new KilnError('invalid-argument', `${file} is not a record of a task`, { cause });
  }
}

export function removeTaskRecord(file: string): void {
  rmSync(file, { force: true });
}
