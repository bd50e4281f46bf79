/** A container without a VM: it follows Kiln's state machine, and a test decides what happens when. */
import type { LimitResources } from '../../../src/oci/limits.ts';
import type { ContainerProcess, ContainerStats, ProcessDetails } from '../../../src/sandbox/container.ts';
import type { ExecRequest } from '../../../src/sandbox/exec.ts';
import { OomReport } from '../../../src/sandbox/oom.ts';
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
  requireStarted,
  requireUpdatable,
} from '../../../src/sandbox/process-state.ts';
import { WaitableCell } from '../../../src/sandbox/waitable-cell.ts';
import type { TaskContainer, TaskProcess } from '../../../src/shim/task.ts';
import { containerStats } from './stats.ts';

/** A step that waits until the test lets it go on, or fail. */
export class Gate {
  readonly #entered = Promise.withResolvers<void>();
  readonly #open = Promise.withResolvers<void>();

  /** Resolves when somebody waits at the gate. */
  get entered(): Promise<void> {
    return this.#entered.promise;
  }

  pass(): Promise<void> {
    this.#entered.resolve();
    return this.#open.promise;
  }

  open(): void {
    this.#open.resolve();
  }

  fail(error: Error): void {
    this.#open.promise.catch(() => {});
    this.#open.reject(error);
  }
}

/** What init and exec have in common. */
class ScriptedProcess {
  readonly exit = new WaitableCell<Exit>();
  readonly calls: string[] = [];
  state: ContainerState = { kind: 'created' };
  /** Set one to hold or fail the step of this name. */
  gates: { start?: Gate; kill?: Gate; pause?: Gate; delete?: Gate; destroy?: Gate; processes?: Gate } = {};
  protected readonly name: string;

  constructor(name: string) {
    this.name = name;
  }

  /** The program ends. As in the real one, an exit during the start waits for the start's end. */
  end(status: number): void {
    const exit = { status, at: new Date(1_700_000_000_123) };
    this.state = afterExit(this.state, exit);
    this.exit.set(exit);
  }

  async start(): Promise<void> {
    this.calls.push('start');
    requireStartable(this.name, this.state);
    this.state = { kind: 'starting' };
    try {
      await this.gates.start?.pass();
      this.state = { kind: 'running' };
    } catch (error) {
      this.state = { kind: 'created' };
      throw error;
    }
  }

  async resize({ width, height }: { readonly width: number; readonly height: number }): Promise<void> {
    this.calls.push(`resize ${width} ${height}`);
  }

  closeStdin(): void {
    this.calls.push('closeStdin');
  }

  protected async deleteWith(neverStarted: number): Promise<Exit> {
    this.calls.push('delete');
    requireDeletable(this.name, this.state);
    await this.gates.delete?.pass();
    if (this.state.kind === 'created') this.end(neverStarted);
    const exit = await this.exit.wait();
    this.state = { kind: 'deleted', exit };
    return exit;
  }
}

export class ScriptedExec extends ScriptedProcess implements TaskProcess {
  readonly request: ExecRequest;
  readonly #pid: number;
  #started = false;

  constructor(request: ExecRequest, pid: number) {
    super(`exec ${request.execId} of container c1`);
    this.request = request;
    this.#pid = pid;
  }

  /** As the real one: 0 before its start. */
  get pid(): number {
    return this.#started ? this.#pid : 0;
  }

  override async start(): Promise<void> {
    await super.start();
    this.#started = true;
  }

  async kill(signal: number): Promise<void> {
    this.calls.push(`kill ${signal}`);
    requireSignalable(this.name, this.state);
    requireStarted(this.name, this.state);
    this.end(128 + signal);
  }

  delete(): Promise<Exit> {
    return this.deleteWith(255);
  }
}

export class ScriptedContainer extends ScriptedProcess implements TaskContainer {
  readonly id: string;
  readonly pid = 4242;
  readonly oom = new OomReport();
  /** All that were ever asked for, in order. */
  readonly execs: ScriptedExec[] = [];

  constructor(id: string) {
    super(`container ${id}`);
    this.id = id;
  }

  override end(status: number): void {
    this.oom.close();
    super.end(status);
  }

  exec(request: ExecRequest): ScriptedExec {
    requireExecable(this.name, this.state);
    const exec = new ScriptedExec(request, 100 + this.execs.length);
    this.execs.push(exec);
    return exec;
  }

  async kill(signal: number, all: boolean): Promise<void> {
    this.calls.push(`kill ${signal} ${all}`);
    requireSignalable(this.name, this.state);
    await this.gates.kill?.pass();
    this.end(128 + signal);
  }

  async pause(): Promise<void> {
    requirePausable(this.name, this.state);
    await this.gates.pause?.pass();
    this.state = { kind: 'paused' };
  }

  async resume(): Promise<void> {
    requireResumable(this.name, this.state);
    this.state = { kind: 'running' };
  }

  async stats(): Promise<ContainerStats> {
    return containerStats;
  }

  async update(resources: LimitResources): Promise<void> {
    requireUpdatable(this.name, this.state);
    this.calls.push(`update ${JSON.stringify(resources)}`);
  }

  async processes(): Promise<readonly ContainerProcess[]> {
    await this.gates.processes?.pass();
    if (this.exit.peek() !== undefined) return [];
    const running = this.execs.filter(({ state }) => state.kind === 'running');
    const named = running.map(({ pid, request }) => ({ pid, execId: request.execId }));
    return [{ pid: this.pid, execId: '' }, { pid: 7, execId: '' }, ...named];
  }

  async processTable(): Promise<readonly ProcessDetails[]> {
    const same = { ppid: 1, uid: 5, startedAt: new Date(1000), cpuMs: 20, tty: 'pts/0' };
    return [{ pid: 100, ...same, command: `init of ${this.id}` }];
  }

  delete(): Promise<Exit> {
    return this.deleteWith(137);
  }

  async destroy(): Promise<void> {
    this.calls.push('destroy');
    await this.gates.destroy?.pass();
    if (this.exit.peek() === undefined) this.end(137);
  }
}
