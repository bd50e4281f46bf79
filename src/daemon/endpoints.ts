import { createHash } from 'node:crypto';
import { existsSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import type { KilnPaths } from '../config/paths.ts';
import { KilnError } from '../errors.ts';
import { Turns } from '../host/turns.ts';
import type { DaemonLog, Logger } from '../observe/logger.ts';
import { TaskLog } from '../observe/task-log.ts';
import { Timeline } from '../observe/timeline.ts';
import type { Timelines } from '../observe/timelines.ts';
import type { ExecRequest } from '../sandbox/exec.ts';
import { type Bootstrap, encodeStartAnswer, readBootstrap } from '../shim/control/bootstrap.ts';
import type { ControlReply, LauncherContext, StartRequest } from '../shim/control/request.ts';
import { unknownTaskDeleted } from '../shim/delete-reply.ts';
import { Endpoint } from '../shim/endpoint.ts';
import { EventPublisher } from '../shim/publisher.ts';
import type { RelayHeader } from '../shim/relay/header.ts';
import type { SandboxRequest } from '../shim/sandbox-request.ts';
import type { SandboxContainer } from '../shim/sandbox-service.ts';
import type { FifoHolds } from '../shim/stdio.ts';
import type { ExecTaskRequest, RestoredTask, TaskContainer, TaskRequest } from '../shim/task.ts';
import { removeTaskRecord, type TaskRecord, type TaskState, writeTaskRecord } from '../shim/task-record.ts';
import { containerDirectory, knownOf, taskFile } from './earlier.ts';
import { Endings } from './endings.ts';
import { isOfPod } from './pods.ts';

/** How long events may still take to reach containerd when kilnd stops, in ms. */
const lastEventsMs = 2000;

/** What a container gets from kilnd. */
export interface ContainerContext {
  /** containerd's. */
  readonly namespace: string;
  readonly id: string;
  /** A directory for the container alone; not yet existing. */
  readonly directory: string;
  /** The directory of another container of the same containerd and namespace. */
  readonly directoryOf: (id: string) => string;
  readonly timeline: Timeline;
  readonly logger: Logger;
  /** Keeps FIFOs open while no kilnd is there. */
  readonly holds: FifoHolds;
}

/** Makes containers and sandboxes, and takes them over. */
export interface ContainerMaker {
  readonly createContainer: (
    request: TaskRequest,
    context: ContainerContext,
    signal: AbortSignal,
  ) => Promise<TaskContainer>;
  readonly createSandbox: (
    request: SandboxRequest,
    context: ContainerContext,
    signal: AbortSignal,
  ) => Promise<SandboxContainer>;
  /** As `adoptContainer`, of a sandbox. */
  readonly adoptSandbox: (context: ContainerContext, signal: AbortSignal) => Promise<SandboxContainer>;
  /** Takes over the container of an earlier kilnd, or what is left of it; rejects only when the signal aborts. */
  readonly adoptContainer: (state: TaskState, context: ContainerContext, signal: AbortSignal) => Promise<RestoredTask>;
  readonly prepareExec: (request: ExecTaskRequest, context: Omit<ContainerContext, 'timeline'>) => ExecRequest;
}

export interface EndpointsOptions extends ContainerMaker {
  readonly paths: KilnPaths;
  readonly log: DaemonLog;
  readonly timelines: Timelines;
  /** Whether kilnd takes new endpoints; a launcher that comes when it has `stopped` is to ask the next one. */
  readonly intake: () => 'open' | 'draining' | 'stopped';
  /** Called after anything that may have been the last. */
  readonly onQuiet: () => void;
  /** Called after each endpoint's end. */
  readonly onDeleted: () => void;
}

interface Served {
  readonly endpoint: Endpoint;
  /** When the launcher was started that the endpoint was made for; relays that are older are an earlier endpoint's. */
  readonly madeForNs: bigint;
  /** When the latest launcher was started for it, in ms since the Unix epoch. */
  launchedAtMs: number;
}

/**
 * kilnd's endpoints, one per container, by key: a hash of the containerd, its namespace and the id, so that every socket
 * path stays short whatever a container is called.
 */
export class Endpoints {
  readonly #options: EndpointsOptions;
  readonly #logger: Logger;
  readonly #served = new Map<string, Served>();
  /** A `start` waits for a `delete` of the same container, which would take the new endpoint's socket away. */
  readonly #turns = new Turns();
  readonly #publishers = new Map<string, EventPublisher>();
  readonly #endings = new Endings();

  constructor(options: EndpointsOptions) {
    this.#options = options;
    this.#logger = options.log.logger;
  }

  get size(): number {
    return this.#served.size;
  }

  list(): Endpoint[] {
    return Array.from(this.#served.values(), ({ endpoint }) => endpoint);
  }

  get taskCount(): number {
    return this.list().filter((endpoint) => endpoint.hasTask).length;
  }

  /** Makes the container's endpoint for a launcher, or finds it; null when the launcher is to ask the next kilnd. */
  start(request: StartRequest): Promise<ControlReply | null> {
    return this.#turns.take(keyOf(request), () => this.#start(request));
  }

  /** Ends the container's endpoint for a launcher, with all that is left of its task. */
  delete(launcher: LauncherContext): Promise<ControlReply> {
    const key = keyOf(launcher);
    return this.#turns.take(key, () => this.#delete(key, launcher.launcherStartedNs));
  }

  /** Ends all. */
  async close(): Promise<void> {
    await Promise.all([...this.#served.keys()].map((key) => this.#delete(key, nowNs())));
  }

  /** After `close`, and after whatever still sends events: they get a little time to reach containerd. */
  async flushEvents(): Promise<void> {
    const publishers = [...this.#publishers.values()];
    await Promise.all(publishers.map((publisher) => publisher.flush(lastEventsMs)));
    await Promise.all(publishers.map((publisher) => publisher.close()));
  }

  /** Makes the endpoint of a task that an earlier kilnd has written down, and begins to take its container over. */
  restore(key: string, { context, state }: TaskRecord): Promise<void> {
    const { adoptContainer, adoptSandbox } = this.#options;
    const endpoint = this.#make(key, context);
    const given = { ...this.#contextOf(key, context, endpoint), timeline: new Timeline() };
    return endpoint.restore(state, knownOf(given.directory, state), {
      task: (signal) => adoptContainer(state, given, signal),
      sandbox: (signal) => adoptSandbox(given, signal),
    });
  }

  /** Makes the container's endpoint, or finds it when containerd asks again, and leaves its address in the bundle. */
  async #start(request: StartRequest): Promise<ControlReply | null> {
    const key = keyOf(request);
    const bootstrap = readBootstrap(request, request.payload);
    let made: Endpoint | undefined;
    try {
      // Without an answer the launcher asks the next kilnd; while we drain there is none, and nobody should wait.
      const intake = this.#options.intake();
      if (intake === 'stopped') return null;
      if (intake === 'draining') throw new KilnError('unavailable', 'kilnd is stopping and takes no new container');
      const known = this.#served.get(key);
      if (known === undefined) {
        this.#endings.forget(key);
        made = this.#make(key, request, bootstrap);
      } else known.launchedAtMs = inMs(request.launcherStartedNs);
      const { address, socketPath } = made ?? (known as Served).endpoint;
      // containerd 1.6 and 1.7 find the endpoint again by this file after their own restart.
      writeFileSync(path.join(request.bundle, 'address'), address, { mode: 0o600 });
      // Where version 3 is answered for a pod, containerd has all its containers served there, and cleans up after none.
      const isThirdOfPod = bootstrap.taskVersion === 3 && (await isOfPod(request.bundle));
      const answered = isThirdOfPod ? { ...bootstrap, taskVersion: 2 as const } : bootstrap;
      // Stopping removes this endpoint, too: the address would be good for nothing.
      return this.#options.intake() !== 'stopped'
        ? { exitCode: 0, stdout: encodeStartAnswer(answered, address), relaySocket: socketPath }
        : null;
    } catch (error) {
      // containerd never learns of it, so it would not ask for its removal either.
      if (made !== undefined) await this.#delete(key, request.launcherStartedNs);
      throw error;
    } finally {
      this.#options.onQuiet();
    }
  }

  /** @param bootstrap what containerd has told with `start`; a relay of an earlier kilnd has only its launcher's flags */
  #make(
    key: string,
    launcher: LauncherContext,
    bootstrap: Bootstrap = readBootstrap(launcher, new Uint8Array(0)),
  ): Endpoint {
    const { paths, log, timelines, createContainer, createSandbox, prepareExec } = this.#options;
    const { namespace, id, bundle, launcherStartedNs } = launcher;
    const publisher = launcher.ttrpcAddress === '' ? undefined : this.#publisherFor(launcher.ttrpcAddress);
    const taskLog = new TaskLog(bundle, id);
    const logger = log.forTask(taskLog, bootstrap.logLevel).child({ namespace, id });
    logger.debug({ bootstrap }, 'containerd starts a container');
    const newContext = () => {
      const timeline = timelines.begin(namespace, id);
      timeline.mark('launcher', served.launchedAtMs);
      return { ...this.#contextOf(key, launcher, endpoint), timeline };
    };
    const endpoint: Endpoint = new Endpoint({
      socketPath: path.join(paths.stateDir, 's', key),
      namespace,
      id,
      logger,
      // Nobody listens to what Kiln's own command line starts.
      publish: (event, onSent) => (publisher === undefined ? onSent() : publisher.publish(namespace, event, onSent)),
      save: (state) => this.#save(key, { context: launcher, state }, logger),
      onQuiet: () => this.#options.onQuiet(),
      onDeleted: () => taskLog.close(),
      prepareExec: (exec) => prepareExec(exec, this.#contextOf(key, launcher, endpoint)),
      createContainer: (create, signal) => createContainer(create, newContext(), signal),
      createSandbox: (create, signal) => createSandbox(create, newContext(), signal),
    });
    const served = { endpoint, madeForNs: launcherStartedNs, launchedAtMs: inMs(launcherStartedNs) };
    this.#served.set(key, served);
    return endpoint;
  }

  #contextOf(key: string, launcher: LauncherContext, endpoint: Endpoint): Omit<ContainerContext, 'timeline'> {
    const { stateDir } = this.#options.paths;
    const { namespace, id, ttrpcAddress } = launcher;
    const directoryOf = (other: string) => containerDirectory(stateDir, keyOf({ ttrpcAddress, namespace, id: other }));
    return {
      ...{ namespace, id },
      directory: containerDirectory(stateDir, key),
      directoryOf,
      logger: endpoint.logger,
      holds: endpoint,
    };
  }

  /** What cannot be written down is lost only if this kilnd is killed: no reason to fail the container now. */
  #save(key: string, record: TaskRecord, logger: Logger): void {
    // News of the last events may come after the endpoint's end.
    if (!this.#served.has(key)) return;
    try {
      writeTaskRecord(taskFile(this.#options.paths.stateDir, key), record);
    } catch (error) {
      logger.error({ err: error }, 'cannot write down the task: it would not outlive kilnd');
    }
  }

  /**
   * The endpoint of a relay. One that this kilnd does not know was made by an earlier one, which never had a task there
   * (or it would be known), and is made again. Undefined when the relay's endpoint is over. Never rejects.
   */
  async of({ socketPath, context }: RelayHeader): Promise<Endpoint | undefined> {
    const key = path.basename(socketPath);
    // Not by turns where it is known: a `delete` that is under way waits for its relay.
    if (!this.#served.has(key)) await this.#turns.take(key, async () => this.#makeAgain(key, context));
    const served = this.#served.get(key);
    return served === undefined || context.launcherStartedNs < served.madeForNs ? undefined : served.endpoint;
  }

  #makeAgain(key: string, context: LauncherContext): void {
    const { namespace, id, launcherStartedNs } = context;
    if (this.#served.has(key) || this.#options.intake() !== 'open') return;
    if (this.#endings.covers(key, launcherStartedNs) || !existsSync(context.bundle)) return;
    try {
      this.#make(key, context);
      this.#logger.info({ namespace, id }, 'made an endpoint again for its relay');
    } catch (error) {
      this.#logger.error({ err: error, namespace, id }, 'cannot make an endpoint again for its relay');
    }
    this.#options.onQuiet();
  }

  async #delete(key: string, at: bigint): Promise<ControlReply> {
    const served = this.#served.get(key);
    this.#endings.add(key, at);
    if (served === undefined) {
      // A relay that has lost kilnd may still listen there, and must not be found by the next `start`.
      rmSync(path.join(this.#options.paths.stateDir, 's', key), { force: true });
      return { exitCode: 0, stdout: unknownTaskDeleted() };
    }
    const stdout = await served.endpoint.delete();
    this.#served.delete(key);
    removeTaskRecord(taskFile(this.#options.paths.stateDir, key));
    this.#options.onDeleted();
    this.#options.onQuiet();
    return { exitCode: 0, stdout };
  }

  /** One publisher per containerd; it lives as long as kilnd. */
  #publisherFor(ttrpcAddress: string): EventPublisher {
    const known = this.#publishers.get(ttrpcAddress);
    if (known !== undefined) return known;
    const publisher = new EventPublisher({ address: ttrpcAddress, log: this.#logger });
    this.#publishers.set(ttrpcAddress, publisher);
    return publisher;
  }
}

/** The same container for the launcher's `start` and `delete`: the containerd, its namespace, the id. */
function keyOf(request: { ttrpcAddress: string; namespace: string; id: string }): string {
  const { ttrpcAddress, namespace, id } = request;
  return createHash('sha256').update(`${ttrpcAddress}\0${namespace}\0${id}`).digest('hex').slice(0, 16);
}

/** Of a time in ns. */
function inMs(ns: bigint): number {
  return Number(ns / 1000n) / 1000;
}

/** The time of now, as launchers tell it. */
function nowNs(): bigint {
  return BigInt(Date.now()) * 1_000_000n;
}
