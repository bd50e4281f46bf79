import { ProcessDetails } from '../../gen/containerd/runc_details.ts';
import * as api from '../../gen/containerd/task.ts';
import type { Any } from '../../gen/google/protobuf/any.ts';
import { forLog, KilnError } from '../errors.ts';
import type { Logger } from '../observe/logger.ts';
import { parseLimitResources } from '../oci/limits.ts';
import { type CallContext, type ServiceTable, unary } from '../rpc/ttrpc/index.ts';
import type { ExecRequest } from '../sandbox/exec.ts';
import { told } from './answers.ts';
import { createOptionsOf } from './create-options.ts';
import { hostCgroupMode, toMetrics } from './metrics.ts';
import { toTaskStatus, toTimestamp } from './status.ts';
import {
  type EndedProcess,
  type ExecTaskRequest,
  encodeCreate,
  encodeExec,
  type RestoredTask,
  type Task,
  type TaskBefore,
  type TaskContainer,
  type TaskRequest,
  type Tracked,
  track,
} from './task.ts';
import { TaskEvents, type TaskEventsOptions, toDeleteResponse } from './task-events.ts';
import {
  createRequestOf,
  deletedExecsOf,
  execRequestsOf,
  exitRecord,
  lastExitOf,
  type TaskState,
} from './task-record.ts';
import type { TaskEvent } from './topics.ts';

/*
 * containerd's task service (api/runtime/task/v2/shim.proto, and v3 which differs in nothing but the name).
 *
 * One `ctr run` is: Create, Connect, Wait (open until the exit) beside Start, State; on exit State, Delete, Shutdown;
 * then containerd closes the connection and runs the shim binary's `delete`. One `ctr task exec` is: Exec, Wait, Start,
 * and on exit Delete, each with the exec id. For the events see task-events.ts.
 */

/** Exit status that containerd is given for a container whose end nobody saw; what runc's shim answers. */
const killedStatus = 137;

/** What the shim binary's `delete` prints for a container that nobody knows any more. */
export function unknownTaskDeleted(): Uint8Array {
  return toDeleteReply({ pid: 0, exit: { status: killedStatus, at: new Date() } });
}

/** What it prints for one whose end is known. */
export function toDeleteReply(last: Pick<EndedProcess, 'pid' | 'exit'>): Uint8Array {
  return api.DeleteResponse.encode(toDeleteResponse(last)).finish();
}

/** How the type of what Update carries ends: the Go type, below one of two prefixes that differ between versions. */
const resourcesType = 'runtime-spec/1/LinuxResources';

/** Deletes of execs that can be answered once more when their answers got lost with an earlier kilnd. */
const deletedExecsKept = 32;

/** google.protobuf.Empty. */
const Empty = { encode: () => ({ finish: () => new Uint8Array(0) }), decode: () => ({}) };
type Empty = Record<string, never>;

export interface TaskServiceOptions {
  readonly namespace: string;
  /** The only container id this service answers for. */
  readonly id: string;
  readonly createContainer: (request: TaskRequest, signal: AbortSignal) => Promise<TaskContainer>;
  /** Checks and translates an Exec; throws what is wrong with it. */
  readonly prepareExec: (request: ExecTaskRequest) => ExecRequest;
  /** `onSent` is to be called when containerd has the event. */
  readonly publish: (event: TaskEvent, onSent: () => void) => void;
  /** Called with every change that the next kilnd has to know of. */
  readonly save: (state: TaskState) => void;
  readonly logger: Logger;
}

export class TaskService {
  readonly #options: TaskServiceOptions;
  #task: Task | undefined;
  #creating: { abort: AbortController; done: Promise<unknown> } | undefined;
  #lastExit: EndedProcess | undefined;
  /** The execs of the task that is there, or was last, that were deleted last. */
  #deletedExecs: readonly EndedProcess[] = [];
  /** While the task of an earlier kilnd is taken over. */
  #restoring: { readonly request: TaskRequest; readonly before: TaskBefore; readonly done: Promise<void> } | undefined;
  readonly #announcing: TaskEventsOptions;
  /** Of the task that is there, or was last. */
  #events: TaskEvents;
  #closed = false;

