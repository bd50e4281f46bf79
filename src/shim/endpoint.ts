import { rmSync } from 'node:fs';
import { KilnError } from '../errors.ts';
import { requireSocketPath } from '../host/unix-socket.ts';
import type { Logger } from '../observe/logger.ts';
import { TtrpcServer } from '../rpc/ttrpc/index.ts';
import { toDeleteReply } from './delete-reply.ts';
import { processTable } from './process-service.ts';
import type { Keeper } from './relay/keeper.ts';
import type { RelaySession } from './relay/server.ts';
import { type SandboxContainer, SandboxService, type SandboxServiceOptions } from './sandbox-service.ts';
import { toSandboxBefore, toTtrpcStatus } from './status.ts';
import type { RestoredTask, TaskBefore, TaskContainer } from './task.ts';
import { noTask, type SandboxState, type TaskState } from './task-record.ts';
import { TaskService } from './task-service.ts';
import { TaskSlot, type TaskSlotOptions } from './task-slot.ts';

export interface EndpointOptions extends TaskSlotOptions, Pick<SandboxServiceOptions, 'createSandbox'> {
  /** What the relay listens on. */
  readonly socketPath: string;
  /** Called whenever `busy` may have changed to false. */
  readonly onQuiet: () => void;
  /** Called once, when the endpoint is gone. */
  readonly onDeleted: () => void;
}

/**
 * Requests in progress on one connection. A client that gives up a Wait cannot say so (ttrpc has no cancel), so over a
 * container's life there is one more for everybody who ever waited for it through the same containerd.
 * The relay keeps a few more (native/relay-clients.c, REQUEST_LIMIT), so that it is we who refuse.
 */
const maxConcurrentRequests = 16_384;

/** Takes over what an earlier kilnd has made. */
export interface Adopting {
  task(signal: AbortSignal): Promise<RestoredTask>;
  sandbox(signal: AbortSignal): Promise<SandboxContainer>;
}

/**
 * What containerd takes for one shim: the task service of one container, or the sandbox service of one pod. It exists from
 * the launcher's `start` to its `delete`; connections may come and go meanwhile (containerd restarts). Its socket, and
 * containerd's connections, belong to a relay, which hands each connection over as a session, so that they outlive this kilnd.
 */
export class Endpoint {
  readonly socketPath: string;
  readonly namespace: string;
  readonly id: string;
  readonly #options: EndpointOptions;
  readonly logger: Logger;
  readonly #task: TaskSlot;
  readonly #sandbox: SandboxService;
  #state: TaskState = noTask;
  #sandboxState: SandboxState | undefined;
  readonly #ttrpc: TtrpcServer;
  readonly #held = new Set<string>();
  #keeper: Keeper | undefined;
  #deletion: Promise<Uint8Array> | undefined;
  /** Ends the taking over of an earlier kilnd's task. */
  readonly #giveUp = new AbortController();

  /** Throws `failed-precondition` for a socket path that is too long. */
  constructor(options: EndpointOptions) {
    requireSocketPath(options.socketPath);
    this.#options = options;
    this.socketPath = options.socketPath;
    this.namespace = options.namespace;
    this.id = options.id;
    this.logger = options.logger;
    const { id, logger, createContainer, createSandbox } = options;
    this.#task = new TaskSlot({
      ...options,
      createContainer: async (request, signal) => {
        if (this.#sandbox.busy) throw new KilnError('already-exists', `${id} is a sandbox`);
        const container = await createContainer(request, signal);
        void container.exit.wait().then(() => this.#letRelayGo());
        return container;
      },
      save: (state) => {
        this.#state = state;
        this.#save();
      },
    });
    this.#sandbox = new SandboxService({
      ...{ id, logger },
      createSandbox: async (request, signal) => {
        if (this.#task.busy) throw new KilnError('already-exists', `${id} is a container`);
        return createSandbox(request, signal);
      },
      save: (state) => {
        this.#sandboxState = state;
        this.#save();
      },
    });
    this.#ttrpc = new TtrpcServer(
      {
        ...new TaskService(this.#task, logger).table(),
        ...this.#sandbox.table(),
        ...processTable((id) => this.#task.containerOf(id)),
      },
      {
        toStatus: toTtrpcStatus,
        onClose: () => {
          this.#letRelayGo();
          options.onQuiet();
        },
        maxConcurrentRequests,
      },
    );
  }

  /** What containerd dials. */
  get address(): string {
    return `unix://${this.socketPath}`;
  }

