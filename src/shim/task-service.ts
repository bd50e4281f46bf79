import * as api from '../../gen/containerd/task.ts';
import { type ErrorCode, forLog, KilnError } from '../errors.ts';
import type { Logger } from '../observe/logger.ts';
import { type LimitResources, parseLimitResources } from '../oci/limits.ts';
import { type CallContext, type ServiceTable, TtrpcError, unary } from '../rpc/ttrpc/index.ts';
import type { ContainerStats } from '../sandbox/container.ts';
import type { ContainerState, Exit } from '../sandbox/container-state.ts';
import type { OomReport } from '../sandbox/oom.ts';
import type { WaitableCell } from '../sandbox/waitable-cell.ts';
import { hostCgroupMode, toMetrics } from './metrics.ts';
import { toTaskStatus, toTimestamp } from './status.ts';
import type { TaskEvent } from './topics.ts';

/*
 * containerd's task service (api/runtime/task/v2/shim.proto, and v3 which differs in nothing but the name).
 *
 * One `ctr run` is: Create, Connect, Wait (open until the exit) beside Start, State; on exit State, Delete, Shutdown;
 * then containerd closes the connection and runs the shim binary's `delete`.
 * Events: TaskCreate, TaskStart, TaskExit, TaskDelete, each exactly once and in this order, whatever the timing.
 * TaskOOM, TaskPaused and TaskResumed come between TaskStart and TaskExit.
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

/** How the type of what Update carries ends: the Go type, below one of two prefixes that differ between versions. */
const resourcesType = 'runtime-spec/1/LinuxResources';

/** Answers that belong to the conversation, such as a Kill that comes after the exit. */
const ordinary: ReadonlySet<ErrorCode> = new Set(['not-found', 'failed-precondition', 'already-exists', 'canceled']);

/** google.protobuf.Empty. */
const Empty = { encode: () => ({ finish: () => new Uint8Array(0) }), decode: () => ({}) };
type Empty = Record<string, never>;

/** What the task service needs of a container; sandbox/container.ts has it. */
export interface TaskContainer {
  readonly id: string;
  readonly pid: number;
  readonly state: ContainerState;
  readonly exit: Pick<WaitableCell<Exit>, 'peek' | 'wait'>;
  readonly oom: Pick<OomReport, 'listen'>;
  start(): Promise<void>;
  kill(signal: number, all: boolean): Promise<void>;
  processes(): Promise<readonly number[]>;
  closeStdin(): void;
  pause(): Promise<void>;
  resume(): Promise<void>;
  stats(): Promise<ContainerStats>;
  update(resources: LimitResources): Promise<void>;
  delete(): Promise<Exit>;
  /** Ends it if need be, and releases everything; safe to call twice. */
  destroy(): Promise<void>;
}

export interface TaskServiceOptions {
  readonly namespace: string;
  /** The only container id this service answers for. */
  readonly id: string;
  readonly createContainer: (request: TaskRequest, signal: AbortSignal) => Promise<TaskContainer>;
  readonly publish: (event: TaskEvent) => void;
  readonly logger: Logger;
}

