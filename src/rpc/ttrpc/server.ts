/**
 * A ttrpc server: a table of handlers, served on any number of connections.
 *
 * It owns no listening socket; hand it accepted ones. What happens on one connection is in server-connection.ts.
 */
import type { Duplex } from 'node:stream';
import type { Handler, ServiceTable, TtrpcConnection } from './handler.ts';
import { ServerConnection } from './server-connection.ts';
import { type CallStatus, statusCode } from './status.ts';

export interface TtrpcServerOptions {
  /** The status for a thrown value that is not a TtrpcError. Default: Unknown with the error's message. */
  readonly toStatus?: (error: unknown) => CallStatus;
  /** Called for each connection before its first request. */
  readonly onConnection?: (connection: TtrpcConnection) => void;
  /** Called once when a connection is gone; with the reason when it did not end between two messages. */
  readonly onClose?: (connection: TtrpcConnection, error: Error | undefined) => void;
  /**
   * Requests in progress per connection; one more is answered ResourceExhausted. Default 1024. Calls such as Wait stay
   * open for a container's life, so this is a guard against a peer gone wild, not a work limit.
   */
  readonly maxConcurrentRequests?: number;
}

export interface ServeOptions {
  /** How many of the connection's first requests are replays (`CallContext.replayed`). Default 0. */
  readonly replayedRequests?: number;
}

const defaultMaxConcurrentRequests = 1024;

/** How long `close` waits for handlers and for replies to be written, in ms. */
const defaultGraceMs = 1000;

export class TtrpcServer {
  readonly #services: ReadonlyMap<string, ReadonlyMap<string, Handler>>;
  readonly #options: TtrpcServerOptions;
  readonly #connections = new Set<ServerConnection>();
  #lastConnectionId = 0;
  #closing = false;

  constructor(services: ServiceTable, options: TtrpcServerOptions = {}) {
    // Maps, so that names from the wire such as `constructor` find nothing but handlers.
    this.#services = new Map(
      Object.entries(services).map(([service, methods]) => [service, new Map(Object.entries(methods))]),
    );
    this.#options = options;
  }

  /** Connections that are open now. */
  get connectionCount(): number {
    return this.#connections.size;
  }

  /**
   * Serves requests on a connection until the peer ends it or `close` is called; the server owns the socket from here
   * on. Never closes a connection for being idle: containerd takes that for a dead shim.
   */
  serve(socket: Duplex, { replayedRequests = 0 }: ServeOptions = {}): TtrpcConnection {
    const { toStatus, onConnection, onClose, maxConcurrentRequests } = this.#options;
    this.#lastConnectionId += 1;
    const info: TtrpcConnection = { id: this.#lastConnectionId };
    if (this.#closing) {
      socket.on('error', () => {});
      socket.destroy();
      return info;
    }
    onConnection?.(info);
    const connection = new ServerConnection(socket, {
      info,
      replayedRequests,
      services: this.#services,
      maxConcurrentRequests: maxConcurrentRequests ?? defaultMaxConcurrentRequests,
      toStatus: toStatus ?? unknownStatus,
      onClose: (error) => {
        this.#connections.delete(connection);
        onClose?.(info, error);
      },
    });
    this.#connections.add(connection);
    connection.start();
    return info;
  }

  /**
   * Closes every connection: new requests are refused with Unavailable, handlers in progress are told by their signal,
   * replies that come within the grace time are still written. Resolves when all sockets are closed.
   *
   * @param graceMs how long to wait for handlers and slow readers before cutting them off, in ms.
   */
  async close(graceMs: number = defaultGraceMs): Promise<void> {
    this.#closing = true;
    await Promise.all(Array.from(this.#connections, (connection) => connection.close(graceMs)));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

function unknownStatus(error: unknown): CallStatus {
  return { code: statusCode.Unknown, message: error instanceof Error ? error.message : String(error) };
}
