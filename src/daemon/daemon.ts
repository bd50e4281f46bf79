import { createHash } from 'node:crypto';
import { mkdirSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { loadConfig } from '../config/config.ts';
import type { KilnPaths } from '../config/paths.ts';
import { KilnError } from '../errors.ts';
import { killProcessesOf } from '../host/stale.ts';
import type { DaemonLog, Logger } from '../observe/logger.ts';
import { TaskLog } from '../observe/task-log.ts';
import { Timeline } from '../observe/timeline.ts';
import type { HostServices } from '../sandbox/resources.ts';
import type { ControlReply, ControlRequest, StartRequest } from '../shim/control/request.ts';
import { ControlServer } from '../shim/control/server.ts';
import { Endpoint } from '../shim/endpoint.ts';
import { EventPublisher } from '../shim/publisher.ts';
import { unknownTaskDeleted } from '../shim/task-service.ts';
import { kilnVersion } from '../version.ts';
import { createContainer } from './containers.ts';
import { defaultGuestDir } from './installation.ts';

export interface DaemonOptions {
  readonly paths: KilnPaths;
  readonly idleTimeoutMs: number;
  readonly host: HostServices;
  readonly log: DaemonLog;
  /** Called once, when everything is closed and the process may end. */
  readonly onStopped: () => void;
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
  readonly #endpoints = new Map<string, Endpoint>();
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

  /** Stops now if no container lives, else as soon as the last one is gone; asked a second time, at once. */
  async stop(): Promise<void> {
    const tasks = this.#taskCount();
    if (tasks === 0 || this.#draining) {
      this.#stopping ??= this.#shutDown();
      return this.#stopping;
    }
    this.#draining = true;
    this.#logger.warn({ tasks }, 'asked to stop; waiting for the running containers (ask again to end them)');
  }

  async #clearLeftovers(): Promise<void> {
    const { stateDir } = this.#options.paths;
    const containers = path.join(stateDir, 'c');
    const killed = await killProcessesOf(containers);
    const left = listDirectory(containers);
    for (const name of left) rmSync(path.join(containers, name), { recursive: true, force: true });
    rmSync(path.join(stateDir, 's'), { recursive: true, force: true });
    if (killed.length + left.length > 0) {
      this.#logger.warn({ killed, directories: left }, 'cleared what an earlier kilnd left behind');
    }
  }

  async #handle(request: ControlRequest): Promise<ControlReply> {
    switch (request.kind) {
      case 'start':
        return text(0, await this.#startEndpoint(request));
      case 'delete':
        return { exitCode: 0, stdout: await this.#deleteEndpoint(keyOf(request)) };
      case 'status':
        return text(0, `${JSON.stringify(this.#status())}\n`);
      case 'stop':
        // After this answer is sent, since closing waits for it.
        setImmediate(() => void this.stop());
        return text(0, `${JSON.stringify(this.#status())}\n`);
    }
  }

  #status() {
    const containers = [...this.#endpoints.values()].map(({ namespace, id, hasTask }) => ({ namespace, id, hasTask }));
    return { version: kilnVersion, pid: process.pid, draining: this.#draining, containers };
  }

  /** Makes the container's endpoint, or finds it when containerd asks again, and leaves its address in the bundle. */
  async #startEndpoint(request: StartRequest): Promise<string> {
    if (this.#draining) throw new KilnError('unavailable', 'kilnd is stopping and takes no new container');
    clearTimeout(this.#idleTimer);
    const key = keyOf(request);
    const endpoint = this.#endpoints.get(key) ?? (await this.#makeEndpoint(key, request));
    // containerd 1.6 and 1.7 find the endpoint again by this file after their own restart.
    writeFileSync(path.join(request.bundle, 'address'), endpoint.address, { mode: 0o600 });
    return endpoint.address;
  }

  async #makeEndpoint(key: string, request: StartRequest): Promise<Endpoint> {
    const { paths, host, log } = this.#options;
    const { namespace, id, bundle } = request;
    const publisher = this.#publisherFor(request.ttrpcAddress);
    const taskLog = new TaskLog(bundle, id);
    const logger = log.forTask(taskLog).child({ namespace, id });
    const timeline = new Timeline();
    timeline.mark('launcher', Number(request.launcherStartedNs / 1000n) / 1000);
    const endpoint = await Endpoint.listen({
      socketPath: path.join(paths.stateDir, 's', key),
      namespace,
      id,
      logger,
      publish: (event) => publisher.publish(namespace, event),
      onQuiet: () => this.#onQuiet(),
      onDeleted: () => taskLog.close(),
      createContainer: async (create, signal) => {
        const loaded = loadConfig({ env: process.env, guestDir: defaultGuestDir });
        const directory = path.join(paths.stateDir, 'c', key);
        return createContainer(create, { host, loaded, directory, timeline, logger }, signal);
      },
    });
    this.#endpoints.set(key, endpoint);
    return endpoint;
  }

  async #deleteEndpoint(key: string): Promise<Uint8Array> {
    const endpoint = this.#endpoints.get(key);
    if (endpoint === undefined) return unknownTaskDeleted();
    const response = await endpoint.delete();
    this.#endpoints.delete(key);
    this.#collectGarbage();
    this.#onQuiet();
    return response;
  }

  /** Disks of snapshots that are gone; beside everything else, since nobody waits for the space. */
  #collectGarbage(): void {
    this.#options.host.rootfs.collectGarbage().catch((error: unknown) => {
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
    return [...this.#endpoints.values()].filter((endpoint) => endpoint.hasTask).length;
  }

  #onQuiet(): void {
    clearTimeout(this.#idleTimer);
    if (this.#draining && this.#taskCount() === 0) {
      void this.stop();
      return;
    }
    const { idleTimeoutMs } = this.#options;
    if (idleTimeoutMs === 0 || this.#busy()) return;
    this.#idleTimer = setTimeout(() => {
      if (this.#busy()) return;
      this.#logger.info({ idleTimeoutMs }, 'idle; stopping');
      void this.stop();
    }, idleTimeoutMs);
  }

  #busy(): boolean {
    return (this.#control?.inFlight ?? 0) > 0 || [...this.#endpoints.values()].some((endpoint) => endpoint.busy);
  }

  async #shutDown(): Promise<void> {
    const { onStopped } = this.#options;
    clearTimeout(this.#idleTimer);
    this.#logger.info('stopping');
    await this.#control?.close();
    await Promise.allSettled([...this.#endpoints.values()].map((endpoint) => endpoint.delete()));
    await Promise.allSettled([...this.#publishers.values()].map((publisher) => publisher.close()));
    this.#logger.info('stopped');
    onStopped();
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
