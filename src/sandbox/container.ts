import { mkdir, rm } from 'node:fs/promises';
import { setTimeout as delay } from 'node:timers/promises';
import { forLog, KilnError } from '../errors.ts';
import type { ContainerStats } from '../guest/stats.ts';
import type { Logger } from '../observe/logger.ts';
import type { Timeline } from '../observe/timeline.ts';
import type { LimitResources } from '../oci/limits.ts';
import { guestMounts } from '../rootfs/index.ts';
import {
  afterExit,
  alreadyFinished,
  type ContainerState,
  type Exit,
  requireDeletable,
  requirePausable,
  requireResumable,
  requireSignalable,
  requireStartable,
  requireUpdatable,
} from './container-state.ts';
import { faultPoint } from './faults.ts';
import { deleteDrainMs, destroyGraceMs, outputGraceMs } from './limits.ts';
import { assertNoInterfaces } from './network-check.ts';
import { OomReport } from './oom.ts';
import { acquire, type ContainerRequest, type HostServices, type Resources } from './resources.ts';
import { updateLimits } from './update.ts';
import { WaitableCell } from './waitable-cell.ts';

export type { ContainerStats };

/** Signal numbers, as in signal(7). */
const sigkill = 9;

/** Exit status of a container whose VM was killed from outside, and of one whose VM failed. */
const vmKilledStatus = 128 + sigkill;
const unknownStatus = 255;

/**
 * A container in a VM of its own.
 *
 * `create` acquires everything side by side, since the VM's boot dwarfs the rest: directory, stdio, stand-in, VM and
 * root filesystem. Whatever step fails, all that was acquired is released before the error reaches the caller.
 */
export class Container {
  readonly id: string;
  /** The stand-in's pid: what the host knows the container by. */
  readonly pid: number;
  /** Set once, when the init process has ended and its output was delivered. */
  readonly exit = new WaitableCell<Exit>();
  readonly timeline: Timeline;
  /** Tells of processes killed for want of memory; of all that were, before `exit` is set. */
  readonly oom = new OomReport();
  #state: ContainerState = { kind: 'created' };
  readonly #resources: Resources;
  readonly #disposal: AsyncDisposableStack;
  readonly #logger: Logger;
  readonly #outputs: Promise<unknown>;
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

  private constructor(id: string, resources: Resources, disposal: AsyncDisposableStack, request: ContainerRequest) {
    this.id = id;
    this.pid = resources.standIn.pid;
    this.timeline = request.timeline;
    this.#resources = resources;
    this.#disposal = disposal;
    this.#logger = request.logger;
    this.#outputs = this.#relayStdio();
    void this.#watchOom();
    void this.#supervise();
    void this.#followStandIn();
  }

  get state(): ContainerState {
    return this.#state;
  }

  static async create(host: HostServices, request: ContainerRequest, signal: AbortSignal): Promise<Container> {
    const { id, directory, timeline } = request;
    await using stack = new AsyncDisposableStack();
    // One that could not be removed with an earlier container of this id.
    await rm(directory, { recursive: true, force: true });
    await mkdir(directory, { mode: 0o700 });
    stack.defer(() => rm(directory, { recursive: true, force: true }));
    faultPoint('sandbox-directory');
    const resources = await acquire(host, request, signal, stack);
    const { sandbox, rootfs, stdio } = resources;
    const lower = await sandbox.attachDisk(rootfs.lower, signal);
    const writable = rootfs.writable === null ? undefined : await sandbox.attachDisk(rootfs.writable, signal);
    timeline.mark('rootfs-attached');
    faultPoint('attach-disk');
    const container = {
      id,
      spec: request.spec,
      mounts: guestMounts(rootfs, id, { lower, writable }),
      stdin: stdio.stdin !== null,
      stdout: stdio.stdout !== null,
      stderr: stdio.stderr !== null,
    };
    await sandbox.createContainer(container, signal);
    timeline.mark('created');
    faultPoint('container-create');
    return new Container(id, resources, stack.move(), request);
  }

