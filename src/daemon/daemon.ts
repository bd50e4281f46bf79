import { createHash } from 'node:crypto';
import { mkdirSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import type { KilnPaths } from '../config/paths.ts';
import { forLog, KilnError } from '../errors.ts';
import { killProcessesOf } from '../host/stale.ts';
import type { DaemonLog, Logger } from '../observe/logger.ts';
import { TaskLog } from '../observe/task-log.ts';
import { Timeline } from '../observe/timeline.ts';
import { type Bootstrap, encodeStartAnswer, readBootstrap } from '../shim/control/bootstrap.ts';
import type { ControlReply, ControlRequest, StartRequest } from '../shim/control/request.ts';
import { ControlServer } from '../shim/control/server.ts';
import { Endpoint } from '../shim/endpoint.ts';
import { EventPublisher } from '../shim/publisher.ts';
import { type TaskContainer, type TaskRequest, unknownTaskDeleted } from '../shim/task-service.ts';
import { kilnVersion } from '../version.ts';
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
  /** A directory for the container alone; not yet existing. */
  readonly directory: string;
  readonly timeline: Timeline;
  readonly logger: Logger;
}

export interface DaemonOptions {
  readonly paths: KilnPaths;
  readonly idleTimeoutMs: number;
  readonly createContainer: (
    request: TaskRequest,
    context: ContainerContext,
    signal: AbortSignal,
  ) => Promise<TaskContainer>;
  /** Removes what no snapshot needs any more; called after each container. */
  readonly collectGarbage: () => Promise<unknown>;
  readonly log: DaemonLog;
  /** Called once, when everything is closed and the process may end. */
  readonly onStopped: () => void;
}

interface Served {
  readonly endpoint: Endpoint;
  /** When the latest launcher was started for it, in ms since the Unix epoch. */
  launchedAtMs: number;
}

/**
 * kilnd: answers the launcher, and keeps one endpoint per container.
 *
 * State folder: `kilnd.sock` (control), `s/<key>` (one ttrpc socket per container), `c/<key>/` (one private directory
 * per container). The key is a hash, so that every socket path stays short whatever a container is called.
 */
export class Daemon {
  readonly #options: DaemonOptions;
  readonly #logger: Logger;
  readonly #served = new Map<string, Served>();
  /** A `start` waits for a `delete` of the same container, which would take the new endpoint's socket away. */
  readonly #turns = new Turns();
  readonly #publishers = new Map<string, EventPublisher>();
  #control: ControlServer | undefined;
  #idleTimer: NodeJS.Timeout | undefined;
  #draining = false;
  #stopping: Promise<void> | undefined;

  constructor(options: DaemonOptions) {
    this.#options = options;
    this.#logger = options.log.logger;
  }