  constructor(options: TaskServiceOptions) {
    this.#options = options;
    const { id, logger, publish } = options;
    this.#announcing = { id, logger, publish, onChange: () => this.#save() };
    this.#events = new TaskEvents(this.#announcing);
  }

  /**
   * Takes over what an earlier kilnd has written down. Requests wait for `adopting`, except for State, for which containerd
   * has little patience: until then it is answered from `before`. Never rejects.
   *
   * @param adopting undefined when the task was deleted
   */
  async restore(state: TaskState, before: TaskBefore, adopting: Promise<RestoredTask> | undefined): Promise<void> {
    this.#events = new TaskEvents(this.#announcing, state.announced);
    this.#lastExit = lastExitOf(state);
    this.#deletedExecs = deletedExecsOf(state);
    const request = createRequestOf(state);
    if (adopting === undefined || request === undefined) {
      const init = this.#lastExit === undefined ? [] : [this.#lastExit];
      this.#events.announceDue(state.due, [...this.#deletedExecs, ...init]);
      this.#save();
      return;
    }
    const done = adopting
      .then((task) => this.#takeOver(state, request, task))
      .catch((error: unknown) => {
        this.#options.logger.error({ err: forLog(error) }, 'cannot take the task over');
      })
      .finally(() => {
        this.#restoring = undefined;
      });
    this.#restoring = { request, before, done };
    await done;
  }

  #takeOver(state: TaskState, request: TaskRequest, { container, execs }: RestoredTask): void {
    const task = this.#hold(container, request);
    for (const [execId, exec] of execRequestsOf(state)) {
      const process = execs.get(execId) ?? container.exec(this.#options.prepareExec(exec));
      task.execs.set(execId, track(execId, process, exec, encodeExec(exec)));
    }
    const execProcesses = Array.from(task.execs.values(), ({ execId, process: { pid } }) => ({ execId, pid }));
    const init = { execId: '', pid: container.pid };
    this.#events.announceDue(state.due, [init, ...this.#deletedExecs, ...execProcesses], request);
    for (const tracked of [...task.execs.values(), task.init]) {
      if (state.stdinClosed.includes(tracked.execId)) this.#closeStdin(tracked);
      this.#events.followExit(task, tracked);
    }
  }

  /** A container of Kiln's own command line that has ended: what is still asked of it needs no connection. */
  get isOver(): boolean {
    return this.#task?.ofCommandLine === true && this.#task.container.exit.peek() !== undefined;
  }

  /** True while there is something that must not be lost. */
  get busy(): boolean {
    return this.#task !== undefined || this.#creating !== undefined || this.#restoring !== undefined;
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
    await this.#restoring?.done;
    if (this.#creating !== undefined) {
      this.#creating.abort.abort(new KilnError('canceled', `container ${this.#options.id} was deleted during Create`));
      await this.#creating.done.catch(() => {});
    }
    const task = this.#task;
    if (task !== undefined) {
      this.#events.silence();
      const { container } = task;
      try {
        await container.destroy();
      } catch (error) {
        this.#options.logger.error({ err: forLog(error) }, 'cannot release everything of the container');
      }
      const exit = container.exit.peek() ?? { status: killedStatus, at: new Date() };
      this.#lastExit = { execId: '', pid: container.pid, exit };
      this.#task = undefined;
    }
    return this.#lastExit === undefined ? unknownTaskDeleted() : toDeleteReply(this.#lastExit);
  }

  #told<Request, Response>(
    name: string,
    method: (request: Request, context: CallContext) => Promise<Response>,
  ): (request: Request, context: CallContext) => Promise<Response> {
    const waits = name !== 'State' && name !== 'Connect';
    const before = waits ? () => this.#restoring?.done : undefined;
    return told(name, { logger: this.#options.logger, before }, method.bind(this));
  }

  /** The task's container, if there is one. */
  get container(): TaskContainer | undefined {
    return this.#task?.container;
  }

  /** For what Kiln's own services ask of it. @throws KilnError not-found */
  async containerOf(id: string): Promise<TaskContainer> {
    await this.#restoring?.done;
    return this.#find(id).container;
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

  async #create(request: TaskRequest, { signal, replayed }: CallContext): Promise<api.CreateTaskResponse> {
    const { id } = this.#options;
    if (request.id !== id) {
      throw new KilnError('invalid-argument', `this endpoint serves container ${id}, not ${request.id}`);
    }
    if (this.#closed) throw new KilnError('unavailable', `container ${id} is being deleted`);
    // An earlier kilnd may have got so far, and no further.
    if (replayed && this.#task !== undefined) {
      const { pid } = this.#task.container;
      this.#events.created(request, pid);
      return { pid };
    }
    if (this.busy) throw new KilnError('already-exists', `container ${id} already exists`);
    if (request.checkpoint !== '' || request.parentCheckpoint !== '') {
      throw new KilnError('unimplemented', `container ${id}: restoring from a checkpoint is not supported`);
    }
    const abort = new AbortController();
    const done = this.#make(request, AbortSignal.any([signal, abort.signal]));
    this.#creating = { abort, done };
    this.#lastExit = undefined;
    this.#deletedExecs = [];
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
    const task = this.#hold(container, request);
    this.#events = new TaskEvents(this.#announcing);
    this.#events.created(request, container.pid);
    this.#save();
    this.#events.followExit(task, task.init);
    return task;
  }

  /** From here on the task is there. */
  #hold(container: TaskContainer, request: TaskRequest): Task {
    const task: Task = {
      ofCommandLine: createOptionsOf(request) !== undefined,
      container,
      bundle: request.bundle,
      init: track('', container, request, encodeCreate(request)),
      execs: new Map(),
      oomAnnounced: Promise.resolve(),
    };
    container.oom.listen(() => {
      task.oomAnnounced = this.#announceOom(task);
    });
    this.#task = task;
    return task;
  }

  #save(): void {
    const task = this.#task;
    const execs = [...(task?.execs.values() ?? [])];
    this.#options.save({
      create: task?.init.request,
      execs: Object.fromEntries(execs.map(({ execId, request }) => [execId, request])),
      pids: Object.fromEntries(execs.map(({ execId, process }) => [execId, process.pid])),
      stdinClosed: [task?.init, ...execs].flatMap((tracked) => (tracked?.stdinClosed ? [tracked.execId] : [])),
      announced: this.#events.sent,
      due: this.#events.due,
      ...(this.#lastExit === undefined ? {} : { lastExit: exitRecord(this.#lastExit) }),
      deletedExecs: this.#deletedExecs.map(exitRecord),
    });
  }

