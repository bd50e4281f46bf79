import * as api from '../../gen/containerd/task.ts';
import { KilnError } from '../errors.ts';
import type { Logger } from '../observe/logger.ts';
import { type ServiceTable, unary } from '../rpc/ttrpc/index.ts';
import type { Container } from '../sandbox/container.ts';
import type { Exit } from '../sandbox/container-state.ts';
import { toTaskStatus, toTimestamp } from './status.ts';
import type { TaskEvent } from './topics.ts';

/*
 * containerd's task service (api/runtime/task/v2/shim.proto, and v3 which differs in nothing but the name).
 *
 * One `ctr run` is: Create, Connect, Wait (open until the exit) beside Start, State; on exit State, Delete, Shutdown;
 * then containerd closes the connection and runs the shim binary's `delete`.
 * Events: TaskCreate, TaskStart, TaskExit, TaskDelete, each exactly once and in this order, whatever the timing.
 */

/** Exit status that containerd is given for a container whose end nobody saw; what runc's shim answers. */
const killedStatus = 137;

/** What containerd asks for with Create. */
export type TaskRequest = api.CreateTaskRequest;

/** What the shim binary's `delete` prints for a container that nobody knows any more. */
export function unknownTaskDeleted(): Uint8Array {
  return deleteReply({ pid: 0, exit: { status: killedStatus, at: new Date() } });
}

function deleteReply({ pid, exit }: { pid: number; exit: Exit }): Uint8Array {
  return api.DeleteResponse.encode({ pid, exitStatus: exit.status, exitedAt: toTimestamp(exit.at) }).finish();
}

/** google.protobuf.Empty. */
const Empty = { encode: () => ({ finish: () => new Uint8Array(0) }), decode: () => ({}) };
type Empty = Record<string, never>;

export interface TaskServiceOptions {
  readonly namespace: string;
  /** The only container id this service answers for. */
  readonly id: string;
  readonly createContainer: (request: TaskRequest, signal: AbortSignal) => Promise<Container>;
  readonly publish: (event: TaskEvent) => void;
  readonly logger: Logger;
}

interface Task {
  readonly container: Container;
  readonly request: api.CreateTaskRequest;
  /** Settled when no TaskStart can come any more, so that TaskExit never overtakes it. */
  startAnnounced: Promise<void>;
  exitAnnounced: Promise<void>;
  /** Set when containerd has declared the task dead: then containerd itself tells the world. */
  silenced: boolean;
  deleting: boolean;
}

export class TaskService {
  readonly #options: TaskServiceOptions;
  #task: Task | undefined;
  #creating: { abort: AbortController; done: Promise<unknown> } | undefined;
  #lastExit: { pid: number; exit: Exit } | undefined;

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
      Create: unary(api.CreateTaskRequest, api.CreateTaskResponse, (r, { signal }) => this.#create(r, signal)),
      Start: unary(api.StartRequest, api.StartResponse, (r) => this.#start(r)),
      State: unary(api.StateRequest, api.StateResponse, (r) => this.#state(r)),
      Wait: unary(api.WaitRequest, api.WaitResponse, (r) => this.#wait(r)),
      Kill: unary(api.KillRequest, Empty, (r) => this.#kill(r)),
      Delete: unary(api.DeleteRequest, api.DeleteResponse, (r) => this.#delete(r)),
      Pids: unary(api.PidsRequest, api.PidsResponse, (r) => this.#pids(r)),
      CloseIO: unary(api.CloseIORequest, Empty, (r) => this.#closeIo(r)),
      Connect: unary(api.ConnectRequest, api.ConnectResponse, () => this.#connect()),
      // One daemon serves the whole host, and an endpoint goes with the binary's `delete`: nothing to do here.
      Shutdown: unary(api.ShutdownRequest, Empty, async () => ({})),
    };
    return { 'containerd.task.v2.Task': methods, 'containerd.task.v3.Task': methods };
  }

  /** For the binary's `delete`: ends whatever is left, says nothing to the world, and returns what the binary prints. */
  async forceDelete(): Promise<Uint8Array> {
    if (this.#creating !== undefined) {
      this.#creating.abort.abort(new KilnError('canceled', `container ${this.#options.id} was deleted during Create`));
      await this.#creating.done.catch(() => {});
    }
    const task = this.#task;
    if (task !== undefined) {
      task.silenced = true;
      await task.container.destroy();
      this.#lastExit = { pid: task.container.pid, exit: await task.container.exit.wait() };
      this.#task = undefined;
    }
    return this.#lastExit === undefined ? unknownTaskDeleted() : deleteReply(this.#lastExit);
  }

  #find(id: string, execId = ''): Task {
    if (this.#task === undefined || id !== this.#options.id) {
      throw new KilnError('not-found', `container ${id} does not exist`);
    }
    if (execId !== '') throw new KilnError('not-found', `container ${id} has no process ${execId}`);
    return this.#task;
  }

  async #create(request: api.CreateTaskRequest, signal: AbortSignal): Promise<api.CreateTaskResponse> {
    const { id } = this.#options;
    if (request.id !== id) {
      throw new KilnError('invalid-argument', `this endpoint serves container ${id}, not ${request.id}`);
    }
    if (this.busy) throw new KilnError('already-exists', `container ${id} already exists`);
    if (request.checkpoint !== '' || request.parentCheckpoint !== '') {
      throw new KilnError('unimplemented', `container ${id}: restoring from a checkpoint is not supported`);
    }
    const abort = new AbortController();
    const done = this.#options.createContainer(request, AbortSignal.any([signal, abort.signal]));
    this.#creating = { abort, done };
    let container: Container;
    try {
      container = await done;
    } catch (error) {
      this.#options.logger.error({ err: error }, 'create failed');
      throw error;
    } finally {
      this.#creating = undefined;
    }
    const { bundle, rootfs, stdin, stdout, stderr, terminal } = request;
    const { pid } = container;
    const io = { stdin, stdout, stderr, terminal };
    this.#options.publish({
      type: 'TaskCreate',
      message: { containerId: id, bundle, rootfs, io, checkpoint: '', pid },
    });
    const task = {
      container,
      request,
      startAnnounced: Promise.resolve(),
      exitAnnounced: Promise.resolve(),
      silenced: false,
      deleting: false,
    };
    task.exitAnnounced = this.#announceExit(task);
    this.#task = task;
    return { pid };
  }

  async #announceExit(task: Task): Promise<void> {
    const { container } = task;
    const { status, at } = await container.exit.wait();
    await task.startAnnounced;
    if (task.silenced) return;
    const { id, pid } = container;
    this.#options.publish({
      type: 'TaskExit',
      message: { containerId: id, id, pid, exitStatus: status, exitedAt: toTimestamp(at) },
    });
  }