  /** Runs the user's program. When it fails, the program has not run, as far as the guest has told. */
  async start(): Promise<void> {
    requireStartable(this.id, this.#state);
    const { sandbox, stdio } = this.#resources;
    const started = Promise.withResolvers<void>();
    this.#starting = started.promise;
    this.#state = { kind: 'starting' };
    try {
      assertNoInterfaces(this.id, this.pid);
      // First, because it can fail; until the program reads it, stdin waits in the guest's pipe.
      stdio.startStdin();
      await sandbox.guest.startContainer(this.id);
      faultPoint('container-start');
      this.timeline.mark('started');
      this.#state = { kind: 'running' };
    } catch (error) {
      this.#state = { kind: 'created' };
      throw error;
    } finally {
      started.resolve();
    }
  }

  /** Sends a signal; `not-found` when there is no process any more. */
  async kill(signal: number, all: boolean): Promise<void> {
    requireSignalable(this.id, this.#state);
    try {
      await this.#resources.sandbox.guest.signal(this.id, signal, all);
    } catch (error) {
      const code = error instanceof KilnError ? error.code : undefined;
      // The VM has ended, or will have in a moment.
      if (code === 'unavailable') await this.exit.wait();
      // The guest knows of the end already, while we still deliver the output.
      else if (code !== 'failed-precondition' && code !== 'not-found') throw error;
      throw alreadyFinished(this.id);
    }
  }

  /** The processes of the container by their pids in the guest; the init process by its pid on the host. */
  async processes(): Promise<readonly number[]> {
    if (this.#state.kind === 'stopped' || this.#state.kind === 'deleted') return [];
    const { pids, initPid } = await this.#resources.sandbox.guest.processes(this.id);
    return [this.pid, ...pids.filter((pid) => pid !== initPid)];
  }

  /** Freezes all processes; afterwards what they have written is on the container's disk. */
  async pause(): Promise<void> {
    requirePausable(this.id, this.#state);
    const pausing: ContainerState = { kind: 'pausing' };
    let next: ContainerState = { kind: 'running' };
    this.#state = pausing;
    try {
      await this.#resources.sandbox.guest.pauseContainer(this.id);
      next = { kind: 'paused' };
    } finally {
      if (this.#state === pausing) this.#state = next;
    }
    // It may have been killed meanwhile.
    if (this.#state !== next) requirePausable(this.id, this.#state);
  }

  async resume(): Promise<void> {
    requireResumable(this.id, this.#state);
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
      requireUpdatable(this.id, this.#state);
      return updateLimits(this.#resources.sandbox, this.id, resources, this.#logger);
    });
    this.#updating = update.catch(() => {});
    return update;
  }

  closeStdin(): void {
    this.#resources.stdio.closeStdin();
  }

  /** Removes a container that is not running, with everything that belongs to it, and returns its exit. */
  async delete(): Promise<Exit> {
    requireDeletable(this.id, this.#state);
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
    await Promise.race([ended, delay(destroyGraceMs, undefined, { ref: false })]);
    await this.#endVm();
    await this.exit.wait();
    await this.#windUp();
    await this.#disposal.disposeAsync();
    this.timeline.mark('deleted');
    const marks = this.timeline.toJSON().marks.map(({ name, atMs }) => ({ name, at_ms: atMs }));
    this.#logger.info({ marks }, 'timeline');
  }

  async #endInGuest(): Promise<void> {
    if (!this.#exited) await this.#resources.sandbox.guest.signal(this.id, sigkill, true);
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
      await this.#endVm();
    }
  }

  /** After the exit: what is left of the output is dropped; resolves when its filesystems are flushed and its VM gone. */
  async #windUp(): Promise<void> {
    await this.#resources.stdio.dispose();
    await this.#woundUp;
  }

  /** stdin flows until its writer closes it; the promise is of the two outputs, and never rejects. */
  #relayStdio(): Promise<unknown> {
    const { stdio, sandbox } = this.#resources;
    const { stdin, stdout, stderr } = stdio;
    const report = (error: unknown) => this.#report(error, 'a stdio stream ended early');
    if (stdin !== null) sandbox.guest.pipeStdin(this.id, stdin).catch(report);
    const outputs: Promise<void>[] = [];
    if (stdout !== null) outputs.push(sandbox.guest.pipeOutput(this.id, 'stdout', stdout));
    if (stderr !== null) outputs.push(sandbox.guest.pipeOutput(this.id, 'stderr', stderr));
    return Promise.all(outputs.map((output) => output.catch(report)));
  }

  /** Follows the init process to its end. Never rejects. */
  async #supervise(): Promise<void> {
    const { standIn, stdio } = this.#resources;
    const { status, vmLives } = await this.#awaitStatus();
    this.#exited = true;
    this.timeline.mark('exited');
    const exit: Exit = { status, at: new Date() };
    const counted = vmLives ? this.#countAtExit() : undefined;
    // The stand-in lives exactly as long as the task: `kill -0` on its pid must fail once the exit is known.
    await standIn.kill();
    const drained = this.#outputs
      .then(() => stdio.finish())
      .catch((error: unknown) => this.#report(error, 'cannot finish the output'));
    await Promise.race([Promise.all([drained, counted]), delay(outputGraceMs, undefined, { ref: false })]);
    this.oom.close();
    await this.#starting;
    this.#state = afterExit(this.#state, exit);
    const removed = drained.then(() => (vmLives ? this.#removeFromGuest() : undefined));
    this.#woundUp = removed.then(() => this.#endVm());
    this.exit.set(exit);
  }

  /** Never rejects. */
  async #watchOom(): Promise<void> {
    try {
      await this.#resources.sandbox.guest.watchOom(this.id, (kills) => this.oom.count(kills));
    } catch (error) {
      this.#report(error, 'the guest no longer tells when memory runs out');
    }
  }

  /** The container's last numbers, while its control group is still there. Never rejects. */
  async #countAtExit(): Promise<void> {
    try {
      this.#finalStats = await this.#resources.sandbox.guest.stats(this.id);
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

  async #awaitStatus(): Promise<{ status: number; vmLives: boolean }> {
    const { sandbox } = this.#resources;
    try {
      return { status: await sandbox.guest.waitExit(this.id), vmLives: true };
    } catch (error) {
      const end = await sandbox.end();
      const level = this.#destruction === undefined ? 'error' : 'debug';
      this.#logger[level]({ err: error, ...end }, 'the VM ended while the container was alive');
      const killed = end.signal === 'SIGKILL' && !end.guestStopped && !end.agentLost;
      return { status: killed ? vmKilledStatus : unknownStatus, vmLives: false };
    }
  }

  /** Flushes the container's filesystems. */
  async #removeFromGuest(): Promise<void> {
    try {
      await this.#resources.sandbox.guest.removeContainer(this.id, { force: true, guestEnds: true });
    } catch (error) {
      this.#logger.warn({ err: error }, 'the guest did not remove the container: its last writes may be lost');
    }
  }

  /** Gives the VM's memory back. Never rejects. */
  async #endVm(): Promise<void> {
    try {
      await this.#resources.sandbox[Symbol.asyncDispose]();
    } catch (error) {
      this.#report(error, 'cannot end the VM');
    }
  }

  /** For what nobody awaits. That the connection is gone says nothing new: the VM has ended. */
  #report(error: unknown, message: string): void {
    const gone = error instanceof KilnError && (error.code === 'unavailable' || error.code === 'not-found');
    this.#logger[gone ? 'debug' : 'warn']({ err: forLog(error) }, message);
  }
}
