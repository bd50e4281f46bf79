import type { ProcessDetails } from '../guest/process-details.ts';
import type { ContainerStats } from '../guest/stats.ts';
import type { TerminalSize } from '../guest/terms.ts';
import type { Logger } from '../observe/logger.ts';
import type { Timeline } from '../observe/timeline.ts';
import type { LimitResources } from '../oci/limits.ts';
import type { Changes } from './changes.ts';
import { type ContainerFiles, filesOf } from './container-files.ts';
import type { Exec, ExecRequest } from './exec.ts';
import { faultPoint } from './faults.ts';
import type { ContainerHooks, HookPlan } from './hooks.ts';
import type { OomReport } from './oom.ts';
import {
  afterExit,
  type ContainerState,
  type Exit,
  requireDeletable,
  requireExecable,
  requirePausable,
  requireResumable,
  requireSignalable,
  requireStartable,
  requireUpdatable,
} from './process-state.ts';
import { type ContainerRecord, writeContainerRecord } from './record.ts';
import type { ContainerRequest, Resources } from './resources.ts';
import { type SupervisedParts, Supervisor } from './supervisor.ts';
import { updateLimits } from './update.ts';
import { sigkill } from './vm-end.ts';
import type { WaitableCell } from './waitable-cell.ts';

export type { ContainerStats, ProcessDetails };

/** A process of a container by its pid: the init's on the host, the others' in the guest. */
export interface ContainerProcess {
  readonly pid: number;
  /** Of a process that was exec'd; else empty. */
  readonly execId: string;
}

/** What a container is made of, new or taken over. */
export interface ContainerParts extends SupervisedParts, Pick<ContainerRequest, 'resolvConf'> {
  readonly disposal: AsyncDisposableStack;
  readonly hooks: ContainerHooks;
  /** What `hooks` was made of. */
  readonly hookPlan: HookPlan;
  /** What the guest says of it. */
  readonly state: ContainerState;
}

/**
 * A container in a VM of its own or in that of its pod, from when it is there (see create.ts) to when it is released. Here is
 * what may be asked of it in which state; its supervisor follows what runs in it.
 */
export class Container {
  readonly id: string;
  /** The stand-in's pid: what the host knows the container by. */
  readonly pid: number;
  readonly terminal: boolean;
  readonly timeline: Timeline;
  #state: ContainerState;
  readonly #resources: Resources;
  readonly #changes: Changes | undefined;
  readonly #disposal: AsyncDisposableStack;
  readonly #hooks: ContainerHooks;
  readonly #hookPlan: HookPlan;
  readonly #resolvConf: string | undefined;
  readonly #logger: Logger;
  readonly #directory: string;
  readonly #supervisor: Supervisor;
  #starting: Promise<void> = Promise.resolve();
  /** Settled when no change of limits is under way. */
  #updating: Promise<unknown> = Promise.resolve();
  #destruction: Promise<void> | undefined;