  /** Clears what a killed kilnd left, and resolves when the launcher is answered. Needs the state folder's lock. */
  async start(): Promise<void> {
    const { paths } = this.#options;
    await this.#clearLeftovers();
    for (const name of ['s', 'c']) mkdirSync(path.join(paths.stateDir, name), { recursive: true, mode: 0o700 });
    this.#control = await ControlServer.listen(paths.stateDir, (request) => this.#handle(request), {
      onError: (error, request) => this.#logger.error({ err: error, action: request?.kind }, 'control request failed'),
    });
    this.#collectGarbage();
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

  async #clearLeftovers(): Promise<void> {
    const { stateDir } = this.#options.paths;
    const containers = path.join(stateDir, 'c');
    const killed = await killProcessesOf(containers);
    const left = listDirectory(containers);
    for (const name of left) this.#removeDirectory(path.join(containers, name));
    rmSync(path.join(stateDir, 's'), { recursive: true, force: true });
    if (killed.length + left.length > 0) {
      this.#logger.warn({ killed, directories: left }, 'cleared what an earlier kilnd left behind');
    }
  }

  /** One that cannot be removed is in the way of one container, and no reason to serve none. */
  #removeDirectory(directory: string): void {
    try {
      rmSync(directory, { recursive: true, force: true });
    } catch (error) {
      this.#logger.error({ err: error, directory }, 'cannot remove what an earlier kilnd left behind');
    }
  }

  async #handle(request: ControlRequest): Promise<ControlReply | null> {
    switch (request.kind) {
      case 'start':
        return this.#turns.take(keyOf(request), () => this.#startEndpoint(request));
      case 'delete':
        return this.#turns.take(keyOf(request), () => this.#deleteEndpoint(keyOf(request)));
      case 'status':
        return text(0, `${JSON.stringify(this.#status())}\n`);
      case 'stop':
        // After this answer is sent, since closing waits for it.
        setImmediate(() => void this.stop());
        return text(0, `${JSON.stringify(this.#status())}\n`);
    }
  }

  #status() {
    const containers = this.#endpoints().map(({ namespace, id, hasTask }) => ({ namespace, id, hasTask }));
    return { version: kilnVersion, pid: process.pid, draining: this.#draining, containers };
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
      const launchedAtMs = Number(request.launcherStartedNs / 1000n) / 1000;
      const known = this.#served.get(key);
      if (known === undefined) made = await this.#makeEndpoint(key, request, bootstrap, launchedAtMs);
      else known.launchedAtMs = launchedAtMs;
      const { address } = made ?? (known as Served).endpoint;
      // containerd 1.6 and 1.7 find the endpoint again by this file after their own restart.
      writeFileSync(path.join(request.bundle, 'address'), address, { mode: 0o600 });
      // Stopping removes this endpoint, too: the address would be good for nothing.
      return this.#stopping === undefined ? { exitCode: 0, stdout: encodeStartAnswer(bootstrap, address) } : null;
    } catch (error) {
      // containerd never learns of it, so it would not ask for its removal either.
      if (made !== undefined) await this.#deleteEndpoint(key);
      throw error;
    } finally {
      this.#onQuiet();
    }
  }

  async #makeEndpoint(
    key: string,
    request: StartRequest,
    bootstrap: Bootstrap,
    launchedAtMs: number,
  ): Promise<Endpoint> {
    const { paths, log, createContainer } = this.#options;
    const { namespace, id, bundle } = request;
    const publisher = this.#publisherFor(request.ttrpcAddress);
    const taskLog = new TaskLog(bundle, id);
    const logger = log.forTask(taskLog, bootstrap.logLevel).child({ namespace, id });
    logger.debug({ bootstrap }, 'containerd starts a container');
    const endpoint = await Endpoint.listen({
      socketPath: path.join(paths.stateDir, 's', key),
      namespace,
      id,
      logger,
      publish: (event) => publisher.publish(namespace, event),
      onQuiet: () => this.#onQuiet(),
      onDeleted: () => taskLog.close(),
      createContainer: (create, signal) => {
        const timeline = new Timeline();
        timeline.mark('launcher', served.launchedAtMs);
        return createContainer(create, { directory: path.join(paths.stateDir, 'c', key), timeline, logger }, signal);
      },
    });
    const served = { endpoint, launchedAtMs };
    this.#served.set(key, served);
    return endpoint;
  }

  async #deleteEndpoint(key: string): Promise<ControlReply> {
    const served = this.#served.get(key);
    if (served === undefined) return { exitCode: 0, stdout: unknownTaskDeleted() };
    const stdout = await served.endpoint.delete();
    this.#served.delete(key);
    this.#collectGarbage();
    this.#onQuiet();
    return { exitCode: 0, stdout };
  }

  /** Disks of snapshots that are gone; beside everything else, since nobody waits for the space. */
  #collectGarbage(): void {
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
      await Promise.all(this.#endpoints().map((endpoint) => endpoint.delete()));
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

function text(exitCode: number, stdout: string): ControlReply {
  return { exitCode, stdout: Buffer.from(stdout) };
}

function listDirectory(directory: string): string[] {
  try {
    return readdirSync(directory);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
}
