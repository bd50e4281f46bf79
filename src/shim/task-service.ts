import { ProcessDetails } from '../../gen/containerd/runc_details.ts';
import * as api from '../../gen/containerd/task.ts';
import type { Any } from '../../gen/google/protobuf/any.ts';
import { type ErrorCode, forLog, KilnError } from '../errors.ts';
import type { Logger } from '../observe/logger.ts';
import { type CallContext, type ServiceTable, TtrpcError, unary } from '../rpc/ttrpc/index.ts';
import type { ContainerProcess } from '../sandbox/container.ts';
import type { ExecRequest } from '../sandbox/exec.ts';
import type { Exit, ProcessState } from '../sandbox/process-state.ts';
import type { WaitableCell } from '../sandbox/waitable-cell.ts';
import { toTaskStatus, toTimestamp } from './status.ts';
import type { TaskEvent } from './topics.ts';

/*
 * containerd's task service (api/runtime/task/v2/shim.proto, and v3 which differs in nothing but the name).
 *
 * One `ctr run` is: Create, Connect, Wait (open until the exit) beside Start, State; on exit State, Delete, Shutdown;
 * then containerd closes the connection and runs the shim binary's `delete`. One `ctr task exec` is: Exec, Wait, Start,
 * and on exit Delete, each with the exec id.
 * Events: TaskCreate, TaskStart, TaskExit, TaskDelete, each exactly once and in this order, whatever the timing; for an
 * exec TaskExecAdded, TaskExecStarted, TaskExit (as runc's shim, no TaskDelete). The init's exit comes last.
 */

/** Exit status that containerd is given for a container whose end nobody saw; what runc's shim answers. */
const killedStatus = 137;

/** What containerd asks for with Create. */
export type TaskRequest = api.CreateTaskRequest;

/** What containerd asks for with Exec. */
export type ExecTaskRequest = api.ExecProcessRequest;

/** What the shim binary's `delete` prints for a container that nobody knows any more. */
export function unknownTaskDeleted(): Uint8Array {
  return deleteReply({ pid: 0, exit: { status: killedStatus, at: new Date() } });
}

function deleteReply({ pid, exit }: { pid: number; exit: Exit }): Uint8Array {
  return api.DeleteResponse.encode({ pid, exitStatus: exit.status, exitedAt: toTimestamp(exit.at) }).finish();
}

/** Answers that belong to the conversation, such as a Kill that comes after the exit. */
const ordinary: ReadonlySet<ErrorCode> = new Set(['not-found', 'failed-precondition', 'already-exists', 'canceled']);

/** google.protobuf.Empty. */
const Empty = { encode: () => ({ finish: () => new Uint8Array(0) }), decode: () => ({}) };
type Empty = Record<string, never>;

/** What the task service needs of a process; sandbox/exec.ts has it. */
export interface TaskProcess {
  readonly pid: number;
  readonly state: ProcessState;
  readonly exit: Pick<WaitableCell<Exit>, 'peek' | 'wait'>;
  start(): Promise<void>;
  kill(signal: number, all: boolean): Promise<void>;
  resize(size: { readonly width: number; readonly height: number }): Promise<void>;
  closeStdin(): void;
  delete(): Promise<Exit>;
}

/** What it needs of a container, which is its init process, too; sandbox/container.ts has it. */
export interface TaskContainer extends TaskProcess {
  readonly id: string;
  exec(request: ExecRequest): TaskProcess;
  processes(): Promise<readonly ContainerProcess[]>;
  /** Ends it if need be, and releases everything; safe to call twice. */
  destroy(): Promise<void>;
}

export interface TaskServiceOptions {
  readonly namespace: string;
  /** The only container id this service answers for. */
  readonly id: string;
  readonly createContainer: (request: TaskRequest, signal: AbortSignal) => Promise<TaskContainer>;
  /** Checks and translates an Exec; throws what is wrong with it. */
  readonly prepareExec: (request: ExecTaskRequest) => ExecRequest;
  readonly publish: (event: TaskEvent) => void;
  readonly logger: Logger;
}

