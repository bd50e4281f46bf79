import type { Logger } from '../observe/logger.ts';
import type { Exit } from '../sandbox/process-state.ts';
import { Announcer, type AnnouncerOptions } from './announcer.ts';
import { toDeleteResponse } from './delete-reply.ts';
import { toTimestamp } from './status.ts';
import { allExited, type EndedProcess, type Task, type TaskRequest, type Tracked } from './task.ts';
import type { TaskState } from './task-record.ts';
import type { TaskEvent } from './topics.ts';

/*
 * TaskCreate, TaskStart, TaskExit, TaskDelete come each exactly once and in this order, whatever the timing; for an exec
 * TaskExecAdded, TaskExecStarted, TaskExit (as runc's shim, no TaskDelete). The init's exit comes last. TaskOOM, TaskPaused
 * and TaskResumed come between TaskStart and TaskExit.
 */

export interface TaskEventsOptions extends AnnouncerOptions {
  /** The container's. */
  readonly id: string;
  readonly logger: Logger;
}

/** A process that is there, or one that is deleted, with its exit. */
type KnownProcess = Pick<EndedProcess, 'execId' | 'pid'> & { readonly exit?: Exit };

/** Names of the events that come once, as they are written down. */
const names = {
  create: 'create',
  delete: 'delete',
  added: (execId: string) => `added ${execId}`,
  start: (execId: string) => `start ${execId}`,
  exit: (execId: string) => `exit ${execId}`,
} as const;

/** Whether the start of a task that is written down was told of, or is to be. */
export function isStarted({ announced, due }: Pick<TaskState, 'announced' | 'due'>): boolean {
  const start = names.start('');
  return announced.includes(start) || due.includes(start);
}

/** What containerd is told of one task. */
export class TaskEvents {
  readonly #id: string;
  readonly #logger: Logger;
  readonly #publish: TaskEventsOptions['publish'];
  readonly #announcer: Announcer;
  #silent = false;

  /** @param sent what an earlier kilnd has written down of `sent` */
  constructor(options: TaskEventsOptions, sent?: readonly string[]) {
    this.#id = options.id;
    this.#logger = options.logger;
    this.#publish = options.publish;
    this.#announcer = new Announcer(options, sent);
  }

  /** The names of the events that containerd has. */
  get sent(): string[] {
    return this.#announcer.sent;
  }

  /** The names of the events that are published, and that containerd has not taken yet. */
  get due(): string[] {
    return this.#announcer.due;
  }

  /** When containerd has declared the task dead: then containerd itself tells the world. */
  silence(): void {
    this.#silent = true;
  }

  created({ bundle, rootfs, stdin, stdout, stderr, terminal }: TaskRequest, pid: number): void {
    const io = { stdin, stdout, stderr, terminal };
    const message = { containerId: this.#id, bundle, rootfs, io, checkpoint: '', pid };
    this.#once(names.create, { type: 'TaskCreate', message });
  }

  execAdded(execId: string): void {
    this.#once(names.added(execId), { type: 'TaskExecAdded', message: { containerId: this.#id, execId } });
  }

  /** @param execId empty for the init */
  started(execId: string, pid: number): void {
    const message = { containerId: this.#id, pid };
    const event: TaskEvent =
      execId === '' ? { type: 'TaskStart', message } : { type: 'TaskExecStarted', message: { ...message, execId } };
    this.#once(names.start(execId), event);
  }

  /** Tells of the process's exit when it comes, and when all is told that comes before. */
  followExit(task: Task, tracked: Tracked): void {
    tracked.exitAnnounced = this.#exited(task, tracked).catch((error: unknown) => {
      this.#logger.error({ err: error }, 'cannot announce the exit');
    });
  }

  async #exited(task: Task, tracked: Tracked): Promise<void> {
    const { process, execId } = tracked;
    const exit = await process.exit.wait();
    await tracked.startAnnounced;
    // A process that was deleted before its start has no events; nor has an exec that containerd never heard start.
    if (execId !== '' && process.pid === 0) return;
    if (tracked === task.init) await Promise.all([allExited(task), task.oomAnnounced]);
    this.exited({ execId, pid: process.pid, exit });
  }

  exited({ execId, pid, exit }: EndedProcess): void {
    const { status, at } = exit;
    const id = execId || this.#id;
    const message = { containerId: this.#id, id, pid, exitStatus: status, exitedAt: toTimestamp(at) };
    this.#once(names.exit(execId), { type: 'TaskExit', message });
  }

  deleted(last: EndedProcess): void {
    const message = { containerId: this.#id, id: '', ...toDeleteResponse(last) };
    this.#once(names.delete, { type: 'TaskDelete', message });
  }

  oom(): void {
    this.#tell({ type: 'TaskOOM', message: { containerId: this.#id } });
  }

  paused(): void {
    this.#tell({ type: 'TaskPaused', message: { containerId: this.#id } });
  }

  resumed(): void {
    this.#tell({ type: 'TaskResumed', message: { containerId: this.#id } });
  }

  /** The exec id may be another process's from here on. */
  forgetExec(execId: string): void {
    this.#announcer.forget(names.added(execId), names.start(execId), names.exit(execId));
  }

  /**
   * Tells what an earlier kilnd has published and containerd not taken, in order.
   *
   * @param due what the earlier one has written down of `due`
   * @param processes the init and the execs, each after the one before; with their exits if they are deleted
   * @param request of a task that is there
   */
  announceDue(due: readonly string[], processes: readonly KnownProcess[], request?: TaskRequest): void {
    const isDue = new Set(due);
    const init = processes.find(({ execId }) => execId === '');
    if (request !== undefined && init !== undefined && isDue.has(names.create)) this.created(request, init.pid);
    for (const { execId, pid, exit } of processes) {
      if (isDue.has(names.added(execId))) this.execAdded(execId);
      if (isDue.has(names.start(execId))) this.started(execId, pid);
      if (exit !== undefined && isDue.has(names.exit(execId))) this.exited({ execId, pid, exit });
    }
    if (init?.exit !== undefined && isDue.has(names.delete)) this.deleted({ ...init, exit: init.exit });
  }

  /** An event that may come any number of times. */
  #tell(event: TaskEvent): void {
    if (!this.#silent) this.#publish(event, () => {});
  }

  #once(name: string, event: TaskEvent): void {
    if (!this.#silent) this.#announcer.announce(name, event);
  }
}