interface Task {
  readonly container: TaskContainer;
  readonly request: api.CreateTaskRequest;
  /** Settled when no TaskStart can come any more, so that TaskExit never overtakes it. */
  startAnnounced: Promise<void>;
  exitAnnounced: Promise<void>;
  /** Settled when every TaskOOM that is due has been sent, which TaskExit does not overtake either. */
  oomAnnounced: Promise<void>;
  /** Set when containerd has declared the task dead: then containerd itself tells the world. */
  silenced: boolean;
  /** The Delete that is under way. */
  deletion: Promise<api.DeleteResponse> | undefined;
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
      Pids: unary(api.PidsRequest, api.PidsResponse, this.#told('Pids', this.#pids)),
      CloseIO: unary(api.CloseIORequest, Empty, this.#told('CloseIO', this.#closeIo)),
      Pause: unary(api.PauseRequest, Empty, this.#told('Pause', this.#pause)),
      Resume: unary(api.ResumeRequest, Empty, this.#told('Resume', this.#resume)),
      Stats: unary(api.StatsRequest, api.StatsResponse, this.#told('Stats', this.#stats)),
      Update: unary(api.UpdateTaskRequest, Empty, this.#told('Update', this.#update)),
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

  #find(id: string, execId = ''): Task {
    if (this.#task === undefined || id !== this.#options.id) {
      throw new KilnError('not-found', `container ${id} does not exist`);
    }
    if (execId !== '') throw new KilnError('not-found', `container ${id} has no process ${execId}`);
    return this.#task;
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
    const task: Task = {
      container,
      request,
      startAnnounced: Promise.resolve(),
      exitAnnounced: Promise.resolve(),
      oomAnnounced: Promise.resolve(),
      silenced: false,
      deletion: undefined,
    };
    task.exitAnnounced = this.#announceExit(task).catch((error: unknown) => {
      this.#options.logger.error({ err: error }, 'cannot announce the exit');
    });
    container.oom.listen(() => {
      task.oomAnnounced = this.#announceOom(task);
    });
    this.#task = task;
    return task;
  }

  async #announceExit(task: Task): Promise<void> {
    const { container } = task;
    const { status, at } = await container.exit.wait();
    await task.startAnnounced;
    await task.oomAnnounced;
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
    // Behind an earlier Start that is still under way, if this is a second one.
    task.startAnnounced = Promise.all([task.startAnnounced, announced.promise]).then(() => {});
    try {
      await task.container.start();
      const { pid } = task.container;
      if (!task.silenced) this.#options.publish({ type: 'TaskStart', message: { containerId: id, pid } });
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

  async #wait({ id, execId }: api.WaitRequest, { signal }: CallContext): Promise<api.WaitResponse> {
    const exit = await this.#find(id, execId).container.exit.wait(signal);
    return { exitStatus: exit.status, exitedAt: toTimestamp(exit.at) };
  }

  async #kill({ id, execId, signal, all }: api.KillRequest): Promise<Empty> {
    await this.#find(id, execId).container.kill(signal, all);
    return {};
  }

  async #delete({ id, execId }: api.DeleteRequest): Promise<api.DeleteResponse> {
    for (;;) {
      const task = this.#find(id, execId);
      if (task.deletion === undefined) {
        task.deletion = this.#remove(task).finally(() => {
          task.deletion = undefined;
        });
        return task.deletion;
      }
      // The second of two at once finds what the first leaves: no task, or one that could not be deleted.
      await task.deletion.catch(() => {});
    }
  }

  async #remove(task: Task): Promise<api.DeleteResponse> {
    const { id, pid } = task.container;
    const exit = await task.container.delete();
    await task.exitAnnounced;
    const reply = { pid, exitStatus: exit.status, exitedAt: toTimestamp(exit.at) };
    if (this.#task === task) this.#task = undefined;
    this.#lastExit = { pid, exit };
    if (!task.silenced) {
      this.#options.publish({ type: 'TaskDelete', message: { containerId: id, id: '', ...reply } });
    }
    return reply;
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

  async #announceOom(task: Task): Promise<void> {
    await task.startAnnounced;
    if (!task.silenced) this.#options.publish({ type: 'TaskOOM', message: { containerId: task.container.id } });
  }

  async #pause({ id }: api.PauseRequest): Promise<Empty> {
    const task = this.#find(id);
    await task.container.pause();
    if (!task.silenced) this.#options.publish({ type: 'TaskPaused', message: { containerId: id } });
    return {};
  }

  async #resume({ id }: api.ResumeRequest): Promise<Empty> {
    const task = this.#find(id);
    await task.container.resume();
    if (!task.silenced) this.#options.publish({ type: 'TaskResumed', message: { containerId: id } });
    return {};
  }

  async #stats({ id }: api.StatsRequest): Promise<api.StatsResponse> {
    return { stats: toMetrics(await this.#find(id).container.stats(), hostCgroupMode()) };
  }

  async #update({ id, resources }: api.UpdateTaskRequest): Promise<Empty> {
    const { container } = this.#find(id);
    if (!resources?.typeUrl.endsWith(resourcesType)) {
      throw new KilnError(
        'invalid-argument',
        `container ${id}: cannot update resources of type "${resources?.typeUrl ?? ''}", only ${resourcesType}`,
      );
    }
    await container.update(parseLimitResources(resources.value.toString()));
    return {};
  }

  /** An id that is not ours has no pid, which is what runc's shim answers too. */
  async #connect({ id }: api.ConnectRequest): Promise<api.ConnectResponse> {
    const taskPid = id === this.#options.id ? (this.#task?.container.pid ?? 0) : 0;
    return { shimPid: process.pid, taskPid, version: '' };
  }
}
