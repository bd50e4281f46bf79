import { KilnError } from '../errors.ts';
import type { ContainerProcess } from './container.ts';
import { alreadyFinished, type Exit, type ProcessState, requireExecable, requireStartable } from './process-state.ts';
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
  readonly #disposal: AsyncDisposableStack;

  constructor(id: string, pid: number, exit: Exit, disposal: AsyncDisposableStack) {
    super(`container ${id}`, pid, exit);
    this.id = id;
    this.#disposal = disposal;
  }

  exec(): never {
    requireExecable(`container ${this.id}`, this.state);
    throw new KilnError('internal', `container ${this.id} has ended`);
  }

  async processes(): Promise<readonly ContainerProcess[]> {
    return [];
  }

  override async delete(): Promise<Exit> {
    await this.destroy();
    return super.delete();
  }

  async destroy(): Promise<void> {
    await this.#disposal.disposeAsync();
  }
}
