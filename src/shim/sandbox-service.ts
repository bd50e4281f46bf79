import * as api from '../../gen/containerd/sandbox.ts';
import { forLog, KilnError } from '../errors.ts';
import type { Logger } from '../observe/logger.ts';
import { type CallContext, type ServiceTable, unary } from '../rpc/ttrpc/index.ts';
import { told } from './answers.ts';
import { hostCgroupMode, toMetrics } from './metrics.ts';
import { readSandboxRequest, type SandboxRequest } from './sandbox-request.ts';
import { toTimestamp } from './status.ts';
import type { EndedProcess, TaskContainer } from './task.ts';
import type { SandboxState } from './task-record.ts';

/*
 * containerd's sandbox service (api/runtime/sandbox/v1/sandbox.proto), which its sandbox controller "shim" calls.
 *
 * One pod of CRI is: the launcher's `start` in a bundle without a config.json, CreateSandbox, StartSandbox, WaitSandbox (open
 * until the sandbox's end), Platform and SandboxStatus with each container, StopSandbox, ShutdownSandbox; then containerd
 * closes the connection and runs the launcher's `delete`. When Create or Start fails, ShutdownSandbox comes at once. The
 * pod's containers are tasks, each with an endpoint of its own. There are no events: containerd makes them of the answers.
 */

/** What the service needs of what stands for a pod; sandbox/pod-container.ts has it. */
export interface SandboxContainer
  extends Pick<TaskContainer, 'id' | 'pid' | 'state' | 'exit' | 'start' | 'stats' | 'destroy'> {
  /**
   * Ends it and whatever runs in it; safe to call twice.
   *
   * @param graceMs how long that may take before it is ended as by a power failure; undefined for the usual time
   */
  stop(graceMs?: number): Promise<void>;
  /** Resolves when the guest answers. Throws `failed-precondition` when it has ended, `unavailable` when it does not answer. */
  ping(): Promise<void>;
  /** What an operator may want to know of it, as JSON. */
  describe(): Readonly<Record<string, unknown>>;
}

/** What is answered of a sandbox until it is taken over. */
export interface SandboxBefore {
  readonly pid: number;
  readonly ready: boolean;
}

export interface SandboxServiceOptions {
  /** The only sandbox id this service answers for. */
  readonly id: string;
  readonly createSandbox: (request: SandboxRequest, signal: AbortSignal) => Promise<SandboxContainer>;
  /** Called with every change that the next kilnd has to know of; undefined when there is no sandbox any more. */
  readonly save: (state: SandboxState | undefined) => void;
  readonly logger: Logger;
}

type Method<Request, Response> = (request: Request, context: CallContext) => Promise<Response>;

interface Held {
  readonly container: SandboxContainer;
  readonly createdAt: Date;
}

export class SandboxService {
  readonly #options: SandboxServiceOptions;
  #held: Held | undefined;
  #creating: { readonly abort: AbortController; readonly done: Promise<unknown> } | undefined;
  /** While the sandbox of an earlier kilnd is taken over. */
  #restoring: { readonly createdAt: Date; readonly before: SandboxBefore; readonly done: Promise<void> } | undefined;
  #last: EndedProcess | undefined;
  #closed = false;

  constructor(options: SandboxServiceOptions) {
    this.#options = options;
  }

  /** True while there is something that must not be lost. */
  get busy(): boolean {
    return this.#held !== undefined || this.#creating !== undefined || this.#restoring !== undefined;
  }

  /**
   * Takes over what an earlier kilnd has written down. Requests wait for `adopting`, except for SandboxStatus. Never rejects.
   *
   * @param before what is known of the sandbox until then
   */
  async restore(state: SandboxState, before: SandboxBefore, adopting: Promise<SandboxContainer>): Promise<void> {
    const createdAt = new Date(state.createdAtMs);
    const done = adopting
      .then((container) => {
        this.#held = { container, createdAt };
      })
      .catch((error: unknown) => {
        this.#options.logger.error({ err: forLog(error) }, 'cannot take the sandbox over');
      })
      .finally(() => {
        this.#restoring = undefined;
      });
    this.#restoring = { createdAt, before, done };
    await done;
  }

