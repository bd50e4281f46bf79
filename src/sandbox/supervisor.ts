import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { forLog, KilnError } from '../errors.ts';
import type { ContainerStats } from '../guest/stats.ts';
import type { ProcessRef } from '../guest/terms.ts';
import type { GuestExit } from '../guest/wait.ts';
import type { Changes } from './changes.ts';
import { Execs } from './execs.ts';
import { deleteDrainMs, destroyGraceMs, killLimitMs, outputGraceMs } from './limits.ts';
import { OccupiedVm } from './occupied-vm.ts';
import { OomReport } from './oom.ts';
import { Positions } from './positions.ts';
import { ProcessIo } from './process-io.ts';
import { alreadyFinished, type Exit } from './process-state.ts';
import type { ContainerRequest, Resources } from './resources.ts';
import { sigkill } from './vm-end.ts';
import { WaitableCell } from './waitable-cell.ts';

/** The container that is supervised. */
export interface SupervisedParts
  extends Pick<ContainerRequest, 'id' | 'directory' | 'terminal' | 'timeline' | 'logger'> {
  readonly resources: Resources;
  /** Absent where nothing of what it writes comes to the host. */
  readonly changes?: Changes | undefined;
}

/** What a supervisor needs of its container. */
export interface SupervisorHost {
  /** Throws when the container's state allows no further process now. */
  requireExecable(): void;
  /** Settled when no start is under way. Never rejects. */
  readonly starting: () => Promise<void>;
  /** Called when nothing runs in it any more, right before `exit` is set. */
  readonly stopped: (exit: Exit) => void;
  /** Writes down what has changed. */
  readonly save: () => void;
}

/**
 * Follows what runs in a container to its end, and brings that end about when it is asked to: from inside, where the guest
 * does it, else by the end of the VM. Then it sees to it that nothing of the container stays in the guest.
 */
export class Supervisor {
  /** Set once, when the init process and all others have ended and their output was delivered. */
  readonly exit = new WaitableCell<Exit>();
  /** Tells of processes killed for want of memory; of all that were, before `exit` is set. */
  readonly oom: OomReport;
  /** Those beside the init. */
  readonly execs: Execs;
  readonly #parts: SupervisedParts;
  readonly #host: SupervisorHost;
  readonly #io: ProcessIo;
  readonly #vm: OccupiedVm;
  #exited = false;
  /** What it had used when its init process ended. */
  #finalStats: ContainerStats | undefined;
  /** Set when we end the container ourselves, so that its VM's end is nothing to report. */
  #endIsWanted = false;
  /** Settled when output, guest and VM are done with; set before `exit`. Never rejects. */
  #woundUp: Promise<void> | undefined;

