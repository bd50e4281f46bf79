/** A container without a VM: it follows Kiln's state machine, and a test decides what happens when. */
import type { LimitResources } from '../../../src/oci/limits.ts';
import type { ContainerStats } from '../../../src/sandbox/container.ts';
import {
  afterExit,
  type ContainerState,
  type Exit,
  requireDeletable,
  requirePausable,
  requireResumable,
  requireSignalable,
  requireStartable,
  requireUpdatable,
} from '../../../src/sandbox/container-state.ts';
import { OomReport } from '../../../src/sandbox/oom.ts';
import { WaitableCell } from '../../../src/sandbox/waitable-cell.ts';
import type { TaskContainer } from '../../../src/shim/task-service.ts';
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

export class ScriptedContainer implements TaskContainer {
  readonly id: string;
  readonly pid = 4242;
  readonly exit = new WaitableCell<Exit>();
  readonly oom = new OomReport();
  readonly calls: string[] = [];
  state: ContainerState = { kind: 'created' };
  /** Set one to hold or fail the step of this name. */
  gates: { start?: Gate; kill?: Gate; pause?: Gate; delete?: Gate; destroy?: Gate; processes?: Gate } = {};

  constructor(id: string) {
    this.id = id;
  }

  /** The program ends. As in the real one, an exit during the start waits for the start's end. */
  end(status: number): void {
    const exit = { status, at: new Date(1_700_000_000_123) };
    this.oom.close();
    this.state = afterExit(this.state, exit);
    this.exit.set(exit);
  }

  async start(): Promise<void> {
    this.calls.push('start');
    requireStartable(this.id, this.state);
    this.state = { kind: 'starting' };
    try {
      await this.gates.start?.pass();
      this.state = { kind: 'running' };
    } catch (error) {
      this.state = { kind: 'created' };
      throw error;
    }
  }

  async kill(signal: number, all: boolean): Promise<void> {
    this.calls.push(`kill ${signal} ${all}`);
    requireSignalable(this.id, this.state);
    await this.gates.kill?.pass();
    this.end(128 + signal);
  }

  async processes(): Promise<readonly number[]> {
    await this.gates.processes?.pass();
    return this.exit.peek() === undefined ? [this.pid, 7] : [];
  }

  async pause(): Promise<void> {
    requirePausable(this.id, this.state);
    await this.gates.pause?.pass();
    this.state = { kind: 'paused' };
  }

  async resume(): Promise<void> {
    requireResumable(this.id, this.state);
    this.state = { kind: 'running' };
  }

  async stats(): Promise<ContainerStats> {
    return containerStats;
  }

  async update(resources: LimitResources): Promise<void> {
    requireUpdatable(this.id, this.state);
    this.calls.push(`update ${JSON.stringify(resources)}`);
  }

  closeStdin(): void {
    this.calls.push('closeStdin');
  }

  async delete(): Promise<Exit> {
    this.calls.push('delete');
    requireDeletable(this.id, this.state);
    await this.gates.delete?.pass();
    if (this.state.kind === 'created') this.end(137);
    const exit = await this.exit.wait();
    this.state = { kind: 'deleted', exit };
    return exit;
  }

  async destroy(): Promise<void> {
    this.calls.push('destroy');
    await this.gates.destroy?.pass();
    if (this.exit.peek() === undefined) this.end(137);
  }
}
