import { rm } from 'node:fs/promises';
import net from 'node:net';
import { KilnError } from '../errors.ts';
import { requireSocketPath } from '../host/unix-socket.ts';
import { TtrpcServer } from '../rpc/ttrpc/index.ts';
import { toTtrpcStatus } from './status.ts';
import { TaskService, type TaskServiceOptions } from './task-service.ts';

export interface EndpointOptions extends TaskServiceOptions {
  readonly socketPath: string;
  /** Called whenever `busy` may have changed to false. */
  readonly onQuiet: () => void;
  /** Called once, when the endpoint is gone. */
  readonly onDeleted: () => void;
}

/**
 * Requests in progress on one connection. A client that gives up a Wait cannot say so (ttrpc has no cancel), so over a
 * container's life there is one more for everybody who ever waited for it through the same containerd.
 */
const maxConcurrentRequests = 16_384;

/**
 * What containerd takes for one shim: a Unix socket with the task service of one container. It exists from the
 * launcher's `start` to its `delete`; connections may come and go meanwhile (containerd restarts).
 */
export class Endpoint {
  readonly socketPath: string;
  readonly namespace: string;
  readonly id: string;
  readonly #options: EndpointOptions;
  readonly #service: TaskService;
  readonly #ttrpc: TtrpcServer;
  readonly #server: net.Server;
  #deletion: Promise<Uint8Array> | undefined;

  private constructor(options: EndpointOptions) {
    this.#options = options;
    this.socketPath = options.socketPath;
    this.namespace = options.namespace;
    this.id = options.id;
    this.#service = new TaskService(options);
    this.#ttrpc = new TtrpcServer(this.#service.table(), {
      toStatus: toTtrpcStatus,
      onClose: options.onQuiet,
      maxConcurrentRequests,
    });
    this.#server = net.createServer((socket) => this.#ttrpc.serve(socket));
  }

  /** Resolves once containerd can connect. */
  static async listen(options: EndpointOptions): Promise<Endpoint> {
    const { socketPath, logger } = options;
    requireSocketPath(socketPath);
    const endpoint = new Endpoint(options);
    const server = endpoint.#server;
    // No endpoint has this path now, so a socket that lies there is a dead kilnd's.
    await rm(socketPath, { force: true });
    await new Promise<void>((resolve, reject) => {
      server.once('error', (error) =>
        reject(new KilnError('internal', `cannot listen on ${socketPath}: ${error.message}`, { cause: error })),
      );
      server.listen(socketPath, resolve);
    });
    // accept(2) can fail later (no free descriptor). Unheard, that would end kilnd, and every container with it.
    server.on('error', (error) => logger.error({ err: error }, 'cannot accept a connection'));
    return endpoint;
  }

  /** What containerd dials. */
  get address(): string {
    return `unix://${this.socketPath}`;
  }

  get hasTask(): boolean {
    return this.#service.busy;
  }

  get busy(): boolean {
    return this.#service.busy || this.#ttrpc.connectionCount > 0;
  }

  /** Ends the task, if it still lives, and the endpoint; returns what the launcher's `delete` prints. */
  delete(): Promise<Uint8Array> {
    this.#deletion ??= this.#delete();
    return this.#deletion;
  }

  async #delete(): Promise<Uint8Array> {
    // Unlinks the socket at once.
    this.#server.close();
    const response = await this.#service.forceDelete();
    await this.#ttrpc.close();
    this.#options.onDeleted();
    return response;
  }
}
