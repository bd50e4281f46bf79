import { mkdirSync } from 'node:fs';
import path from 'node:path';
import type { KilnPaths } from '../config/paths.ts';
import { forLog, KilnError } from '../errors.ts';
import type { DaemonLog, Logger } from '../observe/logger.ts';
import type { Timeline } from '../observe/timeline.ts';
import { Timelines } from '../observe/timelines.ts';
import type { ControlReply, ControlRequest, TimelineRequest } from '../shim/control/request.ts';
import { ControlServer } from '../shim/control/server.ts';
import type { Keeper } from '../shim/relay/keeper.ts';
import { RelayServer, type RelaySession } from '../shim/relay/server.ts';
import { kilnVersion } from '../version.ts';
import { copyFiles } from './copy.ts';
import { removeDeadSockets } from './dead-sockets.ts';
import { takeStock } from './earlier.ts';
import { type ContainerMaker, Endpoints } from './endpoints.ts';

/**
 * How long a kilnd that is to stop keeps an endpoint without a task, in ms. Between the task's end and containerd's
 * `delete`, which no other kilnd could answer with the exit, lie some hundredths of a second; containerd gives it 5 s.
 */
const lingerMs = 5000;

const defaultCollectEveryMs = 10_000;

export interface DaemonOptions extends ContainerMaker {
  readonly paths: KilnPaths;
  readonly idleTimeoutMs: number;
  /** Called at the start, with what resolves when all that an earlier kilnd has left is taken over or given up. */
  readonly onRestoring: (restored: Promise<unknown>) => void;
  /** Removes what no snapshot needs any more; called after containers. */
  readonly collectGarbage: () => Promise<unknown>;
  /** The least time between two of them, in ms; default 10,000. */
  readonly collectEveryMs?: number;
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

/**
 * kilnd: answers the launcher, and keeps one endpoint per container.
 *
 * State folder: `kilnd.sock` (control), `relay.sock` (relays), `s/<key>` (what the relay of a container listens on),
 * `c/<key>/` (one private directory per container), `t/<key>.json` (what is written down of its task).
 */
export class Daemon {
  readonly #options: DaemonOptions;
  readonly #logger: Logger;
  readonly #timelines: Timelines;
  readonly #endpoints: Endpoints;
  #relays: RelayServer | undefined;
  #control: ControlServer | undefined;
  #idleTimer: NodeJS.Timeout | undefined;
  #draining = false;
  /** What an earlier kilnd left is taken over, or given up. */
  #restored = false;
  #stopping: Promise<void> | undefined;
  #collectedAtMs = Number.NEGATIVE_INFINITY;
  #collectTimer: NodeJS.Timeout | undefined;

  constructor(options: DaemonOptions) {
    this.#options = options;
    this.#logger = options.log.logger;
    this.#timelines = new Timelines(timelinesKept, options.onStarted);
    this.#endpoints = new Endpoints({
      ...options,
      timelines: this.#timelines,
      intake: () => (this.#stopping !== undefined ? 'stopped' : this.#draining ? 'draining' : 'open'),
      onQuiet: () => this.#onQuiet(),
      onDeleted: () => this.#collectGarbage(),
    });
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
    const restored = Array.from(tasks, ([key, record]) => this.#endpoints.restore(key, record));
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
    if (this.#stopping !== undefined || this.#draining || this.#endpoints.size === 0) {
      this.#stopping ??= this.#shutDown();
      return this.#stopping;
    }
    this.#draining = true;
    const tasks = this.#endpoints.taskCount;
    this.#logger.warn({ tasks }, 'asked to stop; waiting for the containers (ask again to end them)');
    this.#onQuiet();
  }

  async #handle(request: ControlRequest): Promise<ControlReply | null> {
    switch (request.kind) {
      case 'start':
        return this.#endpoints.start(request);
      case 'delete':
        return this.#endpoints.delete(request);
      case 'status':
        return text(0, `${JSON.stringify(this.#status())}\n`);
      case 'copy':
        return copyFiles(this.#endpoints.list(), request);
      case 'timeline':
        return this.#timelineOf(request);
      case 'stop':
        // After this answer is sent, since closing waits for it.
        setImmediate(() => void this.stop());
        return text(0, `${JSON.stringify(this.#status())}\n`);
    }
  }

  #status() {
    const containers = this.#endpoints.list().map(({ namespace, id, hasTask, relayPid, connectionCount }) => {
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
    return this.#endpoints.taskCount;
  }

  async #onKeeper(keeper: Keeper): Promise<void> {
    const endpoint = await this.#endpoints.of(keeper.header);
    if (endpoint !== undefined) endpoint.attach(keeper);
    // Without a word, so that it turns to the next kilnd: its launcher was answered just before this one stopped.
    else if (this.#stopping !== undefined) keeper.close();
    else keeper.end();
  }

  async #onSession(session: RelaySession): Promise<void> {
    const endpoint = await this.#endpoints.of(session.header);
    if (endpoint !== undefined) endpoint.serve(session);
    else session.socket.destroy();
  }

  /**
   * Disks of snapshots that are gone; beside everything else, since nobody waits for the space, and not for each of many
   * containers: it looks at every image and layer that there is.
   */
  #collectGarbage(): void {
    if (!this.#restored || this.#collectTimer !== undefined) return;
    const { collectEveryMs = defaultCollectEveryMs } = this.#options;
    const waitMs = this.#collectedAtMs + collectEveryMs - performance.now();
    if (waitMs <= 0) {
      this.#collectNow();
      return;
    }
    this.#collectTimer = setTimeout(() => {
      this.#collectTimer = undefined;
      this.#collectNow();
    }, waitMs);
    this.#collectTimer.unref();
  }

  #collectNow(): void {
    this.#collectedAtMs = performance.now();
    this.#options.collectGarbage().catch((error: unknown) => {
      this.#logger.warn({ err: error }, 'cannot remove disks of snapshots that are gone');
    });
  }

  /** After anything that may have been the last: goes on with a stop that waited for it, or begins to wait idly. */
  #onQuiet(): void {
    clearTimeout(this.#idleTimer);
    if (this.#stopping !== undefined) return;
    const { idleTimeoutMs } = this.#options;
    if (this.#draining) {
      if (this.#endpoints.size === 0) void this.stop();
      else if (this.#endpoints.taskCount === 0) this.#idleTimer = setTimeout(() => this.#stopUnlessBusy(), lingerMs);
      // Whatever keeps an endpoint busy calls this again at its end.
    } else if (idleTimeoutMs > 0 && !this.#endpoints.list().some((endpoint) => endpoint.busy)) {
      this.#idleTimer = setTimeout(() => this.#stopUnlessBusy(), idleTimeoutMs);
    }
  }

  #stopUnlessBusy(): void {
    const endpoints = this.#endpoints.list();
    const held = this.#draining ? this.#endpoints.taskCount > 0 : endpoints.some((endpoint) => endpoint.busy);
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
    clearTimeout(this.#collectTimer);
    this.#logger.info('stopping');
    try {
      await this.#control?.close();
      await this.#endpoints.close();
      await this.#options.release();
      this.#relays?.close();
      await this.#endpoints.flushEvents();
      this.#logger.info('stopped');
    } catch (error) {
      this.#logger.error({ err: forLog(error) }, 'stopped, with something left behind');
    }
    this.#options.onStopped();
  }
}

function text(exitCode: number, stdout: string): ControlReply {
  return { exitCode, stdout: Buffer.from(stdout) };
}
