import { KilnError } from '../errors.ts';
import type { ContainerProcess, ProcessDetails } from './container.ts';
import { OomReport } from './oom.ts';
import {
  alreadyFinished,
  type Exit,
  type ProcessState,
  requireExecable,
  requirePausable,
  requireResumable,
  requireStartable,
  requireUpdatable,
} from './process-state.ts';
import { WaitableCell } from './waitable-cell.ts';

/** A process that ended while no kilnd was there: its exit is known, or what there is to know of it. */
export class EndedProcess {
  readonly pid: number;
  readonly exit = new WaitableCell<Exit>();
  readonly #name: string;
  #state: ProcessState;

  /** @param name as in "container c1" */
  constructor(name: string, pid: number, exit: Exit) {
    this.#name = name;
    this.pid = pid;
    this.#state = { kind: 'stopped', exit };
    this.exit.set(exit);
  }

  get state(): ProcessState {
    return this.#state;
  }

  async start(): Promise<void> {
    requireStartable(this.#name, this.#state);
  }

  async kill(): Promise<void> {
    throw alreadyFinished(this.#name);
  }

  async resize(): Promise<void> {}

  closeStdin(): void {}

  async delete(): Promise<Exit> {
    const exit = await this.exit.wait();
    this.#state = { kind: 'deleted', exit };
    return exit;
  }
}

/** A container whose VM is gone, with what is left of it on the host. */
export class EndedContainer extends EndedProcess {
  readonly id: string;
  /** It has nothing to tell any more. */
  readonly oom = new OomReport();
  readonly #disposal: AsyncDisposableStack;

  constructor(id: string, pid: number, exit: Exit, disposal: AsyncDisposableStack) {
    super(`container ${id}`, pid, exit);
    this.id = id;
    this.#disposal = disposal;
  }

  get #containerName(): string {
    return `container ${this.id}`;
  }

  exec(): never {
    requireExecable(this.#containerName, this.state);
    throw new KilnError('internal', `${this.#containerName} has ended`);
  }

  async processes(): Promise<readonly ContainerProcess[]> {
    return [];
  }

  async processTable(): Promise<readonly ProcessDetails[]> {
    return [];
  }

  async pause(): Promise<void> {
    requirePausable(this.#containerName, this.state);
  }

  async resume(): Promise<void> {
    requireResumable(this.#containerName, this.state);
  }

  async update(): Promise<void> {
    requireUpdatable(this.#containerName, this.state);
  }

  async stats(): Promise<never> {
    throw new KilnError('not-found', `${this.#containerName} has ended, and nobody knows what it used`);
  }

  async stop(): Promise<void> {}

  async ping(): Promise<never> {
    throw new KilnError('failed-precondition', `${this.#containerName} has ended`);
  }

  describe(): Readonly<Record<string, unknown>> {
    return { processStatus: this.state.kind };
  }

  override async delete(): Promise<Exit> {
    await this.destroy();
    return super.delete();
  }

  async destroy(): Promise<void> {
    await this.#disposal.disposeAsync();
  }
}