  /** The whole service: method name to handler. A method that is not here is answered Unimplemented. */
  table(): ServiceTable {
    const { logger } = this.#options;
    const before = () => this.#restoring?.done;
    const now = <Request, Response>(name: string, method: Method<Request, Response>) =>
      told(name, { logger }, method.bind(this));
    const then = <Request, Response>(name: string, method: Method<Request, Response>) =>
      told(name, { logger, before }, method.bind(this));
    const methods = {
      CreateSandbox: unary(api.CreateSandboxRequest, api.CreateSandboxResponse, then('CreateSandbox', this.#create)),
      StartSandbox: unary(api.StartSandboxRequest, api.StartSandboxResponse, then('StartSandbox', this.#start)),
      Platform: unary(api.PlatformRequest, api.PlatformResponse, now('Platform', this.#platform)),
      StopSandbox: unary(api.StopSandboxRequest, api.StopSandboxResponse, then('StopSandbox', this.#stop)),
      WaitSandbox: unary(api.WaitSandboxRequest, api.WaitSandboxResponse, then('WaitSandbox', this.#wait)),
      // containerd has little patience for it after its own restart.
      SandboxStatus: unary(api.SandboxStatusRequest, api.SandboxStatusResponse, now('SandboxStatus', this.#status)),
      PingSandbox: unary(api.PingRequest, api.PingResponse, then('PingSandbox', this.#ping)),
      ShutdownSandbox: unary(
        api.ShutdownSandboxRequest,
        api.ShutdownSandboxResponse,
        then('ShutdownSandbox', this.#shutdown),
      ),
      SandboxMetrics: unary(
        api.SandboxMetricsRequest,
        api.SandboxMetricsResponse,
        then('SandboxMetrics', this.#metrics),
      ),
    };
    return { 'containerd.runtime.sandbox.v1.Sandbox': methods };
  }

  /**
   * For the launcher's `delete`: ends whatever is left; there is no CreateSandbox afterwards. Returns the sandbox that is
   * there, or was last. Never rejects: what cannot be released is logged, since nobody would ask again.
   */
  async forceDelete(): Promise<EndedProcess | undefined> {
    this.#closed = true;
    await this.#restoring?.done;
    try {
      await this.#end();
    } catch (error) {
      this.#options.logger.error({ err: forLog(error) }, 'cannot release everything of the sandbox');
    }
    return this.#last;
  }

  #requireOwn(id: string): void {
    if (id !== this.#options.id) throw new KilnError('not-found', `sandbox ${id} does not exist`);
  }

  #find(id: string): Held {
    this.#requireOwn(id);
    if (this.#held === undefined) throw new KilnError('not-found', `sandbox ${id} does not exist`);
    return this.#held;
  }

  async #create(request: api.CreateSandboxRequest, { signal, replayed }: CallContext): Promise<object> {
    const { id } = this.#options;
    if (request.sandboxId !== id) {
      throw new KilnError('invalid-argument', `this endpoint serves sandbox ${id}, not ${request.sandboxId}`);
    }
    if (this.#closed) throw new KilnError('unavailable', `sandbox ${id} is being deleted`);
    // An earlier kilnd may have got so far, and no further.
    if (replayed && this.#held !== undefined) return {};
    if (this.busy) throw new KilnError('already-exists', `sandbox ${id} already exists`);
    const abort = new AbortController();
    const done = this.#make(readSandboxRequest(request), AbortSignal.any([signal, abort.signal]));
    this.#creating = { abort, done };
    try {
      await done;
      return {};
    } finally {
      this.#creating = undefined;
    }
  }

  /** When nobody wants the sandbox any more once it is there, it is undone. */
  async #make(request: SandboxRequest, signal: AbortSignal): Promise<void> {
    const createdAt = new Date();
    const container = await this.#options.createSandbox(request, signal);
    if (signal.aborted) {
      await container.destroy();
      throw signal.reason;
    }
    this.#held = { container, createdAt };
    this.#options.save({ createdAtMs: createdAt.getTime() });
  }

  async #start({ sandboxId }: api.StartSandboxRequest, { replayed }: CallContext): Promise<api.StartSandboxResponse> {
    const { container, createdAt } = this.#find(sandboxId);
    if (!replayed || container.state.kind === 'created') await container.start();
    return { pid: container.pid, createdAt: toTimestamp(createdAt), spec: undefined };
  }

  async #platform({ sandboxId }: api.PlatformRequest): Promise<api.PlatformResponse> {
    this.#requireOwn(sandboxId);
    return { platform: { os: 'linux', architecture: goArchitecture(process.arch), variant: '' } };
  }

  async #stop({ sandboxId, timeoutSecs }: api.StopSandboxRequest): Promise<object> {
    const { container } = this.#find(sandboxId);
    await container.stop(timeoutSecs === 0 ? undefined : timeoutSecs * 1000);
    return {};
  }

  async #wait({ sandboxId }: api.WaitSandboxRequest): Promise<api.WaitSandboxResponse> {
    const { status, at } = await this.#find(sandboxId).container.exit.wait();
    return { exitStatus: status, exitedAt: toTimestamp(at) };
  }

  async #status({ sandboxId, verbose }: api.SandboxStatusRequest): Promise<api.SandboxStatusResponse> {
    this.#requireOwn(sandboxId);
    const common = { sandboxId, extra: undefined };
    if (this.#restoring !== undefined) {
      const { createdAt, before } = this.#restoring;
      const { pid, ready } = before;
      const info = verbose ? toInfo({ sandboxID: sandboxId, pid, takenOver: false }) : {};
      return { ...common, pid, state: stateName(ready), info, createdAt: toTimestamp(createdAt), exitedAt: undefined };
    }
    const { container, createdAt } = this.#find(sandboxId);
    const exit = container.exit.peek();
    return {
      ...common,
      pid: container.pid,
      state: stateName(exit === undefined && container.state.kind === 'running'),
      info: verbose ? toInfo({ sandboxID: sandboxId, pid: container.pid, ...container.describe() }) : {},
      createdAt: toTimestamp(createdAt),
      exitedAt: exit && toTimestamp(exit.at),
    };
  }

  async #ping({ sandboxId }: api.PingRequest): Promise<object> {
    await this.#find(sandboxId).container.ping();
    return {};
  }

  /** Also of a sandbox that was never created, or is gone already: afterwards there is none. */
  async #shutdown({ sandboxId }: api.ShutdownSandboxRequest): Promise<object> {
    this.#requireOwn(sandboxId);
    await this.#end();
    return {};
  }

  async #end(): Promise<void> {
    if (this.#creating !== undefined) {
      const { abort, done } = this.#creating;
      abort.abort(new KilnError('canceled', `sandbox ${this.#options.id} was shut down during CreateSandbox`));
      await done.catch(() => {});
    }
    const held = this.#held;
    if (held === undefined) return;
    const { container } = held;
    await container.destroy();
    const exit = await container.exit.wait();
    this.#last = { execId: '', pid: container.pid, exit };
    if (this.#held !== held) return;
    this.#held = undefined;
    this.#options.save(undefined);
  }

  async #metrics({ sandboxId }: api.SandboxMetricsRequest): Promise<api.SandboxMetricsResponse> {
    const data = toMetrics(await this.#find(sandboxId).container.stats(), hostCgroupMode());
    return { metrics: { id: sandboxId, timestamp: toTimestamp(new Date()), data } };
  }
}

/** CRI's names. */
function stateName(ready: boolean): string {
  return ready ? 'SANDBOX_READY' : 'SANDBOX_NOTREADY';
}

/** As crictl shows it, and as containerd's own sandboxes have it: one JSON text. */
function toInfo(facts: Readonly<Record<string, unknown>>): Record<string, string> {
  return { info: JSON.stringify(facts) };
}

/** Go's name of Node's architecture. */
function goArchitecture(arch: string): string {
  return arch === 'x64' ? 'amd64' : arch;
}
