/** kilnd's end of the control protocol; the protocol itself is told in request.ts. */
import { unlink } from 'node:fs/promises';
import { createServer, type Server, type Socket } from 'node:net';
import { KilnError } from '../../errors.ts';
import { listenPrivately, socketIsServed } from '../../host/unix-socket.ts';
import {
  type ControlReply,
  type ControlRequest,
  controlMessageLimit,
  encodeControlReply,
  parseControlRequest,
} from './request.ts';
import { controlSocketPath } from './socket-path.ts';

/**
 * Answers one request. What it throws becomes exit code 1 with the error's user message on stdout. Null closes the
 * connection without an answer, which says that this kilnd was stopping: the launcher turns to a fresh one.
 * It must not await {@link ControlServer.close}, which itself waits for the answer.
 */
export type ControlHandler = (request: ControlRequest) => Promise<ControlReply | null>;

export interface ControlServerOptions {
  /** Told about every request that could not be read, handled or answered, for the log. */
  readonly onError?: (error: KilnError, request: ControlRequest | null) => void;
  /** Milliseconds without a byte after which an unfinished request is dropped; default 60,000, the launcher's limit. */
  readonly requestIdleMs?: number;
}

/**
 * Listens on `<state>/kilnd.sock` (mode 0600). Every accepted connection counts as in flight until its reply has been
 * handed to the kernel, so a kilnd that stops when `inFlight` is 0, or by `close()`, never cuts a request it has taken;
 * a connection that is not accepted yet sees EOF, and the launcher turns to a fresh kilnd.
 */
export class ControlServer implements AsyncDisposable {
  readonly socketPath: string;
  readonly #server: Server;
  readonly #handler: ControlHandler;
  readonly #onError: (error: KilnError, request: ControlRequest | null) => void;
  readonly #requestIdleMs: number;
  readonly #connections = new Set<Promise<void>>();
  #closing: Promise<void> | null = null;

  private constructor(socketPath: string, handler: ControlHandler, options: ControlServerOptions) {
    this.socketPath = socketPath;
    this.#handler = handler;
    this.#onError = options.onError ?? (() => {});
    this.#requestIdleMs = options.requestIdleMs ?? 60_000;
    // The client ends its half first: that is how it says that the request is whole.
    this.#server = createServer({ allowHalfOpen: true }, (socket) => this.#accept(socket));
    // accept(2) can fail later (no free descriptor). Unheard, that would end kilnd, and every container with it.
    this.#server.on('error', (error) => {
      if (this.#server.listening) this.#report(this.#cannotListen(error), null);
    });
  }

  /**
   * Binds and listens; resolves once connections are accepted. A socket that a dead kilnd left is replaced. Call it with
   * the state folder's lock held: between finding a dead socket and replacing it, another could bind there.
   * @throws {KilnError} `already-exists` when a live kilnd listens there; `failed-precondition` when binding fails.
   */
  static async listen(
    stateDir: string,
    handler: ControlHandler,
    options: ControlServerOptions = {},
  ): Promise<ControlServer> {
    const server = new ControlServer(controlSocketPath(stateDir), handler, options);
    await server.#bind();
    return server;
  }

  /** Connections that were accepted and not yet answered. */
  get inFlight(): number {
    return this.#connections.size;
  }

  /** Unlinks the socket at once, takes no new connection, and resolves when all that were taken are answered. */
  close(): Promise<void> {
    this.#closing ??= (async () => {
      const closed = new Promise<void>((resolve) => this.#server.close(() => resolve()));
      await Promise.all([closed, ...this.#connections]);
    })();
    return this.#closing;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #bind(): Promise<void> {
    try {
      await listenPrivately(this.#server, this.socketPath);
    } catch (error) {
      if (errnoOf(error) !== 'EADDRINUSE') throw this.#cannotListen(error);
      if (await socketIsServed(this.socketPath)) {
        throw new KilnError('already-exists', `a kilnd already listens on ${this.socketPath}`);
      }
      try {
        await unlink(this.socketPath);
        await listenPrivately(this.#server, this.socketPath);
      } catch (second) {
        throw this.#cannotListen(second);
      }
    }
  }

  #cannotListen(cause: unknown): KilnError {
    const reason = cause instanceof Error ? cause.message : String(cause);
    return new KilnError('failed-precondition', `cannot listen on ${this.socketPath}: ${reason}`, { cause });
  }

  #accept(socket: Socket): void {
    const connection = this.#serve(socket).finally(() => this.#connections.delete(connection));
    this.#connections.add(connection);
  }

  /** Never rejects. */
  async #serve(socket: Socket): Promise<void> {
    let request: ControlRequest | null = null;
    // A socket error, such as a client killed by containerd, also rejects the awaits below; this only keeps it from
    // being unhandled between them.
    socket.on('error', () => {});
    try {
      let reply: Uint8Array;
      try {
        const bytes = await this.#readRequest(socket);
        if (bytes.length === 0) return; // somebody looked whether we are here
        request = parseControlRequest(bytes);
        const answer = await this.#handler(request);
        if (answer === null) return;
        reply = encodeControlReply(answer);
      } catch (thrown) {
        const error = KilnError.from(thrown);
        this.#report(error, request);
        if (socket.destroyed) return;
        reply = encodeControlReply({ exitCode: 1, stdout: Buffer.from(error.userMessage.slice(0, 64 * 1024)) });
      }
      await sendAll(socket, reply);
    } catch (thrown) {
      this.#report(new KilnError('unavailable', 'the client went away before its answer', { cause: thrown }), request);
    } finally {
      socket.destroy();
    }
  }

  async #readRequest(socket: Socket): Promise<Uint8Array> {
    const chunks: Uint8Array[] = [];
    let length = 0;
    socket.setTimeout(this.#requestIdleMs, () => {
      socket.destroy(new KilnError('deadline-exceeded', 'a control request was not finished in time'));
    });
    for await (const chunk of socket.iterator({ destroyOnReturn: false }) as AsyncIterable<Uint8Array>) {
      length += chunk.length;
      // Read on without keeping it: a socket closed with unread bytes is reset, and the client would not see the reply.
      if (length <= controlMessageLimit) chunks.push(chunk);
    }
    socket.setTimeout(0);
    if (length > controlMessageLimit) {
      throw new KilnError('resource-exhausted', `control request exceeds ${controlMessageLimit} bytes`);
    }
    return Buffer.concat(chunks);
  }

  /** A hook that throws must not take the connection's clean-up with it. */
  #report(error: KilnError, request: ControlRequest | null): void {
    try {
      this.#onError(error, request);
    } catch {
      // It is the logger itself that fails: there is nobody left to tell.
    }
  }
}

/** Resolves when the last byte has been handed to the kernel. */
function sendAll(socket: Socket, bytes: Uint8Array): Promise<void> {
  return new Promise((resolve, reject) => {
    socket.once('error', reject);
    socket.once('close', () => reject(new Error('the connection was closed')));
    // The types hide it, but the callback gets an error where the socket is closed already (nodejs.org, stream end).
    socket.end(bytes, ((error?: Error | null) => (error ? reject(error) : resolve())) as () => void);
  });
}

/** Whether a live kilnd accepts connections for this state folder. */
export async function controlSocketIsServed(stateDir: string): Promise<boolean> {
  return socketIsServed(controlSocketPath(stateDir));
}

function errnoOf(error: unknown): string | undefined {
  return (error as NodeJS.ErrnoException | null)?.code;
}
