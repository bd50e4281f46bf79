import { existsSync } from 'node:fs';
import { KilnError } from '../errors.ts';
import { type HookCommand, runHook } from '../host/hooks.ts';
import type { Logger } from '../observe/logger.ts';
import { poststopLimitMs } from './limits.ts';

export interface ContainerHook extends HookCommand {
  /** What errors and the log call it. */
  readonly name: string;
}

/** The hooks of a container that run on the host, each list in its order, and what they are told besides the state. */
export interface HookPlan {
  readonly prestart: readonly ContainerHook[];
  readonly createRuntime: readonly ContainerHook[];
  readonly poststart: readonly ContainerHook[];
  readonly poststop: readonly ContainerHook[];
  /** Absolute path; the hooks run in it. */
  readonly bundle: string;
  readonly ociVersion: string;
  readonly annotations: Readonly<Record<string, string>>;
}

/** Where nerdctl's createRuntime hook looks for the network namespace before it looks at the pid; Kata Containers sets it, too. */
const networkNamespaceAnnotation = 'nerdctl/network-namespace';

/**
 * When a container's hooks run, what they are told, and what it means when one fails: runtime-spec 1.3, runtime.md
 * "Lifecycle", steps 3, 4, 9 and 13.
 */
export class ContainerHooks {
  readonly #id: string;
  readonly #plan: HookPlan;
  readonly #logger: Logger;
  readonly #end = new AbortController();
  /** Set once a hook may have done something that a poststop hook undoes. */
  #begun: boolean;
  #poststart: Promise<void> | undefined;

  /** @param begun true for a container of an earlier kilnd, whose hooks have run */
  constructor({ id, hooks, logger, begun = false }: { id: string; hooks: HookPlan; logger: Logger; begun?: boolean }) {
    this.#begun = begun;
    this.#id = id;
    this.#plan = hooks;
    this.#logger = logger;
  }

  /**
   * prestart and createRuntime: the container's network namespace is there, and nothing has been made in the guest.
   * Whoever calls it calls `poststop` in the end, also when this throws.
   *
   * @param pid the container's on the host
   * @throws KilnError of the first hook that fails, or the signal's reason
   */
  async create(pid: number, signal: AbortSignal): Promise<void> {
    this.#begun = true;
    const state = this.#state('creating', pid);
    for (const hook of [...this.#plan.prestart, ...this.#plan.createRuntime]) await this.#run(hook, state, signal);
  }

  /**
   * poststart: the program runs. When one fails, the container must not go on.
   *
   * @param stop ends the container; its errors are logged
   * @throws KilnError of the first hook that fails
   */
  poststart(pid: number, stop: () => Promise<unknown>): Promise<void> {
    this.#poststart = this.#runPoststart(pid, stop);
    return this.#poststart;
  }

  async #runPoststart(pid: number, stop: () => Promise<unknown>): Promise<void> {
    const state = this.#state('running', pid);
    try {
      for (const hook of this.#plan.poststart) await this.#run(hook, state, this.#end.signal);
    } catch (error) {
      await stop().catch((failure: unknown) => this.#logger.warn({ err: failure }, 'cannot stop the container'));
      throw error;
    }
  }

  /** poststop: nothing of the container is left. Never rejects: one that fails is logged, and the rest goes on. */
  async poststop(): Promise<void> {
    this.#end.abort(new KilnError('canceled', `container ${this.#id} was deleted`));
    // Its error is Start's.
    await this.#poststart?.catch(() => {});
    if (!this.#begun) return;
    this.#begun = false;
    const state = this.#state('stopped');
    for (const hook of this.#plan.poststop) {
      try {
        await this.#run({ ...hook, timeoutMs: hook.timeoutMs ?? poststopLimitMs }, state);
      } catch (error) {
        this.#logger.warn({ err: error }, 'a poststop hook failed');
      }
    }
  }

  async #run(hook: ContainerHook, state: string, signal?: AbortSignal): Promise<void> {
    const { bundle } = this.#plan;
    try {
      // containerd may have removed the bundle already when it has given a removal up.
      await runHook(hook, { state, cwd: existsSync(bundle) ? bundle : '/', signal });
    } catch (error) {
      if (!(error instanceof KilnError) || signal?.aborted) throw error;
      throw new KilnError(error.code, `${hook.name}: ${error.message}`);
    }
  }

  /** runtime.md "State". @param pid absent of a container that is stopped */
  #state(status: 'creating' | 'running' | 'stopped', pid?: number): string {
    const { ociVersion, bundle, annotations } = this.#plan;
    const namespace = status === 'creating' ? { [networkNamespaceAnnotation]: `/proc/${pid}/ns/net` } : {};
    const state = { ociVersion, id: this.#id, status, bundle, pid, annotations: { ...namespace, ...annotations } };
    return JSON.stringify(state);
  }
}