  constructor(parts: ContainerParts) {
    const { id, resources, directory, terminal, changes, timeline, logger } = parts;
    this.id = id;
    this.#state = parts.state;
    this.pid = resources.standIn.pid;
    this.terminal = terminal;
    this.timeline = timeline;
    this.#resources = resources;
    this.#changes = changes;
    this.#disposal = parts.disposal;
    this.#logger = logger;
    this.#hooks = parts.hooks;
    this.#hookPlan = parts.hookPlan;
    this.#resolvConf = parts.resolvConf;
    this.#directory = directory;
    // Not all of `parts`, which may have the whole request: the supervisor stays as long as the container.
    const supervised = { id, resources, directory, terminal, changes, timeline, logger };
    this.#supervisor = new Supervisor(supervised, {
      requireExecable: () => requireExecable(this.#name, this.#state),
      starting: () => this.#starting,
      stopped: (exit) => {
        this.#state = afterExit(this.#state, exit);
      },
      save: () => this.#save(),
    });
    if (parts.state.kind !== 'created') this.#supervisor.pipeStdin();
    this.#save();
    this.#supervisor.follow();
  }

  get #name(): string {
    return `container ${this.id}`;
  }

  get state(): ContainerState {
    return this.#state;
  }

  /** Set once, when the init process and all others have ended and their output was delivered. */
  get exit(): WaitableCell<Exit> {
    return this.#supervisor.exit;
  }

  /** Tells of processes killed for want of memory; of all that were, before `exit` is set. */
  get oom(): OomReport {
    return this.#supervisor.oom;
  }

  /** One that an earlier kilnd has started, and that runs in the guest as `pid`. */
  async adoptExec(request: ExecRequest, pid: number): Promise<Exec> {
    return this.#supervisor.execs.adopt(request, pid);
  }

  /** Runs the user's program. When it fails, the program has not run, as far as the guest has told. */
  async start(): Promise<void> {
    requireStartable(this.#name, this.#state);
    const { sandbox, stdio } = this.#resources;
    const started = Promise.withResolvers<void>();
    this.#starting = started.promise;
    this.#state = { kind: 'starting' };
    try {
      // First, because it can fail; until the program reads it, stdin waits in the guest's pipe.
      const stdinEnded = stdio.startStdin() && sandbox.guest.facts.takesEndedStdin;
      if (!stdinEnded) this.#supervisor.pipeStdin();
      await sandbox.startContainer(this.id, stdinEnded, this.#resolvConf);
      faultPoint('container-start');
      this.timeline.mark('started');
      this.#state = { kind: 'running' };
    } catch (error) {
      this.#state = { kind: 'created' };
      throw error;
    } finally {
      started.resolve();
    }
    await this.#hooks.poststart(this.pid, async () => {
      await this.kill(sigkill, true);
      await this.exit.wait();
    });
  }

  /**
   * Sends a signal; `not-found` when there is no process any more. SIGKILL ends the container: by its VM, where the guest
   * does not answer, or answers and does nothing.
   */
  async kill(signal: number, all: boolean): Promise<void> {
    requireSignalable(this.#name, this.#state);
    await this.#supervisor.kill(signal, all);
  }

  /** Registers one more process; it runs when it is started. The caller keeps its exec id unique, and deletes it. */
  exec(request: ExecRequest): Exec {
    requireExecable(this.#name, this.#state);
    return this.#supervisor.execs.add(request);
  }

  /** Writes down what the next kilnd needs, should this one be killed. */
  #save(): void {
    const { tenancy, standIn, rootfs } = this.#resources;
    // It has ended already: then there is nothing to be taken over by that.
    if (standIn.identity === undefined) return;
    const exit = this.exit.peek();
    const record: ContainerRecord = {
      ...{ version: 1, id: this.id, terminal: this.terminal },
      ...tenancy.record(),
      standIn: standIn.identity,
      ...(standIn.callers === true ? { standInIsCallers: true } : {}),
      hooks: this.#hookPlan,
      oomKills: this.oom.kills,
      disks: { lower: rootfs.lower?.file ?? null, writable: rootfs.writable?.file ?? null },
      ...(this.#changes && { changes: this.#changes.plan }),
      resolvConf: this.#resolvConf,
      ...(exit === undefined ? {} : { exit: { status: exit.status, atMs: exit.at.getTime() } }),
    };
    try {
      writeContainerRecord(this.#directory, record);
    } catch (error) {
      this.#logger.error({ err: error }, 'cannot write down the state of the container: it would not outlive kilnd');
    }
  }

  /** The processes of the container. */
  async processes(): Promise<readonly ContainerProcess[]> {
    if (this.#state.kind === 'stopped' || this.#state.kind === 'deleted') return [];
    const processes = await this.#resources.sandbox.guest.processes(this.id);
    // A guest may call them what it likes.
    const known = (execId: string) => (this.#supervisor.execs.has(execId) ? execId : '');
    const others = processes.filter(({ init }) => !init).map(({ pid, execId }) => ({ pid, execId: known(execId) }));
    return [{ pid: this.pid, execId: '' }, ...others];
  }

  /** The same as ps(1) shows them, by their pids in the guest. */
  async processTable(): Promise<readonly ProcessDetails[]> {
    return this.#supervisor.hasExited ? [] : this.#resources.sandbox.guest.processTable(this.id);
  }

  /** Sets the size of the init process's terminal, if it has one. */
  async resize(size: TerminalSize): Promise<void> {
    if (!this.terminal || this.#supervisor.hasExited) return;
    await this.#resources.sandbox.guest.resize({ id: this.id, execId: '' }, size);
  }

  /**
   * Freezes all processes; afterwards what they have written is on the container's disk, and in its snapshot on the host.
   * Where that fails they go on.
   */
  async pause(): Promise<void> {
    requirePausable(this.#name, this.#state);
    const pausing: ContainerState = { kind: 'pausing' };
    let next: ContainerState = { kind: 'running' };
    this.#state = pausing;
    try {
      await this.#resources.sandbox.guest.pauseContainer(this.id);
      await this.#showChanges();
      next = { kind: 'paused' };
    } finally {
      if (this.#state === pausing) this.#state = next;
    }
    // It may have been killed meanwhile.
    if (this.#state !== next) requirePausable(this.#name, this.#state);
  }

  async #showChanges(): Promise<void> {
    try {
      await this.#changes?.paused();
    } catch (error) {
      await this.#resources.sandbox.guest.resumeContainer(this.id);
      throw error;
    }
  }

  async resume(): Promise<void> {
    requireResumable(this.#name, this.#state);
    await this.#changes?.resuming();
    await this.#resources.sandbox.guest.resumeContainer(this.id);
    if (this.state.kind === 'paused') this.#state = { kind: 'running' };
  }

  /** What it uses; of one that has ended, what it had used. */
  stats(): Promise<ContainerStats> {
    return this.#supervisor.stats();
  }

  /** Changes its limits, one update after the other: all that are given, or none. */
  async update(resources: LimitResources): Promise<void> {
    const update = this.#updating.then(() => {
      requireUpdatable(this.#name, this.#state);
      return updateLimits(this.#resources.sandbox, this.id, resources, this.#logger);
    });
    this.#updating = update.catch(() => {});
    return update;
  }

  /** Its files as its processes see them; undefined of one that has ended. */
  get files(): ContainerFiles | undefined {
    if (this.#state.kind === 'stopped' || this.#state.kind === 'deleted') return undefined;
    return filesOf(this.id, this.#resources.sandbox.guest);
  }

  closeStdin(): void {
    this.#resources.stdio.closeStdin();
  }

  /** Removes a container that is not running, with everything that belongs to it, and returns its exit. */
  async delete(): Promise<Exit> {
    requireDeletable(this.#name, this.#state);
    if (this.#state.kind === 'created') await this.#supervisor.discard();
    const exit = await this.exit.wait();
    await this.#supervisor.drain();
    await this.destroy();
    this.#state = { kind: 'deleted', exit };
    return exit;
  }

  /**
   * Releases everything, whatever the state: for containerd's `delete` and for kilnd's end. What the container wrote is
   * on its disk if the guest still answers in time. Safe to call twice.
   */
  destroy(): Promise<void> {
    this.#destruction ??= this.#destroy().catch((error: unknown) => {
      this.#destruction = undefined;
      throw error;
    });
    return this.#destruction;
  }

  async #destroy(): Promise<void> {
    await this.#supervisor.end();
    await this.#disposal.disposeAsync();
    this.timeline.mark('deleted');
    const marks = this.timeline.toJSON().marks.map(({ name, atMs }) => ({ name, at_ms: atMs }));
    this.#logger.info({ marks }, 'timeline');
  }
}
