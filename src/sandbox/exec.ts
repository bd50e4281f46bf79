import { mkdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { KilnError } from '../errors.ts';
import type { Guest } from '../guest/guest.ts';
import type { ProcessRef, TerminalSize } from '../guest/terms.ts';
import type { GuestExit } from '../guest/wait.ts';
import { deleteDrainMs } from './limits.ts';
import { Positions } from './positions.ts';
import { guestStdio, ProcessIo } from './process-io.ts';
import {
  afterExit,
  alreadyFinished,
  type Exit,
  type ProcessState,
  requireDeletable,
  requireSignalable,
  requireStartable,
  requireStarted,
} from './process-state.ts';
import type { ContainerStdio } from './stdio.ts';
import { sigkill } from './vm-end.ts';
import { WaitableCell } from './waitable-cell.ts';

/** Exit status of a process that was never started: nobody can tell another. */
const neverStartedStatus = 255;

export interface ExecRequest {
  readonly execId: string;
  /** A directory of its own, not yet existing; it is removed with the process. */
  readonly directory: string;
  /** The guest's runtime-spec `process`, JSON. */
  readonly process: string;
  /** Where the caller has a process on the host that stands for it: when that ends first, this is killed. */
  readonly openStandIn?: () => ExecStandIn | undefined;
  readonly terminal: boolean;
  /** Undefined leaves it as the guest makes it. */
  readonly terminalSize: TerminalSize | undefined;
  readonly openStdio: () => Promise<ContainerStdio>;
}

/** Disposing it lets go of the process. */
export interface ExecStandIn extends Disposable {
  readonly ended: Promise<void>;
}

/** What an exec'd process needs of its container. */
export interface ExecHost {
  readonly id: string;
  readonly guest: Guest;
  /** Throws when the container's state allows no start now. */
  requireExecable(): void;
  /** After the guest was lost: the exit status of everything that was in it. */
  lostStatus(): Promise<number>;
  /** Called once the process is deleted. */
  readonly deleted: () => void;
  /** Has the guest forget a process that is deleted; nobody waits for that but a later one with its exec id. */
  readonly forget: (process: ProcessRef) => void;
  /** Resolves when the guest has forgotten what had this exec id before. Never rejects. */
  readonly forgotten: () => Promise<void>;
  readonly report: (error: unknown, message: string) => void;
}

/** A process that runs in a container beside its init. It exists in the guest from its start on. */
export class Exec {
  readonly execId: string;
  readonly terminal: boolean;
  /** Set once, when the process has ended and its output was delivered, or when it was deleted without a start. */
  readonly exit = new WaitableCell<Exit>();
  readonly #host: ExecHost;
  readonly #request: ExecRequest;
  #state: ProcessState = { kind: 'created' };
  /** In the guest; 0 before the start. */
  #pid = 0;
  #io: ProcessIo | undefined;
  #starting: Promise<void> = Promise.resolve();
  #stdio: ContainerStdio | undefined;
  /** What was asked for before the start. */
  #size: TerminalSize | undefined;
  #stdinClosed = false;

  constructor(host: ExecHost, request: ExecRequest) {
    this.execId = request.execId;
    this.terminal = request.terminal;
    this.#host = host;
    this.#request = request;
    this.#size = request.terminalSize;
  }

  get #name(): string {
    return `exec ${this.execId} of container ${this.#host.id}`;
  }

  get #ref(): ProcessRef {
    return { id: this.#host.id, execId: this.execId };
  }

  get state(): ProcessState {
    return this.#state;
  }

  /** Its pid in the guest, 0 before its start: the host has no process of its own for it. */
  get pid(): number {
    return this.#pid;
  }

  /** Runs the program. When it fails, it has not run, and nothing of it is left in the guest. */
  async start(): Promise<void> {
    requireStartable(this.#name, this.#state);
    this.#host.requireExecable();
    const started = Promise.withResolvers<void>();
    this.#starting = started.promise;
    this.#state = { kind: 'starting' };
    try {
      const { guest } = this.#host;
      const { directory, process, terminal, openStdio } = this.#request;
      await using undo = new AsyncDisposableStack();
      // It may be there from a start under an earlier kilnd, which never got to the guest.
      await mkdir(directory, { recursive: true, mode: 0o700 });
      undo.defer(() => rm(directory, { recursive: true, force: true }));
      const stdio = undo.adopt(await openStdio(), (opened) => opened.dispose());
      const stdinEnded = stdio.startStdin() && guest.facts.takesEndedStdin;
      const size = this.#size;
      await this.#host.forgotten();
      this.#pid = await guest.exec(this.#ref, process, guestStdio(stdio, terminal, size), stdinEnded);
      undo.move();
      const io = this.#run(stdio);
      if (!stdinEnded) io.pipeStdin();
      // It was changed while the start was under way.
      if (this.#size !== undefined && this.#size !== size) await this.resize(this.#size);
    } catch (error) {
      this.#state = { kind: 'created' };
      throw error;
    } finally {
      started.resolve();
    }
  }

  /** Resolves when the process no longer runs, nor is about to. Never rejects. */
  async ended(): Promise<void> {
    await this.#starting;
    if (this.#pid !== 0) await this.exit.wait();
  }

  /** Takes over a process that was started under an earlier kilnd. */
  static async adopt(host: ExecHost, request: ExecRequest, pid: number): Promise<Exec> {
    const exec = new Exec(host, request);
    await mkdir(request.directory, { recursive: true, mode: 0o700 });
    const stdio = await request.openStdio();
    stdio.startStdin({ clientMayReturn: true });
    exec.#pid = pid;
    exec.#run(stdio).pipeStdin();
    return exec;
  }

  #run(stdio: ContainerStdio): ProcessIo {
    const { guest, report } = this.#host;
    const { directory, terminal } = this.#request;
    this.#stdio = stdio;
    // Before the start, or while it was under way: a short input is read by then, and its client has no more to say.
    if (this.#stdinClosed) stdio.closeStdin();
    const positions = new Positions(path.join(directory, 'positions'));
    const io = new ProcessIo({ guest, process: this.#ref, stdio, terminal, positions, report });
    this.#io = io;
    this.#state = { kind: 'running' };
    void this.#supervise(io);
    void this.#followStandIn();
    return io;
  }

  /** Sends a signal; `not-found` when there is no process any more, `failed-precondition` before there is one. */
  async kill(signal: number): Promise<void> {
    requireSignalable(this.#name, this.#state);
    requireStarted(this.#name, this.#state);
    try {
      await this.#host.guest.signal(this.#ref, signal, false);
    } catch (error) {
      const code = error instanceof KilnError ? error.code : undefined;
      if (code !== 'unavailable' && code !== 'failed-precondition' && code !== 'not-found') throw error;
      throw alreadyFinished(this.#name);
    }
  }

  /** Sets the size of its terminal, if it has one; before the start, the size that it will have. */
  async resize(size: TerminalSize): Promise<void> {
    this.#size = size;
    if (!this.terminal || this.#state.kind !== 'running') return;
    await this.#host.guest.resize(this.#ref, size);
  }

  closeStdin(): void {
    this.#stdinClosed = true;
    this.#stdio?.closeStdin();
  }

  /** Removes a process that is not running, and returns its exit. */
  async delete(): Promise<Exit> {
    requireDeletable(this.#name, this.#state);
    if (this.#state.kind === 'created') {
      const never: Exit = { status: neverStartedStatus, at: new Date() };
      // At once: a start that comes now is too late.
      this.#state = afterExit(this.#state, never);
      this.exit.set(never);
    }
    const exit = await this.exit.wait();
    this.#state = { kind: 'deleted', exit };
    await Promise.race([this.drained, delay(deleteDrainMs, undefined, { ref: false })]);
    await this.release();
    this.#host.deleted();
    if (this.#pid !== 0) this.#host.forget(this.#ref);
    return exit;
  }

  /** Resolves when its outputs have ended, or are dropped; at once before its start. Never rejects. */
  get drained(): Promise<void> {
    return this.#io?.drained ?? Promise.resolve();
  }

  /** Closes its stdio at once, in whatever state. Never rejects. */
  async release(): Promise<void> {
    await this.#io?.dispose();
    if (this.#pid === 0) return;
    await rm(this.#request.directory, { recursive: true, force: true }).catch((error: unknown) => {
      this.#host.report(error, 'cannot remove the directory of an exec');
    });
  }

  /** Follows the process to its end. Never rejects. */
  async #supervise(io: ProcessIo): Promise<void> {
    const { status, written } = await this.#awaitExit();
    await io.settled(written);
    const exit: Exit = { status, at: new Date() };
    this.#state = afterExit(this.#state, exit);
    this.exit.set(exit);
  }

  /** Never rejects. */
  async #followStandIn(): Promise<void> {
    const { openStandIn } = this.#request;
    if (openStandIn === undefined) return;
    try {
      using standIn = openStandIn();
      // One that is not there any more has ended.
      await Promise.race([standIn?.ended, this.exit.wait()]);
      if (this.exit.peek() === undefined) await this.kill(sigkill);
    } catch (error) {
      this.#host.report(error, 'cannot kill the process whose stand-in has ended');
    }
  }

  async #awaitExit(): Promise<GuestExit> {
    try {
      return await this.#host.guest.waitExit(this.#ref);
    } catch {
      return { status: await this.#host.lostStatus(), written: { stdout: undefined, stderr: undefined } };
    }
  }
}
