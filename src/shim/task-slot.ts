import { forLog, KilnError } from '../errors.ts';
import type { Logger } from '../observe/logger.ts';
import type { CallContext } from '../rpc/ttrpc/index.ts';
import type { ExecRequest } from '../sandbox/exec.ts';
import { createOptionsOf } from './create-options.ts';
import { killedStatus, toDeleteReply, unknownTaskDeleted } from './delete-reply.ts';
import { noteOom } from './oom-file.ts';
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
import { TaskEvents, type TaskEventsOptions } from './task-events.ts';
import {
  createRequestOf,
  deletedExecsOf,
  execRequestsOf,
  exitRecord,
  lastExitOf,
  type TaskState,
} from './task-record.ts';
import type { TaskEvent } from './topics.ts';

/** Deletes of execs that can be answered once more when their answers got lost with an earlier kilnd. */
const deletedExecsKept = 32;

/**
 * How long what containerd has taken may go without being written down, in ms. Most often the next change comes before;
 * if kilnd is killed before, the event comes twice.
 */
const takenUnsavedMs = 500;

export interface TaskSlotOptions {
  readonly namespace: string;
  /** The only container id there can be. */
  readonly id: string;
  readonly createContainer: (request: TaskRequest, signal: AbortSignal) => Promise<TaskContainer>;
  /** Checks and translates an Exec; throws what is wrong with it. */
  readonly prepareExec: (request: ExecTaskRequest) => ExecRequest;
  /** `onSent` is to be called when containerd has the event. */
  readonly publish: (event: TaskEvent, onSent: () => void) => void;
  /** Called with every change that the next kilnd has to know of; a little late when it is an event that was taken. */
  readonly save: (state: TaskState) => void;
  readonly logger: Logger;
}

/** What is there while the task of an earlier kilnd is taken over. */
export interface Restoring {
  readonly request: TaskRequest;
  readonly before: TaskBefore;
  readonly done: Promise<void>;
}

/** The place for the one task of an endpoint: how it comes to be there and goes, and what the next kilnd has to know of it. */
export class TaskSlot {
  readonly #options: TaskSlotOptions;
  #task: Task | undefined;
  #creating: { abort: AbortController; done: Promise<unknown> } | undefined;
  #lastExit: EndedProcess | undefined;
  /** The execs of the task that is there, or was last, that were deleted last. */
  #deletedExecs: readonly EndedProcess[] = [];
  /** While the task of an earlier kilnd is taken over. */
  #restoring: Restoring | undefined;
  readonly #announcing: TaskEventsOptions;
  #saveDue: NodeJS.Timeout | undefined;
  #events: TaskEvents;
  #closed = false;

