import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import type { KilnPaths } from '../config/paths.ts';
import { forLog, KilnError } from '../errors.ts';
import type { DaemonLog, Logger } from '../observe/logger.ts';
import { TaskLog } from '../observe/task-log.ts';
import { Timeline } from '../observe/timeline.ts';
import { Timelines } from '../observe/timelines.ts';
import type { ExecRequest } from '../sandbox/exec.ts';
import { type Bootstrap, encodeStartAnswer, readBootstrap } from '../shim/control/bootstrap.ts';
import type {
  ControlReply,
  ControlRequest,
  LauncherContext,
  StartRequest,
  TimelineRequest,
} from '../shim/control/request.ts';
import { ControlServer } from '../shim/control/server.ts';
import { Endpoint } from '../shim/endpoint.ts';
import { EventPublisher } from '../shim/publisher.ts';
import type { RelayHeader } from '../shim/relay/header.ts';
import type { Keeper } from '../shim/relay/keeper.ts';
import { RelayServer, type RelaySession } from '../shim/relay/server.ts';
import type { FifoHolds } from '../shim/stdio.ts';
import type { ExecTaskRequest, RestoredTask, TaskContainer, TaskRequest } from '../shim/task.ts';
import { removeTaskRecord, type TaskRecord, type TaskState, writeTaskRecord } from '../shim/task-record.ts';
import { unknownTaskDeleted } from '../shim/task-service.ts';
import { kilnVersion } from '../version.ts';
import { removeDeadSockets } from './dead-sockets.ts';
import { containerDirectory, knownOf, takeStock, taskFile } from './earlier.ts';
import { Endings } from './endings.ts';
import { Turns } from './turns.ts';

/** How long events may still take to reach containerd when kilnd stops, in ms. */
const lastEventsMs = 2000;

/**
 * How long a kilnd that is to stop keeps an endpoint without a task, in ms. Between the task's end and containerd's
 * `delete`, which would start another kilnd, lie some hundredths of a second; containerd gives the `delete` 5 s.
 */
const lingerMs = 5000;

/** What a container gets from kilnd. */
export interface ContainerContext {
  /** containerd's. */
  readonly namespace: string;
  /** A directory for the container alone; not yet existing. */
  readonly directory: string;
  /** The directory of another container of the same containerd and namespace. */
  readonly directoryOf: (id: string) => string;
  readonly timeline: Timeline;
  readonly logger: Logger;
  /** Keeps FIFOs open while no kilnd is there. */
  readonly holds: FifoHolds;
}

export interface DaemonOptions {
  readonly paths: KilnPaths;
  readonly idleTimeoutMs: number;
  readonly createContainer: (
    request: TaskRequest,
    context: ContainerContext,
    signal: AbortSignal,
  ) => Promise<TaskContainer>;
  /** Takes over the container of an earlier kilnd, or what is left of it; rejects only when the signal aborts. */
  readonly adoptContainer: (state: TaskState, context: ContainerContext, signal: AbortSignal) => Promise<RestoredTask>;
  readonly prepareExec: (request: ExecTaskRequest, context: Omit<ContainerContext, 'timeline'>) => ExecRequest;
  /** Called at the start, with what resolves when all that an earlier kilnd has left is taken over or given up. */
  readonly onRestoring: (restored: Promise<unknown>) => void;
  /** Removes what no snapshot needs any more; called after each container. */
  readonly collectGarbage: () => Promise<unknown>;
  /** What else `kiln status` shows. */
  readonly status: () => Readonly<Record<string, unknown>>;
  /** Called with the timeline of a container whose process runs. */
  readonly onStarted?: (timeline: Timeline) => void;
  /** Ends what belongs to no container; called once, when all of them are gone. */
  readonly release: () => Promise<void>;
  readonly log: DaemonLog;
  /** Called once, when everything is closed and the process may end. */
  readonly onStopped: () => void;
}

/** Timelines that `kiln timeline` can ask for: some 200 bytes each. */
const timelinesKept = 500;

interface Served {
  readonly endpoint: Endpoint;
  /** When the launcher was started that the endpoint was made for; relays that are older are an earlier endpoint's. */
  readonly madeForNs: bigint;
  /** When the latest launcher was started for it, in ms since the Unix epoch. */
  launchedAtMs: number;
}

/**
 * kilnd: answers the launcher, and keeps one endpoint per container.
 *
 * State folder: `kilnd.sock` (control), `relay.sock` (relays), `s/<key>` (what the relay of a container listens on),
 * `c/<key>/` (one private directory per container), `t/<key>.json` (what is written down of its task). The key is a hash,
 * so that every socket path stays short whatever a container is called.
 */