  async #start({ id, execId }: api.StartRequest, { replayed }: CallContext): Promise<api.StartResponse> {
    const { tracked } = this.#findProcess(id, execId);
    const { process } = tracked;
    const announced = Promise.withResolvers<void>();
    // Behind an earlier Start that is still under way, if this is a second one.
    tracked.startAnnounced = Promise.all([tracked.startAnnounced, announced.promise]).then(() => {});
    try {
      // An earlier kilnd may have got so far, and no further.
      if (!replayed || process.state.kind === 'created') await process.start();
      this.#events.started(execId, process.pid);
      this.#save();
      return { pid: process.pid };
    } finally {
      announced.resolve();
    }
  }

  async #exec(request: ExecTaskRequest, { replayed }: CallContext): Promise<Empty> {
    const { id, execId } = request;
    const task = this.#find(id);
    if (execId === '') throw new KilnError('invalid-argument', `container ${id}: a process needs an exec id`);
    const bytes = encodeExec(request);
    const known = task.execs.get(execId);
    if (known !== undefined && !(replayed && known.request.equals(bytes))) {
      throw new KilnError('already-exists', `container ${id} has a process ${execId} already`);
    }
    if (known === undefined) this.#addExec(task, request, bytes);
    this.#events.execAdded(execId);
    this.#save();
    return {};
  }

  #addExec(task: Task, request: ExecTaskRequest, bytes: Buffer): void {
    const { execId } = request;
    const process = task.container.exec(this.#options.prepareExec(request));
    const tracked = track(execId, process, request, bytes);
    task.execs.set(execId, tracked);
    this.#deletedExecs = this.#deletedExecs.filter((deleted) => deleted.execId !== execId);
    this.#events.forgetExec(execId);
    this.#events.followExit(task, tracked);
  }

  async #state({ id, execId }: api.StateRequest): Promise<api.StateResponse> {
    if (this.#restoring !== undefined && id === this.#options.id && execId === '') {
      const { request, before } = this.#restoring;
      const { bundle, stdin, stdout, stderr, terminal } = request;
      const stdio = { stdin, stdout, stderr, terminal };
      return { id, bundle, ...before, ...stdio, execId, exitStatus: 0, exitedAt: undefined };
    }
    await this.#restoring?.done;
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

  async #kill({ id, execId, signal, all }: api.KillRequest, { replayed }: CallContext): Promise<Empty> {
    try {
      await this.#findProcess(id, execId).tracked.process.kill(signal, all);
    } catch (error) {
      // The process may have ended by this very signal, when an earlier kilnd sent it.
      if (!(replayed && error instanceof KilnError && error.code === 'not-found')) throw error;
    }
    return {};
  }

  async #resizePty({ id, execId, width, height }: api.ResizePtyRequest): Promise<Empty> {
    await this.#findProcess(id, execId).tracked.process.resize({ width, height });
    return {};
  }

  async #delete({ id, execId }: api.DeleteRequest, { replayed }: CallContext): Promise<api.DeleteResponse> {
    // Done by an earlier kilnd, whose answer got lost.
    const deleted = replayed && id === this.#options.id ? this.#findDeleted(execId) : undefined;
    if (deleted !== undefined) return this.#answerDelete(deleted);
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

  #findDeleted(execId: string): EndedProcess | undefined {
    if (execId === '') return this.#task === undefined ? this.#lastExit : undefined;
    return this.#deletedExecs.find((deleted) => deleted.execId === execId);
  }

  async #remove(task: Task, tracked: Tracked): Promise<api.DeleteResponse> {
    const { process, execId } = tracked;
    const exit = await process.delete();
    await tracked.exitAnnounced;
    const deleted = { execId, pid: process.pid, exit };
    if (execId !== '') {
      task.execs.delete(execId);
      const known = [...this.#deletedExecs, deleted];
      for (const old of known.slice(0, -deletedExecsKept)) this.#events.forgetExec(old.execId);
      this.#deletedExecs = known.slice(-deletedExecsKept);
    } else {
      if (this.#task === task) this.#task = undefined;
      this.#lastExit = deleted;
    }
    return this.#answerDelete(deleted);
  }

  #answerDelete(deleted: EndedProcess): api.DeleteResponse {
    if (deleted.execId === '') this.#events.deleted(deleted);
    this.#save();
    return toDeleteResponse(deleted);
  }

  async #pids({ id }: api.PidsRequest): Promise<api.PidsResponse> {
    const processes = await this.#find(id).container.processes();
    return {
      processes: processes.map(({ pid, execId }) => ({ pid, info: execId === '' ? undefined : details(execId) })),
    };
  }

  #closeStdin(tracked: Tracked): void {
    tracked.stdinClosed = true;
    this.#save();
    tracked.process.closeStdin();
  }

  async #closeIo({ id, execId, stdin }: api.CloseIORequest): Promise<Empty> {
    const { tracked } = this.#findProcess(id, execId);
    if (stdin) this.#closeStdin(tracked);
    return {};
  }

  async #announceOom(task: Task): Promise<void> {
    await task.init.startAnnounced;
    this.#events.oom();
  }

  async #pause({ id }: api.PauseRequest, { replayed }: CallContext): Promise<Empty> {
    const task = this.#find(id);
    // An earlier kilnd may have done it, and no more.
    if (!replayed || task.container.state.kind !== 'paused') await task.container.pause();
    this.#events.paused();
    return {};
  }

  async #resume({ id }: api.ResumeRequest, { replayed }: CallContext): Promise<Empty> {
    const task = this.#find(id);
    if (!replayed || task.container.state.kind === 'paused') await task.container.resume();
    this.#events.resumed();
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
    const known = this.#task?.container.pid ?? this.#restoring?.before.pid ?? 0;
    const taskPid = id === this.#options.id ? known : 0;
    return { shimPid: process.pid, taskPid, version: '' };
  }
}

/** What Pids says of an exec'd process. */
function details(execId: string): Any {
  return {
    typeUrl: 'containerd.runc.v1.ProcessDetails',
    value: Buffer.from(ProcessDetails.encode({ execId }).finish()),
  };
}