  async #start({ id, execId }: api.StartRequest): Promise<api.StartResponse> {
    const task = this.#find(id, execId);
    const announced = Promise.withResolvers<void>();
    task.startAnnounced = announced.promise;
    try {
      await task.container.start();
      const { pid } = task.container;
      this.#options.publish({ type: 'TaskStart', message: { containerId: id, pid } });
      return { pid };
    } finally {
      announced.resolve();
    }
  }

  async #state({ id, execId }: api.StateRequest): Promise<api.StateResponse> {
    const { container, request } = this.#find(id, execId);
    const exit = container.exit.peek();
    const { bundle, stdin, stdout, stderr, terminal } = request;
    return {
      ...{ id, bundle, pid: container.pid, status: toTaskStatus(container.state) },
      ...{ stdin, stdout, stderr, terminal, execId: '' },
      exitStatus: exit?.status ?? 0,
      exitedAt: exit === undefined ? undefined : toTimestamp(exit.at),
    };
  }

  async #wait({ id, execId }: api.WaitRequest): Promise<api.WaitResponse> {
    const exit = await this.#find(id, execId).container.exit.wait();
    return { exitStatus: exit.status, exitedAt: toTimestamp(exit.at) };
  }

  async #kill({ id, execId, signal, all }: api.KillRequest): Promise<Empty> {
    await this.#find(id, execId).container.kill(signal, all);
    return {};
  }

  async #delete({ id, execId }: api.DeleteRequest): Promise<api.DeleteResponse> {
    const task = this.#find(id, execId);
    if (task.deleting) throw new KilnError('failed-precondition', `container ${id} is being deleted already`);
    task.deleting = true;
    try {
      const exit = await task.container.delete();
      const { pid } = task.container;
      await task.exitAnnounced;
      this.#lastExit = { pid, exit };
      this.#task = undefined;
      const reply = { pid, exitStatus: exit.status, exitedAt: toTimestamp(exit.at) };
      this.#options.publish({ type: 'TaskDelete', message: { containerId: id, id: '', ...reply } });
      return reply;
    } finally {
      task.deleting = false;
    }
  }

  async #pids({ id }: api.PidsRequest): Promise<api.PidsResponse> {
    const pids = await this.#find(id).container.processes();
    return { processes: pids.map((pid) => ({ pid, info: undefined })) };
  }

  async #closeIo({ id, execId, stdin }: api.CloseIORequest): Promise<Empty> {
    const { container } = this.#find(id, execId);
    if (stdin) container.closeStdin();
    return {};
  }

  async #connect(): Promise<api.ConnectResponse> {
    return { shimPid: process.pid, taskPid: this.#task?.container.pid ?? 0, version: '' };
  }
}