/** A process as containerd knows it: the init, or an exec. */
interface Tracked {
  readonly execId: string;
  readonly process: TaskProcess;
  /** What State echoes. */
  readonly stdio: Pick<api.StateResponse, 'stdin' | 'stdout' | 'stderr' | 'terminal'>;
  /** Settled when no start event can come any more, so that TaskExit never overtakes it. */
  startAnnounced: Promise<void>;
  /** Settled when TaskExit is published. Never rejects. */
  exitAnnounced: Promise<void>;
  /** The Delete that is under way. */
  deletion: Promise<api.DeleteResponse> | undefined;
}

interface Task {
  readonly container: TaskContainer;
  readonly bundle: string;
  readonly init: Tracked;
  /** By exec id. */
  readonly execs: Map<string, Tracked>;
  /** Set when containerd has declared the task dead: then containerd itself tells the world. */
  silenced: boolean;
}

export class TaskService {
  readonly #options: TaskServiceOptions;
  #task: Task | undefined;
  #creating: { abort: AbortController; done: Promise<unknown> } | undefined;
  #lastExit: { pid: number; exit: Exit } | undefined;
  #closed = false;

  constructor(options: TaskServiceOptions) {
    this.#options = options;
  }

  /** True while there is something that must not be lost. */
  get busy(): boolean {
    return this.#task !== undefined || this.#creating !== undefined;
  }