  get hasTask(): boolean {
    return this.#task.busy || this.#sandbox.busy;
  }

  /** Of its task; undefined while there is none. */
  get container(): TaskContainer | undefined {
    return this.#task.container;
  }

  get busy(): boolean {
    return this.hasTask || this.#ttrpc.connectionCount > 0;
  }

  /** containerd's connections that have said something. */
  get connectionCount(): number {
    return this.#ttrpc.connectionCount;
  }

  /** The pid of the relay; null while none has come. */
  get relayPid(): number | null {
    return this.#keeper?.header.relayPid ?? null;
  }

  /** Takes the relay as this endpoint's own, in place of an earlier one, and welcomes it. */
  attach(keeper: Keeper): void {
    const earlier = this.#keeper;
    this.#keeper = keeper;
    if (earlier !== undefined && earlier.header.relayPid !== keeper.header.relayPid) earlier.end();
    else earlier?.close();
    void keeper.closed.then(() => {
      if (this.#keeper === keeper) this.#keeper = undefined;
    });
    if (this.#deletion !== undefined) {
      keeper.end();
      return;
    }
    keeper.welcome();
    for (const path of this.#held) void this.#hold(keeper, path);
  }

  /**
   * Takes over the task of an earlier kilnd; requests wait for it. Resolves when that is done, or given up because of
   * `delete`. Never rejects.
   *
   * @param before what is known of the task until then
   */
  async restore(state: TaskState, before: TaskBefore, adopt: Adopting): Promise<void> {
    const { signal } = this.#giveUp;
    this.#sandboxState = state.sandbox;
    if (state.sandbox === undefined) {
      await this.#task.restore(state, before, state.create && adopt.task(signal));
      void this.container?.exit.wait().then(() => this.#letRelayGo());
    } else await this.#sandbox.restore(state.sandbox, toSandboxBefore(before), adopt.sandbox(signal));
    this.#options.onQuiet();
  }

  /**
   * Whoever calls Kiln as an OCI runtime may be the relay's parent, and wait for it as for any child of its own before it
   * asks for the container's removal: conmon does.
   */
  #letRelayGo(): void {
    if (this.#task.isOver && this.#ttrpc.connectionCount === 0) this.#keeper?.end();
  }

  #save(): void {
    const { sandbox: _, ...task } = this.#state;
    this.#options.save(this.#sandboxState === undefined ? task : { ...task, sandbox: this.#sandboxState });
  }

  /** Serves a connection of containerd. */
  serve({ header, socket }: RelaySession): void {
    this.#ttrpc.serve(socket, { replayedRequests: header.replayed });
    socket.resume();
  }

  /**
   * Has the relay keep a FIFO open until `releaseFifo`, so that its other side does not see kilnd go; also each later
   * relay of this endpoint. Resolves when it does, or at once without a relay. A failure is logged: the container runs
   * without it, only kilnd's death would be noticed.
   */
  async holdFifo(path: string): Promise<void> {
    this.#held.add(path);
    if (this.#keeper !== undefined) await this.#hold(this.#keeper, path);
  }

  /** Ends `holdFifo`. Resolves when the relay has closed it; a relay that is gone has. */
  async releaseFifo(path: string): Promise<void> {
    this.#held.delete(path);
    await this.#keeper?.release(path).catch((error: unknown) => {
      this.#options.logger.debug({ err: error, path }, 'the relay went before it released a FIFO');
    });
  }

  async #hold(keeper: Keeper, path: string): Promise<void> {
    try {
      await keeper.hold(path);
    } catch (error) {
      this.#options.logger.warn({ err: error, path }, 'the relay does not hold a FIFO');
    }
  }

  /** Ends the task or the sandbox, if it still lives, and the endpoint; returns what the launcher's `delete` prints. */
  delete(): Promise<Uint8Array> {
    this.#deletion ??= this.#delete();
    return this.#deletion;
  }

  async #delete(): Promise<Uint8Array> {
    this.#giveUp.abort(new KilnError('canceled', `container ${this.id} was deleted`));
    // First, so that nobody connects any more; what is connected goes on until its session ends. The file goes here and
    // now: a relay that is slow, or dead, must not be found by the next `start` of this container.
    this.#keeper?.end();
    rmSync(this.socketPath, { force: true });
    const [response, sandbox] = await Promise.all([this.#task.forceDelete(), this.#sandbox.forceDelete()]);
    await this.#ttrpc.close();
    await this.#keeper?.gone();
    this.#options.onDeleted();
    return sandbox === undefined ? response : toDeleteReply(sandbox);
  }
}
