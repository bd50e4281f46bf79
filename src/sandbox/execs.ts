import type { Guest } from '../guest/guest.ts';
import type { ProcessRef } from '../guest/terms.ts';
import { Exec, type ExecHost, type ExecRequest } from './exec.ts';

/** What the exec'd processes of a container need of it; see ExecHost. */
export interface ExecsHost extends Pick<ExecHost, 'id' | 'requireExecable' | 'lostStatus' | 'report'> {
  readonly guest: Guest;
}

/** The exec'd processes of one container, until they are deleted. */
export class Execs {
  readonly #host: ExecsHost;
  readonly #execs = new Map<string, Exec>();
  /** Those that are deleted and that the guest is still to forget, by exec id. */
  readonly #forgetting = new Map<string, Promise<void>>();

  constructor(host: ExecsHost) {
    this.#host = host;
  }

  /** The caller keeps its exec id unique. */
  add(request: ExecRequest): Exec {
    const exec = new Exec(this.#hostOf(request.execId), request);
    this.#execs.set(request.execId, exec);
    return exec;
  }

  /** One that an earlier kilnd has started, and that runs in the guest as `pid`. */
  async adopt(request: ExecRequest, pid: number): Promise<Exec> {
    const exec = await Exec.adopt(this.#hostOf(request.execId), request, pid);
    this.#execs.set(request.execId, exec);
    return exec;
  }

  has(execId: string): boolean {
    return this.#execs.has(execId);
  }

  /** Resolves when all have ended, as they do with the container's init. */
  async ended(): Promise<void> {
    await Promise.all(this.#all((exec) => exec.ended()));
  }

  /** Resolves when the output of all is delivered. */
  async drained(): Promise<void> {
    await Promise.all(this.#all((exec) => exec.drained));
  }

  /** After their end: what is left of their output is dropped. */
  async release(): Promise<void> {
    await Promise.all(this.#all((exec) => exec.release()));
  }

  #all<T>(of: (exec: Exec) => T): T[] {
    return Array.from(this.#execs.values(), of);
  }

  #hostOf(execId: string): ExecHost {
    return {
      ...this.#host,
      deleted: () => this.#execs.delete(execId),
      forget: (process) => this.#forget(process),
      forgotten: async () => this.#forgetting.get(execId),
    };
  }

  #forget({ id, execId }: ProcessRef): void {
    const { guest, report } = this.#host;
    const forgetting = guest
      .removeProcess({ id, execId })
      .catch((error: unknown) => report(error, 'cannot remove the process from the guest'))
      .finally(() => this.#forgetting.delete(execId));
    this.#forgetting.set(execId, forgetting);
  }
}