export class Daemon {
  readonly #options: DaemonOptions;
  readonly #logger: Logger;
  readonly #served = new Map<string, Served>();
  /** A `start` waits for a `delete` of the same container, which would take the new endpoint's socket away. */
  readonly #turns = new Turns();
  readonly #publishers = new Map<string, EventPublisher>();
  readonly #endings = new Endings();
  readonly #timelines: Timelines;
  #relays: RelayServer | undefined;
  #control: ControlServer | undefined;
  #idleTimer: NodeJS.Timeout | undefined;
  #draining = false;
  /** What an earlier kilnd left is taken over, or given up. */
  #restored = false;
  #stopping: Promise<void> | undefined;

  constructor(options: DaemonOptions) {
    this.#options = options;
    this.#logger = options.log.logger;
    this.#timelines = new Timelines(timelinesKept, options.onStarted);
  }

  /** Clears what a killed kilnd left, and resolves when the launcher is answered. Needs the state folder's lock. */
  async start(): Promise<void> {
    const { paths } = this.#options;
    // All that is to be known of an earlier kilnd's containers must be, before their relays ask for them.
    const tasks = await takeStock(paths.stateDir, this.#logger);
    for (const name of ['s', 'c', 't']) mkdirSync(path.join(paths.stateDir, name), { recursive: true, mode: 0o700 });
    await removeDeadSockets(path.join(paths.stateDir, 's'));
    // Before the control socket, by which a relay knows that kilnd is here.
    this.#relays = await RelayServer.listen(paths.stateDir, {
      onKeeper: (keeper) => void this.#onKeeper(keeper),
      onSession: (session) => void this.#onSession(session),
      onError: (error) => this.#logger.error({ err: error }, 'a relay cannot be heard'),
    });
    this.#control = await ControlServer.listen(paths.stateDir, (request) => this.#handle(request), {
      onError: (error, request) => this.#logger.error({ err: error, action: request?.kind }, 'control request failed'),
    });
    const restored = Array.from(tasks, ([key, record]) => this.#restore(key, record));
    // Before that, nobody knows which disks are in use.
    const all = Promise.all(restored);
    this.#options.onRestoring(all);
    void all.then(() => {
      this.#restored = true;
      this.#collectGarbage();
    });
    this.#onQuiet();
  }

  /**
   * Stops now if there is no container, else as soon as the last one is gone; asked a second time, at once. Resolves when
   * all is closed, or at once when that has to wait. Never rejects.
   */
  async stop(): Promise<void> {
    if (this.#stopping !== undefined || this.#draining || this.#served.size === 0) {
      this.#stopping ??= this.#shutDown();
      return this.#stopping;
    }
    this.#draining = true;
    const tasks = this.#taskCount();
    this.#logger.warn({ tasks }, 'asked to stop; waiting for the containers (ask again to end them)');
    this.#onQuiet();
  }

  /** Makes the endpoint of a task that an earlier kilnd has written down, and begins to take its container over. */
  #restore(key: string, { context, state }: TaskRecord): Promise<void> {
    const { adoptContainer } = this.#options;
    const endpoint = this.#makeEndpoint(key, context);
    const given = { ...this.#contextOf(key, context, endpoint), timeline: new Timeline() };
    return endpoint.restore(state, knownOf(given.directory), (signal) => adoptContainer(state, given, signal));
  }

  async #handle(request: ControlRequest): Promise<ControlReply | null> {
    switch (request.kind) {
      case 'start':
        return this.#turns.take(keyOf(request), () => this.#startEndpoint(request));
      case 'delete':
        return this.#turns.take(keyOf(request), () => this.#deleteEndpoint(keyOf(request), request.launcherStartedNs));
      case 'status':
        return text(0, `${JSON.stringify(this.#status())}\n`);
      case 'timeline':
        return this.#timelineOf(request);
      case 'stop':
        // After this answer is sent, since closing waits for it.
        setImmediate(() => void this.stop());
        return text(0, `${JSON.stringify(this.#status())}\n`);
    }
  }

  #status() {
    const containers = this.#endpoints().map(({ namespace, id, hasTask, relayPid, connectionCount }) => {
      return { namespace, id, hasTask, relayPid, connections: connectionCount };
    });
    return { version: kilnVersion, pid: process.pid, draining: this.#draining, containers, ...this.#options.status() };
  }

  #timelineOf({ namespace, id }: TimelineRequest): ControlReply {
    const timeline = this.#timelines.find(namespace, id);
    if (timeline === undefined) {
      throw new KilnError('not-found', `kilnd knows no start of a container ${id} in the namespace ${namespace}`, {
        hint: `it keeps those of the last ${timelinesKept} containers that it started itself`,
      });
    }
    return text(0, `${JSON.stringify({ namespace, id, ...timeline.toJSON() })}\n`);
  }

  get containers(): number {
    return this.#taskCount();
  }

  #endpoints(): Endpoint[] {
    return Array.from(this.#served.values(), ({ endpoint }) => endpoint);
  }

  /** Makes the container's endpoint, or finds it when containerd asks again, and leaves its address in the bundle. */
  async #startEndpoint(request: StartRequest): Promise<ControlReply | null> {
    const key = keyOf(request);
    const bootstrap = readBootstrap(request, request.payload);
    let made: Endpoint | undefined;
    try {
      // Without an answer the launcher asks the next kilnd; while we drain there is none, and nobody should wait.
      if (this.#stopping !== undefined) return null;
      if (this.#draining) throw new KilnError('unavailable', 'kilnd is stopping and takes no new container');
      const known = this.#served.get(key);
      if (known === undefined) {
        this.#endings.forget(key);
        made = this.#makeEndpoint(key, request, bootstrap);
      } else known.launchedAtMs = inMs(request.launcherStartedNs);
      const { address, socketPath } = made ?? (known as Served).endpoint;
      // containerd 1.6 and 1.7 find the endpoint again by this file after their own restart.
      writeFileSync(path.join(request.bundle, 'address'), address, { mode: 0o600 });
      // Stopping removes this endpoint, too: the address would be good for nothing.
      return this.#stopping === undefined
        ? { exitCode: 0, stdout: encodeStartAnswer(bootstrap, address), relaySocket: socketPath }
        : null;
    } catch (error) {
      // containerd never learns of it, so it would not ask for its removal either.
      if (made !== undefined) await this.#deleteEndpoint(key, request.launcherStartedNs);
      throw error;
    } finally {
      this.#onQuiet();
    }
  }

  /** @param bootstrap what containerd has told with `start`; a relay of an earlier kilnd has only its launcher's flags */
  #makeEndpoint(
    key: string,
    launcher: LauncherContext,
    bootstrap: Bootstrap = readBootstrap(launcher, new Uint8Array(0)),
  ): Endpoint {
    const { paths, log, createContainer, prepareExec } = this.#options;
    const { namespace, id, bundle, launcherStartedNs } = launcher;
    const publisher = this.#publisherFor(launcher.ttrpcAddress);
    const taskLog = new TaskLog(bundle, id);
    const logger = log.forTask(taskLog, bootstrap.logLevel).child({ namespace, id });
    logger.debug({ bootstrap }, 'containerd starts a container');
    const endpoint: Endpoint = new Endpoint({
      socketPath: path.join(paths.stateDir, 's', key),
      namespace,
      id,
      logger,
      publish: (event, onSent) => publisher.publish(namespace, event, onSent),
      save: (state) => this.#save(key, { context: launcher, state }, logger),
      onQuiet: () => this.#onQuiet(),
      onDeleted: () => taskLog.close(),
      prepareExec: (exec) => prepareExec(exec, this.#contextOf(key, launcher, endpoint)),
      createContainer: (create, signal) => {
        const timeline = this.#timelines.begin(namespace, id);
        timeline.mark('launcher', served.launchedAtMs);
        return createContainer(create, { ...this.#contextOf(key, launcher, endpoint), timeline }, signal);
      },
    });
    const served = { endpoint, madeForNs: launcherStartedNs, launchedAtMs: inMs(launcherStartedNs) };
    this.#served.set(key, served);
    return endpoint;
  }

  #contextOf(key: string, launcher: LauncherContext, endpoint: Endpoint): Omit<ContainerContext, 'timeline'> {
    const { stateDir } = this.#options.paths;
    const { namespace, ttrpcAddress } = launcher;
    const directoryOf = (id: string) => containerDirectory(stateDir, keyOf({ ttrpcAddress, namespace, id }));
    return {
      namespace,
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

  async #onKeeper(keeper: Keeper): Promise<void> {
    const endpoint = await this.#endpointOf(keeper.header);
    if (endpoint !== undefined) endpoint.attach(keeper);
    // Without a word, so that it turns to the next kilnd: its launcher was answered just before this one stopped.
    else if (this.#stopping !== undefined) keeper.close();
    else keeper.end();
  }

  async #onSession(session: RelaySession): Promise<void> {
    const endpoint = await this.#endpointOf(session.header);
    if (endpoint !== undefined) endpoint.serve(session);
    else session.socket.destroy();
  }

  /**
   * The endpoint of a relay. One that this kilnd does not know was made by an earlier one, which never had a task there
   * (or it would be known), and is made again. Undefined when the relay's endpoint is over. Never rejects.
   */
  async #endpointOf({ socketPath, context }: RelayHeader): Promise<Endpoint | undefined> {
    const key = path.basename(socketPath);
    // Not by turns where it is known: a `delete` that is under way waits for its relay.
    if (!this.#served.has(key)) await this.#turns.take(key, async () => this.#makeAgain(key, context));
    const served = this.#served.get(key);
    return served === undefined || context.launcherStartedNs < served.madeForNs ? undefined : served.endpoint;
  }

  #makeAgain(key: string, context: LauncherContext): void {
    const { namespace, id, launcherStartedNs } = context;
    if (this.#served.has(key) || this.#draining || this.#stopping !== undefined) return;
    if (this.#endings.covers(key, launcherStartedNs) || !existsSync(context.bundle)) return;
    try {
      this.#makeEndpoint(key, context);
      this.#logger.info({ namespace, id }, 'made an endpoint again for its relay');
    } catch (error) {
      this.#logger.error({ err: error, namespace, id }, 'cannot make an endpoint again for its relay');
    }
    this.#onQuiet();
  }

  async #deleteEndpoint(key: string, at: bigint): Promise<ControlReply> {
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
    this.#collectGarbage();
    this.#onQuiet();
    return { exitCode: 0, stdout };
  }

  /** Disks of snapshots that are gone; beside everything else, since nobody waits for the space. */
  #collectGarbage(): void {
    if (!this.#restored) return;
    this.#options.collectGarbage().catch((error: unknown) => {
      this.#logger.warn({ err: error }, 'cannot remove disks of snapshots that are gone');
    });
  }

  /** One publisher per containerd; it lives as long as kilnd. */
  #publisherFor(ttrpcAddress: string): EventPublisher {
    const known = this.#publishers.get(ttrpcAddress);
    if (known !== undefined) return known;
    const publisher = new EventPublisher({ address: ttrpcAddress, log: this.#logger });
    this.#publishers.set(ttrpcAddress, publisher);
    return publisher;
  }

  #taskCount(): number {
    return this.#endpoints().filter((endpoint) => endpoint.hasTask).length;
  }

  /** After anything that may have been the last: goes on with a stop that waited for it, or begins to wait idly. */
  #onQuiet(): void {
    clearTimeout(this.#idleTimer);
    if (this.#stopping !== undefined) return;
    const { idleTimeoutMs } = this.#options;
    if (this.#draining) {
      if (this.#served.size === 0) void this.stop();
      else if (this.#taskCount() === 0) this.#idleTimer = setTimeout(() => this.#stopUnlessBusy(), lingerMs);
      // Whatever keeps an endpoint busy calls this again at its end.
    } else if (idleTimeoutMs > 0 && !this.#endpoints().some((endpoint) => endpoint.busy)) {
      this.#idleTimer = setTimeout(() => this.#stopUnlessBusy(), idleTimeoutMs);
    }
  }

  #stopUnlessBusy(): void {
    const endpoints = this.#endpoints();
    const held = this.#draining ? this.#taskCount() > 0 : endpoints.some((endpoint) => endpoint.busy);
    if (held || (this.#control?.inFlight ?? 0) > 0) {
      this.#onQuiet();
      return;
    }
    this.#logger.info({ endpoints: endpoints.length }, this.#draining ? 'no task is left' : 'idle for long enough');
    this.#stopping ??= this.#shutDown();
  }

  /** Never rejects: `onStopped` comes whatever cannot be closed. */
  async #shutDown(): Promise<void> {
    clearTimeout(this.#idleTimer);
    this.#logger.info('stopping');
    try {
      await this.#control?.close();
      await Promise.all([...this.#served.keys()].map((key) => this.#deleteEndpoint(key, nowNs())));
      await this.#options.release();
      this.#relays?.close();
      const publishers = [...this.#publishers.values()];
      await Promise.all(publishers.map((publisher) => publisher.flush(lastEventsMs)));
      await Promise.all(publishers.map((publisher) => publisher.close()));
      this.#logger.info('stopped');
    } catch (error) {
      this.#logger.error({ err: forLog(error) }, 'stopped, with something left behind');
    }
    this.#options.onStopped();
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

function text(exitCode: number, stdout: string): ControlReply {
  return { exitCode, stdout: Buffer.from(stdout) };
}

/** The time of now, as launchers tell it. */
function nowNs(): bigint {
  return BigInt(Date.now()) * 1_000_000n;
}