  /** The whole service: method name to handler. A method that is not here is answered Unimplemented. */
  table(): ServiceTable {
    const methods = {
      Create: unary(api.CreateTaskRequest, api.CreateTaskResponse, this.#told('Create', this.#create)),
      Start: unary(api.StartRequest, api.StartResponse, this.#told('Start', this.#start)),
      State: unary(api.StateRequest, api.StateResponse, this.#told('State', this.#state)),
      Wait: unary(api.WaitRequest, api.WaitResponse, this.#told('Wait', this.#wait)),
      Kill: unary(api.KillRequest, Empty, this.#told('Kill', this.#kill)),
      Delete: unary(api.DeleteRequest, api.DeleteResponse, this.#told('Delete', this.#delete)),
      Exec: unary(api.ExecProcessRequest, Empty, this.#told('Exec', this.#exec)),
      ResizePty: unary(api.ResizePtyRequest, Empty, this.#told('ResizePty', this.#resizePty)),
      Pids: unary(api.PidsRequest, api.PidsResponse, this.#told('Pids', this.#pids)),
      CloseIO: unary(api.CloseIORequest, Empty, this.#told('CloseIO', this.#closeIo)),
      Connect: unary(api.ConnectRequest, api.ConnectResponse, this.#told('Connect', this.#connect)),
      // One daemon serves the whole host, and an endpoint goes with the binary's `delete`: nothing to do here.
      Shutdown: unary(api.ShutdownRequest, Empty, async () => ({})),
    };
    return { 'containerd.task.v2.Task': methods, 'containerd.task.v3.Task': methods };
  }

  /**
   * For the binary's `delete`: ends whatever is left, says nothing to the world, and returns what the binary prints.
   * There is no Create afterwards. Never rejects: what cannot be released is logged, since nobody would ask again.
   */
  async forceDelete(): Promise<Uint8Array> {
    this.#closed = true;
    if (this.#creating !== undefined) {
      this.#creating.abort.abort(new KilnError('canceled', `container ${this.#options.id} was deleted during Create`));
      await this.#creating.done.catch(() => {});
    }
    const task = this.#task;
    if (task !== undefined) {
      task.silenced = true;
      const { container } = task;
      try {
        await container.destroy();
      } catch (error) {
        this.#options.logger.error({ err: forLog(error) }, 'cannot release everything of the container');
      }
      const exit = container.exit.peek() ?? { status: killedStatus, at: new Date() };
      this.#lastExit = { pid: container.pid, exit };
      this.#task = undefined;
    }
    return this.#lastExit === undefined ? unknownTaskDeleted() : deleteReply(this.#lastExit);
  }

  /** A method whose failures are in our log too: the client may be gone, and keeps only the message anyway. */
  #told<Request, Response>(
    name: string,
    method: (request: Request, context: CallContext) => Promise<Response>,
  ): (request: Request, context: CallContext) => Promise<Response> {
    return async (request, context) => {
      try {
        return await method.call(this, request, context);
      } catch (error) {
        const expected = error instanceof TtrpcError || (error instanceof KilnError && ordinary.has(error.code));
        const level = expected && name !== 'Create' ? 'debug' : 'error';
        this.#options.logger[level]({ err: forLog(error) }, `${name} failed`);
        throw error;
      }
    };
  }

  #find(id: string): Task {
    if (this.#task === undefined || id !== this.#options.id) {
      throw new KilnError('not-found', `container ${id} does not exist`);
    }
    return this.#task;
  }

  #findProcess(id: string, execId: string): { task: Task; tracked: Tracked } {
    const task = this.#find(id);
    const tracked = execId === '' ? task.init : task.execs.get(execId);
    if (tracked === undefined) throw new KilnError('not-found', `container ${id} has no process ${execId}`);
    return { task, tracked };
  }

  async #create(request: TaskRequest, { signal }: CallContext): Promise<api.CreateTaskResponse> {
    const { id } = this.#options;
    if (request.id !== id) {
      throw new KilnError('invalid-argument', `this endpoint serves container ${id}, not ${request.id}`);
    }
    if (this.#closed) throw new KilnError('unavailable', `container ${id} is being deleted`);
    if (this.busy) throw new KilnError('already-exists', `container ${id} already exists`);
    if (request.checkpoint !== '' || request.parentCheckpoint !== '') {
      throw new KilnError('unimplemented', `container ${id}: restoring from a checkpoint is not supported`);
    }
    const abort = new AbortController();
    const done = this.#make(request, AbortSignal.any([signal, abort.signal]));
    this.#creating = { abort, done };
    this.#lastExit = undefined;
    try {
      const { container } = await done;
      return { pid: container.pid };
    } finally {
      this.#creating = undefined;
    }
  }

  /** Makes the container and tells of it. When nobody wants it any more once it is there, it is undone. */
  async #make(request: TaskRequest, signal: AbortSignal): Promise<Task> {
    const container = await this.#options.createContainer(request, signal);
    if (signal.aborted) {
      await container.destroy();
      throw signal.reason;
    }
    const { id, bundle, rootfs, stdin, stdout, stderr, terminal } = request;
    const { pid } = container;
    const io = { stdin, stdout, stderr, terminal };
    this.#options.publish({
      type: 'TaskCreate',
      message: { containerId: id, bundle, rootfs, io, checkpoint: '', pid },
    });
    const task: Task = { container, bundle, init: track('', container, io), execs: new Map(), silenced: false };
    this.#followExit(task, task.init);
    this.#task = task;
    return task;
  }

  #followExit(task: Task, tracked: Tracked): void {
    tracked.exitAnnounced = this.#announceExit(task, tracked).catch((error: unknown) => {
      this.#options.logger.error({ err: error }, 'cannot announce the exit');
    });
  }

  async #announceExit(task: Task, tracked: Tracked): Promise<void> {
    const { process, execId } = tracked;
    const { status, at } = await process.exit.wait();
    await tracked.startAnnounced;
    // A process that was deleted before its start has no events; nor has an exec that containerd never heard start.
    if (execId !== '' && process.pid === 0) return;
    if (tracked === task.init) await allExited(task);
    if (task.silenced) return;
    const { id } = task.container;
    this.#options.publish({
      type: 'TaskExit',
      message: {
        containerId: id,
        id: execId === '' ? id : execId,
        pid: process.pid,
        exitStatus: status,
        exitedAt: toTimestamp(at),
      },
    });
  }

  async #start({ id, execId }: api.StartRequest): Promise<api.StartResponse> {
    const { task, tracked } = this.#findProcess(id, execId);
    const announced = Promise.withResolvers<void>();
    // Behind an earlier Start that is still under way, if this is a second one.
    tracked.startAnnounced = Promise.all([tracked.startAnnounced, announced.promise]).then(() => {});
    try {
      await tracked.process.start();
      const { pid } = tracked.process;
      if (!task.silenced) {
        const started = { containerId: id, pid };
        this.#options.publish(
          execId === ''
            ? { type: 'TaskStart', message: started }
            : { type: 'TaskExecStarted', message: { ...started, execId } },
        );
      }
      return { pid };
    } finally {
      announced.resolve();
    }
  }

  async #exec(request: ExecTaskRequest): Promise<Empty> {
    const { id, execId, stdin, stdout, stderr, terminal } = request;
    const task = this.#find(id);
    if (execId === '') throw new KilnError('invalid-argument', `container ${id}: a process needs an exec id`);
    if (task.execs.has(execId))
      throw new KilnError('already-exists', `container ${id} has a process ${execId} already`);
    const process = task.container.exec(this.#options.prepareExec(request));
    const tracked = track(execId, process, { stdin, stdout, stderr, terminal });
    task.execs.set(execId, tracked);
    this.#options.publish({ type: 'TaskExecAdded', message: { containerId: id, execId } });
    this.#followExit(task, tracked);
    return {};
  }

  async #state({ id, execId }: api.StateRequest): Promise<api.StateResponse> {
    const { task, tracked } = this.#findProcess(id, execId);
    const { process, stdio } = tracked;
    const exit = process.exit.peek();
    return {
      ...{ id, bundle: task.bundle, pid: process.pid, status: toTaskStatus(process.state), ...stdio, execId },
      exitStatus: exit?.status ?? 0,
      exitedAt: exit === undefined ? undefined : toTimestamp(exit.at),
    };
  }

  async #wait({ id, execId }: api.WaitRequest, { signal }: CallContext): Promise<api.WaitResponse> {
    const exit = await this.#findProcess(id, execId).tracked.process.exit.wait(signal);
    return { exitStatus: exit.status, exitedAt: toTimestamp(exit.at) };
  }

  async #kill({ id, execId, signal, all }: api.KillRequest): Promise<Empty> {
    await this.#findProcess(id, execId).tracked.process.kill(signal, all);
    return {};
  }

  async #resizePty({ id, execId, width, height }: api.ResizePtyRequest): Promise<Empty> {
    await this.#findProcess(id, execId).tracked.process.resize({ width, height });
    return {};
  }

  async #delete({ id, execId }: api.DeleteRequest): Promise<api.DeleteResponse> {
    for (;;) {
      const { task, tracked } = this.#findProcess(id, execId);
      if (tracked.deletion === undefined) {
        tracked.deletion = this.#remove(task, tracked).finally(() => {
          tracked.deletion = undefined;
        });
        return tracked.deletion;
      }
      // The second of two at once finds what the first leaves: no process, or one that could not be deleted.
      await tracked.deletion.catch(() => {});
    }
  }

  async #remove(task: Task, tracked: Tracked): Promise<api.DeleteResponse> {
    const { process, execId } = tracked;
    const exit = await process.delete();
    await tracked.exitAnnounced;
    const { pid } = process;
    const reply = { pid, exitStatus: exit.status, exitedAt: toTimestamp(exit.at) };
    if (execId !== '') {
      task.execs.delete(execId);
      return reply;
    }
    if (this.#task === task) this.#task = undefined;
    this.#lastExit = { pid, exit };
    if (!task.silenced) {
      this.#options.publish({ type: 'TaskDelete', message: { containerId: task.container.id, id: '', ...reply } });
    }
    return reply;
  }

  async #pids({ id }: api.PidsRequest): Promise<api.PidsResponse> {
    const processes = await this.#find(id).container.processes();
    return {
      processes: processes.map(({ pid, execId }) => ({ pid, info: execId === '' ? undefined : details(execId) })),
    };
  }

  async #closeIo({ id, execId, stdin }: api.CloseIORequest): Promise<Empty> {
    const { process } = this.#findProcess(id, execId).tracked;
    if (stdin) process.closeStdin();
    return {};
  }

  /** An id that is not ours has no pid, which is what runc's shim answers too. */
  async #connect({ id }: api.ConnectRequest): Promise<api.ConnectResponse> {
    const taskPid = id === this.#options.id ? (this.#task?.container.pid ?? 0) : 0;
    return { shimPid: process.pid, taskPid, version: '' };
  }
}

function track(execId: string, process: TaskProcess, stdio: Tracked['stdio']): Tracked {
  const settled = Promise.resolve();
  return { execId, process, stdio, startAnnounced: settled, exitAnnounced: settled, deletion: undefined };
}

/** Resolves when the exit of each process that runs beside the init is announced. */
async function allExited({ execs }: Task): Promise<void> {
  const started = [...execs.values()].filter(({ process }) => process.pid !== 0);
  await Promise.all(started.map(({ exitAnnounced }) => exitAnnounced));
}

/** What Pids says of an exec'd process. */
function details(execId: string): Any {
  return {
    typeUrl: 'containerd.runc.v1.ProcessDetails',
    value: Buffer.from(ProcessDetails.encode({ execId }).finish()),
  };
}