  /** Begins to relay the outputs of the init process, which must exist in the guest. */
  constructor(parts: SupervisedParts, host: SupervisorHost) {
    const { id, directory, terminal, resources, logger } = parts;
    const { guest } = resources.sandbox;
    this.#parts = parts;
    this.#host = host;
    this.oom = new OomReport({ onTold: host.save });
    this.#io = new ProcessIo({
      guest,
      process: this.#init,
      stdio: resources.stdio,
      terminal,
      positions: new Positions(path.join(directory, 'positions')),
      report: this.#report,
    });
    this.#vm = new OccupiedVm(resources, { logger, report: this.#report, endIsWanted: () => this.#endIsWanted });
    this.execs = new Execs({
      id,
      guest,
      requireExecable: () => host.requireExecable(),
      lostStatus: () => this.#vm.lostStatus(),
      report: this.#report,
    });
  }

  get #init(): ProcessRef {
    return { id: this.#parts.id, execId: '' };
  }

  /** The init process has ended; its output may still be on its way. */
  get hasExited(): boolean {
    return this.#exited;
  }

  /** Begins to relay its stdin. Later calls do nothing. */
  pipeStdin(): void {
    this.#io.pipeStdin();
  }

  /** To be called once, when the container is written down. */
  follow(): void {
    const { id, resources } = this.#parts;
    resources.tenancy.enter({ id, pid: resources.standIn.pid, quit: () => this.#endInGuest() });
    void this.#supervise();
    void this.#followStandIn();
  }

  /** Follows the init process to its end. Never rejects. */
  async #supervise(): Promise<void> {
    const { id, resources, changes, timeline } = this.#parts;
    const { status, written, stats } = await this.#awaitExit();
    const vmLives = !this.#vm.isLost;
    this.#exited = true;
    timeline.mark('exited');
    const exit: Exit = { status, at: new Date() };
    const counted = vmLives ? this.#countAtExit(stats) : undefined;
    const inTime = delay(outputGraceMs, undefined, { ref: false });
    await Promise.all([this.#io.settled(written), Promise.race([counted, inTime])]);
    this.oom.close();
    await this.#host.starting();
    // No process outlives the init, whose end has killed the others.
    await this.execs.ended();
    // Whoever hears of the end may look at once.
    if (vmLives) await changes?.ended();
    // The stand-in lives exactly as long as the task: `kill -0` on its pid must fail once the exit is known, and not before.
    await resources.standIn.kill();
    this.#host.stopped(exit);
    const removed = Promise.all([this.#io.drained, this.execs.drained()]).then(() =>
      vmLives ? this.#vm.removeContainer(id) : undefined,
    );
    this.#woundUp = removed.then(() => this.#vm.leave());
    this.exit.set(exit);
    this.#host.save();
  }

  async #awaitExit(): Promise<GuestExit> {
    try {
      const { guest } = this.#parts.resources.sandbox;
      return await guest.waitExit(this.#init, (kills) => this.oom.count(kills));
    } catch (error) {
      return { status: await this.#vm.lostStatus(error), written: { stdout: undefined, stderr: undefined } };
    }
  }

  /** The container's last numbers, told with its exit or asked for while its control group is still there. Never rejects. */
  async #countAtExit(told: ContainerStats | undefined): Promise<void> {
    try {
      this.#finalStats = told ?? (await this.#parts.resources.sandbox.guest.stats(this.#parts.id));
      this.oom.count(Number(this.#finalStats.memory.events.oom_kill ?? 0n));
    } catch (error) {
      this.#report(error, 'the guest does not tell what the container has used');
    }
  }

  /** What it uses; of one that has ended, what it had used. */
  async stats(): Promise<ContainerStats> {
    const { id, resources } = this.#parts;
    if (this.#finalStats !== undefined) return this.#finalStats;
    if (this.#exited) throw new KilnError('not-found', `container ${id} has ended, and nobody knows what it used`);
    return resources.sandbox.guest.stats(id);
  }

  /** Who ends the stand-in, which is all that the host sees of the container, means the container. */
  async #followStandIn(): Promise<void> {
    const { resources, logger } = this.#parts;
    const { exited, pid } = resources.standIn;
    await exited;
    if (this.#exited || this.#endIsWanted) return;
    logger.warn({ pid }, 'the process that stands for the container was ended: killing the container');
    await this.kill(sigkill, true).catch((error: unknown) => this.#report(error, 'cannot kill the container'));
  }

  /**
   * Sends a signal; `not-found` when there is no process any more. SIGKILL ends the container: by its VM, where the guest
   * does not answer, or answers and does nothing.
   */
  async kill(signal: number, all: boolean): Promise<void> {
    const { id, resources } = this.#parts;
    try {
      await resources.sandbox.guest.signal(this.#init, signal, all);
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
      throw alreadyFinished(`container ${id}`);
    }
  }

  /** After a SIGKILL that the guest has taken. */
  #limitEnd(): void {
    const timer = setTimeout(() => {
      if (this.#exited) return;
      const limit = `the guest did not end container ${this.#parts.id} within ${killLimitMs / 1000} s of SIGKILL`;
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

  /** Ends a container whose program has not run. */
  async discard(): Promise<void> {
    try {
      await this.kill(sigkill, true);
    } catch (error) {
      if (error instanceof KilnError && error.code === 'not-found') return;
      // There is nothing in it yet that would be lost.
      this.#report(error, 'cannot kill the container, so its VM is ended');
      await this.#vm.end();
    }
  }

  /**
   * Ends the container, whatever its state; resolves when it is wound up. What it wrote is on its disk if the guest still
   * answers in time.
   */
  async end(): Promise<void> {
    const { tenancy } = this.#parts.resources;
    this.#endIsWanted = true;
    const ended = this.#endInGuest().catch((error: unknown) => this.#report(error, 'cannot end the container'));
    // For the sake of a pod's other containers a little more.
    const graceMs = tenancy.shared ? killLimitMs : destroyGraceMs;
    await Promise.race([ended, delay(graceMs, undefined, { ref: false })]);
    if (this.exit.peek() === undefined || !tenancy.shared) await this.#vm.end();
    await this.exit.wait();
    await this.#windUp();
  }

  async #endInGuest(): Promise<void> {
    if (!this.#exited) await this.#parts.resources.sandbox.guest.signal(this.#init, sigkill, true);
    await this.exit.wait();
    await this.#windUp();
  }

  /** After the exit: a slow reader of the output gets its time, then the container is wound up. */
  async drain(): Promise<void> {
    await Promise.race([this.#woundUp, delay(deleteDrainMs, undefined, { ref: false })]);
    await this.#windUp();
  }

  /** After the exit: what is left of the output is dropped; resolves when its filesystems are flushed and its VM gone. */
  async #windUp(): Promise<void> {
    await Promise.all([this.#io.dispose(), this.execs.release()]);
    await this.#woundUp;
  }

  /** For what nobody awaits. That the connection is gone says nothing new: the VM has ended. */
  readonly #report = (error: unknown, message: string): void => {
    const gone = error instanceof KilnError && (error.code === 'unavailable' || error.code === 'not-found');
    this.#parts.logger[gone ? 'debug' : 'warn']({ err: forLog(error) }, message);
  };
}
