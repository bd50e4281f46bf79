import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { forLog, KilnError } from '../errors.ts';
import type { ProcessDetails } from '../guest/process-details.ts';
import type { ContainerStats } from '../guest/stats.ts';
import type { ProcessRef, TerminalSize } from '../guest/terms.ts';
import type { GuestExit } from '../guest/wait.ts';
import type { Logger } from '../observe/logger.ts';
import type { Timeline } from '../observe/timeline.ts';
import type { LimitResources } from '../oci/limits.ts';
import type { Changes } from './changes.ts';
import { type ContainerFiles, filesOf } from './container-files.ts';
import type { Exec, ExecRequest } from './exec.ts';
import { Execs } from './execs.ts';
import { faultPoint } from './faults.ts';
import type { ContainerHooks, HookPlan } from './hooks.ts';
import { deleteDrainMs, destroyGraceMs, killLimitMs, outputGraceMs } from './limits.ts';
import { OccupiedVm } from './occupied-vm.ts';
import { OomReport } from './oom.ts';
import { Positions } from './positions.ts';
import { ProcessIo } from './process-io.ts';
import {
  afterExit,
  alreadyFinished,
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
import { updateLimits } from './update.ts';
import { sigkill } from './vm-end.ts';
import { WaitableCell } from './waitable-cell.ts';

export type { ContainerStats, ProcessDetails };

/** A process of a container by its pid: the init's on the host, the others' in the guest. */
export interface ContainerProcess {
  readonly pid: number;
  /** Of a process that was exec'd; else empty. */
  readonly execId: string;
}

/** What a container is made of, new or taken over. */
export interface ContainerParts
  extends Pick<ContainerRequest, 'id' | 'directory' | 'terminal' | 'resolvConf' | 'timeline' | 'logger'> {
  readonly resources: Resources;
  /** Absent where nothing of what it writes comes to the host. */
  readonly changes?: Changes | undefined;
  readonly disposal: AsyncDisposableStack;
  readonly hooks: ContainerHooks;
  /** What `hooks` was made of. */
  readonly hookPlan: HookPlan;
  /** What the guest says of it. */
  readonly state: ContainerState;
}

/** A container in a VM of its own or in that of its pod, from when it is there (see create.ts) to when it is released. */
export class Container {
  readonly id: string;
  /** The stand-in's pid: what the host knows the container by. */
  readonly pid: number;
  readonly terminal: boolean;
  /** Set once, when the init process and all others have ended and their output was delivered. */
  readonly exit = new WaitableCell<Exit>();
  readonly timeline: Timeline;
  /** Tells of processes killed for want of memory; of all that were, before `exit` is set. */
  readonly oom = new OomReport({ onTold: () => this.#save() });
  #state: ContainerState;
  readonly #resources: Resources;
  readonly #changes: Changes | undefined;
  readonly #disposal: AsyncDisposableStack;
  readonly #hooks: ContainerHooks;
  readonly #hookPlan: HookPlan;
  readonly #resolvConf: string | undefined;
  readonly #logger: Logger;
  readonly #directory: string;
  readonly #io: ProcessIo;
  readonly #execs: Execs;
  readonly #vm: OccupiedVm;
  #starting: Promise<void> = Promise.resolve();
  /** The init process has ended; its output may still be on its way. */
  #exited = false;
  /** What it had used when its init process ended. */
  #finalStats: ContainerStats | undefined;
  /** Settled when no change of limits is under way. */
  #updating: Promise<unknown> = Promise.resolve();
  /** Set when we end the container ourselves, so that its VM's end is nothing to report. */
  #destruction: Promise<void> | undefined;
  /** Settled when output, guest and VM are done with; set before `exit`. Never rejects. */
  #woundUp: Promise<void> | undefined;

  constructor(parts: ContainerParts) {
    const { id, resources, directory, terminal } = parts;
    this.id = id;
    this.#state = parts.state;
    this.pid = resources.standIn.pid;
    this.terminal = terminal;
    this.timeline = parts.timeline;
    this.#resources = resources;
    this.#changes = parts.changes;
    this.#disposal = parts.disposal;
    this.#logger = parts.logger;
    this.#hooks = parts.hooks;
    this.#hookPlan = parts.hookPlan;
    this.#resolvConf = parts.resolvConf;
    this.#directory = directory;
    this.#io = new ProcessIo({
      guest: resources.sandbox.guest,
      process: this.#init,
      stdio: resources.stdio,
      terminal,
      positions: new Positions(path.join(directory, 'positions')),
      report: this.#report,
    });
    if (parts.state.kind !== 'created') this.#io.pipeStdin();
    this.#vm = new OccupiedVm(resources, {
      logger: parts.logger,
      report: this.#report,
      endIsWanted: () => this.#destruction !== undefined,
    });
    this.#execs = new Execs({
      id,
      guest: resources.sandbox.guest,
      requireExecable: () => requireExecable(this.#name, this.#state),
      lostStatus: () => this.#vm.lostStatus(),
      report: this.#report,
    });
    this.#save();
    resources.tenancy.enter({ id, pid: this.pid, quit: () => this.#endInGuest() });
    void this.#supervise();
    void this.#followStandIn();
  }

  get #init(): ProcessRef {
    return { id: this.id, execId: '' };
  }

  get #name(): string {
    return `container ${this.id}`;
  }

  get state(): ContainerState {
    return this.#state;
  }

  /** One that an earlier kilnd has started, and that runs in the guest as `pid`. */
  async adoptExec(request: ExecRequest, pid: number): Promise<Exec> {
    return this.#execs.adopt(request, pid);
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
      if (!stdinEnded) this.#io.pipeStdin();
      await sandbox.startContainer(this.id, stdinEnded, this.#resolvConf);
      faultPoint('container-start');
      this.timeline.mark('started');
      this.#state = { kind: 'running' };
      this.#save();
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
    try {
      await this.#resources.sandbox.guest.signal(this.#init, signal, all);
      if (signal === sigkill) this.#limitEnd();
    } catch (error) {
      const code = error instanceof KilnError ? error.code : undefined;
      if (code === 'deadline-exceeded' && signal === sigkill) {
        await this.#killByVm(error);
        return;
      }
      // The VM has ended, or will have in a moment.
      if (code === 'unavailable') {
        void this.#vm.lostStatus(error);
        await this.exit.wait();
      }
      // The guest knows of the end already, while we still deliver the output.
      else if (code !== 'failed-precondition' && code !== 'not-found') throw error;
      throw alreadyFinished(this.#name);
    }
  }

  /** After a SIGKILL that the guest has taken. */
  #limitEnd(): void {
    const timer = setTimeout(() => {
      if (this.#exited) return;
      const limit = `the guest did not end container ${this.id} within ${killLimitMs / 1000} s of SIGKILL`;
      void this.#killByVm(new KilnError('deadline-exceeded', limit));
    }, killLimitMs);
    timer.unref();
    void this.exit.wait().then(() => clearTimeout(timer));
  }

  /** SIGKILL for a guest that does not do it. */
  async #killByVm(cause: unknown): Promise<void> {
    this.#report(cause, 'cannot kill the container, so its VM is ended');
    await this.#vm.end();
    await this.exit.wait();
  }

  /** Registers one more process; it runs when it is started. The caller keeps its exec id unique, and deletes it. */
  exec(request: ExecRequest): Exec {
    requireExecable(this.#name, this.#state);
    return this.#execs.add(request);
  }

  /** Writes down what the next kilnd needs, should this one be killed. */
  #save(): void {
    const { tenancy, standIn, rootfs } = this.#resources;
    // It has ended already: then there is nothing to be taken over by that.
    if (standIn.identity === undefined) return;
    const exit = this.exit.peek();
    const record: ContainerRecord = {
      ...{ version: 1, id: this.id, terminal: this.terminal },
      started: this.#state.kind !== 'created' && this.#state.kind !== 'starting',
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
    const known = (execId: string) => (this.#execs.has(execId) ? execId : '');
    const others = processes.filter(({ init }) => !init).map(({ pid, execId }) => ({ pid, execId: known(execId) }));
    return [{ pid: this.pid, execId: '' }, ...others];
  }

  /** The same as ps(1) shows them, by their pids in the guest. */
  async processTable(): Promise<readonly ProcessDetails[]> {
    return this.#exited ? [] : this.#resources.sandbox.guest.processTable(this.id);
  }

  /** Sets the size of the init process's terminal, if it has one. */
  async resize(size: TerminalSize): Promise<void> {
    if (!this.terminal || this.#exited) return;
    await this.#resources.sandbox.guest.resize(this.#init, size);
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
  async stats(): Promise<ContainerStats> {
    if (this.#finalStats !== undefined) return this.#finalStats;
    if (this.#exited) throw new KilnError('not-found', `container ${this.id} has ended, and nobody knows what it used`);
    return this.#resources.sandbox.guest.stats(this.id);
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
    if (this.#state.kind === 'created') await this.#discard();
    const exit = await this.exit.wait();
    await Promise.race([this.#woundUp, delay(deleteDrainMs, undefined, { ref: false })]);
    await this.#windUp();
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
    const ended = this.#endInGuest().catch((error: unknown) => this.#report(error, 'cannot end the container'));
    // For the sake of a pod's other containers a little more.
    const graceMs = this.#resources.tenancy.shared ? killLimitMs : destroyGraceMs;
    await Promise.race([ended, delay(graceMs, undefined, { ref: false })]);
    if (this.exit.peek() === undefined || !this.#resources.tenancy.shared) await this.#vm.end();
    await this.exit.wait();
    await this.#windUp();
    await this.#disposal.disposeAsync();
    this.timeline.mark('deleted');
    const marks = this.timeline.toJSON().marks.map(({ name, atMs }) => ({ name, at_ms: atMs }));
    this.#logger.info({ marks }, 'timeline');
  }

  async #endInGuest(): Promise<void> {
    if (!this.#exited) await this.#resources.sandbox.guest.signal(this.#init, sigkill, true);
    await this.exit.wait();
    await this.#windUp();
  }

  /** Ends a container whose program has not run. */
  async #discard(): Promise<void> {
    try {
      await this.kill(sigkill, true);
    } catch (error) {
      if (error instanceof KilnError && error.code === 'not-found') return;
      // There is nothing in it yet that would be lost.
      this.#report(error, 'cannot kill the container, so its VM is ended');
      await this.#vm.end();
    }
  }

  /** After the exit: what is left of the output is dropped; resolves when its filesystems are flushed and its VM gone. */
  async #windUp(): Promise<void> {
    await Promise.all([this.#io.dispose(), this.#execs.release()]);
    await this.#woundUp;
  }

  /** Follows the init process to its end. Never rejects. */
  async #supervise(): Promise<void> {
    const { standIn } = this.#resources;
    const { status, written, stats } = await this.#awaitExit();
    const vmLives = !this.#vm.isLost;
    this.#exited = true;
    this.timeline.mark('exited');
    const exit: Exit = { status, at: new Date() };
    const counted = vmLives ? this.#countAtExit(stats) : undefined;
    const inTime = delay(outputGraceMs, undefined, { ref: false });
    await Promise.all([this.#io.settled(written), Promise.race([counted, inTime])]);
    this.oom.close();
    await this.#starting;
    // No process outlives the init, whose end has killed the others.
    await this.#execs.ended();
    // Whoever hears of the end may look at once.
    if (vmLives) await this.#changes?.ended();
    // The stand-in lives exactly as long as the task: `kill -0` on its pid must fail once the exit is known, and not before.
    await standIn.kill();
    this.#state = afterExit(this.#state, exit);
    const removed = Promise.all([this.#io.drained, this.#execs.drained()]).then(() =>
      vmLives ? this.#vm.removeContainer(this.id) : undefined,
    );
    this.#woundUp = removed.then(() => this.#vm.leave());
    this.exit.set(exit);
    this.#save();
  }

  /** The container's last numbers, told with its exit or asked for while its control group is still there. Never rejects. */
  async #countAtExit(told: ContainerStats | undefined): Promise<void> {
    try {
      this.#finalStats = told ?? (await this.#resources.sandbox.guest.stats(this.id));
      this.oom.count(Number(this.#finalStats.memory.events.oom_kill ?? 0n));
    } catch (error) {
      this.#report(error, 'the guest does not tell what the container has used');
    }
  }

  /** Who ends the stand-in, which is all that the host sees of the container, means the container. */
  async #followStandIn(): Promise<void> {
    await this.#resources.standIn.exited;
    if (this.#exited || this.#destruction !== undefined) return;
    this.#logger.warn({ pid: this.pid }, 'the process that stands for the container was ended: killing the container');
    await this.kill(sigkill, true).catch((error: unknown) => this.#report(error, 'cannot kill the container'));
  }

  async #awaitExit(): Promise<GuestExit> {
    try {
      return await this.#resources.sandbox.guest.waitExit(this.#init, (kills) => this.oom.count(kills));
    } catch (error) {
      return { status: await this.#vm.lostStatus(error), written: { stdout: undefined, stderr: undefined } };
    }
  }

  /** For what nobody awaits. That the connection is gone says nothing new: the VM has ended. */
  readonly #report = (error: unknown, message: string): void => {
    const gone = error instanceof KilnError && (error.code === 'unavailable' || error.code === 'not-found');
    this.#logger[gone ? 'debug' : 'warn']({ err: forLog(error) }, message);
  };
}