  constructor(options: TaskSlotOptions) {
    this.#options = options;
    const { id, logger, publish } = options;
    this.#announcing = { id, logger, publish, onChange: () => this.#saveSoon() };
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
      this.save();
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
      if (state.stdinClosed.includes(tracked.execId)) this.closeStdin(tracked);
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

  /**
   * For the binary's `delete`: ends whatever is left, says nothing to the world, and returns what the binary prints.
   * There is no Create afterwards. Never rejects: what cannot be released is logged, since nobody would ask again.
   */
  async forceDelete(): Promise<Uint8Array> {
    this.#closed = true;
    clearTimeout(this.#saveDue);
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

  get id(): string {
    return this.#options.id;
  }

  /** What containerd is told of the task that is there, or was last. */
  get events(): TaskEvents {
    return this.#events;
  }

  get restoring(): Restoring | undefined {
    return this.#restoring;
  }

  /** The task's container, if there is one. */
  get container(): TaskContainer | undefined {
    return this.#task?.container;
  }

  /** For what Kiln's own services ask of it. @throws KilnError not-found */
  async containerOf(id: string): Promise<TaskContainer> {
    await this.#restoring?.done;
    return this.find(id).container;
  }

  /** @throws KilnError not-found */
  find(id: string): Task {
    if (this.#task === undefined || id !== this.#options.id) {
      throw new KilnError('not-found', `container ${id} does not exist`);
    }
    return this.#task;
  }

  /** @param execId empty for the init. @throws KilnError not-found */
  findProcess(id: string, execId: string): { task: Task; tracked: Tracked } {
    const task = this.find(id);
    const tracked = execId === '' ? task.init : task.execs.get(execId);
    if (tracked === undefined) throw new KilnError('not-found', `container ${id} has no process ${execId}`);
    return { task, tracked };
  }

  /**
   * Makes the task, and tells of it.
   *
   * @returns its pid
   * @throws KilnError already-exists, and what the making throws; unavailable after `forceDelete`
   */
  async create(request: TaskRequest, { signal, replayed }: Pick<CallContext, 'signal' | 'replayed'>): Promise<number> {
    const { id } = this.#options;
    if (request.id !== id) {
      throw new KilnError('invalid-argument', `this endpoint serves container ${id}, not ${request.id}`);
    }
    if (this.#closed) throw new KilnError('unavailable', `container ${id} is being deleted`);
    // An earlier kilnd may have got so far, and no further.
    if (replayed && this.#task !== undefined) {
      const { pid } = this.#task.container;
      this.#events.created(request, pid);
      return pid;
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
      return container.pid;
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
    this.save();
    this.#events.followExit(task, task.init);
    return task;
  }

  /** From here on the task is there. */
  #hold(container: TaskContainer, request: TaskRequest): Task {
    const ours = createOptionsOf(request);
    const task: Task = {
      ofCommandLine: ours !== undefined,
      container,
      bundle: request.bundle,
      init: track('', container, request, encodeCreate(request)),
      execs: new Map(),
      oomAnnounced: Promise.resolve(),
    };
    container.oom.listen(() => {
      if (ours !== undefined && ours.oomFile !== '') noteOom(ours.oomFile, this.#options.logger);
      task.oomAnnounced = this.#announceOom(task);
    });
    this.#task = task;
    return task;
  }

  /** With the next change, or a little later. Never after `forceDelete`: the place in the state folder may be another's. */
  #saveSoon(): void {
    if (this.#closed) return;
    this.#saveDue ??= setTimeout(() => this.save(), takenUnsavedMs).unref();
  }

  /** Writes down what the next kilnd has to know. */
  save(): void {
    clearTimeout(this.#saveDue);
    this.#saveDue = undefined;
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

  /**
   * Registers one more process, which is started later.
   *
   * @param replayed the request may have come before, to an earlier kilnd
   * @throws KilnError already-exists, and what is wrong with the request
   */
  addExec(request: ExecTaskRequest, replayed: boolean): void {
    const { id, execId } = request;
    const task = this.find(id);
    if (execId === '') throw new KilnError('invalid-argument', `container ${id}: a process needs an exec id`);
    const bytes = encodeExec(request);
    const known = task.execs.get(execId);
    if (known !== undefined && !(replayed && known.request.equals(bytes))) {
      throw new KilnError('already-exists', `container ${id} has a process ${execId} already`);
    }
    if (known === undefined) this.#trackExec(task, request, bytes);
    this.#events.execAdded(execId);
    this.save();
  }

  #trackExec(task: Task, request: ExecTaskRequest, bytes: Buffer): void {
    const { execId } = request;
    const process = task.container.exec(this.#options.prepareExec(request));
    const tracked = track(execId, process, request, bytes);
    task.execs.set(execId, tracked);
    this.#deletedExecs = this.#deletedExecs.filter((deleted) => deleted.execId !== execId);
    this.#events.forgetExec(execId);
    this.#events.followExit(task, tracked);
  }

  /**
   * Forgets a process that has ended, and tells of it.
   *
   * @param replayed the request may have come before, to an earlier kilnd
   * @throws KilnError not-found, and what the process's own delete throws
   */
  async delete(id: string, execId: string, replayed: boolean): Promise<EndedProcess> {
    // Done by an earlier kilnd, whose answer got lost.
    const deleted = replayed && id === this.id ? this.#findDeleted(execId) : undefined;
    if (deleted !== undefined) {
      this.#tellDeleted(deleted);
      return deleted;
    }
    for (;;) {
      const { task, tracked } = this.findProcess(id, execId);
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

  async #remove(task: Task, tracked: Tracked): Promise<EndedProcess> {
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
    this.#tellDeleted(deleted);
    return deleted;
  }

  #tellDeleted(deleted: EndedProcess): void {
    if (deleted.execId === '') this.#events.deleted(deleted);
    this.save();
  }

  /** The process's stdin ends, also for a later kilnd. */
  closeStdin(tracked: Tracked): void {
    tracked.stdinClosed = true;
    this.save();
    tracked.process.closeStdin();
  }

  async #announceOom(task: Task): Promise<void> {
    await task.init.startAnnounced;
    this.#events.oom();
  }
}
