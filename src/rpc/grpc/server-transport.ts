/**
 * A gRPC server on connections that already exist, each made by somebody else (the guest's agent dials its host and
 * then *serves* on that connection). Nothing listens; see client-transport.ts for gRPC's wire format.
 */
import type { Http2Server, ServerHttp2Session, ServerHttp2Stream } from 'node:http2';
import type { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { setTimeout as delay } from 'node:timers/promises';
import { Server, ServerCredentials, type ServiceDefinition, type UntypedServiceImplementation } from '@grpc/grpc-js';
import { maxMessageBytes } from './limits.ts';

/** What grpc-js does not offer as options: its HTTP/2 servers and what it makes them with. The version is pinned. */
interface ServerInternals {
  readonly http2Servers: Map<Http2Server, unknown>;
}

/** A connection that is being served. */
export interface ServedSocket extends Disposable {
  /** Resolves when the connection has ended, from whatever side; never rejects. Its calls are cancelled then. */
  readonly closed: Promise<void>;
  /**
   * Asks the other side for a sign of life (HTTP/2 PING). Resolves to false when nothing at all has come within
   * `limitMs`, to true for anything.
   */
  probe(limitMs: number): Promise<boolean>;
  /** Ends the connection at once, with its calls. */
  close(): void;
}

/** Serves `implementation` on `socket`, and takes the socket over. */
export function serveOverSocket(
  definition: ServiceDefinition,
  implementation: UntypedServiceImplementation,
  socket: Duplex,
): ServedSocket {
  return prepareServer(definition, implementation)(socket);
}

/**
 * Makes a server for one connection, which comes later. One per connection, so that an implementation can know what its
 * connection has seen (an object made for it), and everything ends with it.
 */
export function prepareServer(
  definition: ServiceDefinition,
  implementation: UntypedServiceImplementation,
): (socket: Duplex) => ServedSocket {
  const server = new Server({
    'grpc.enable_channelz': 0,
    'grpc.max_receive_message_length': maxMessageBytes,
    'grpc.max_send_message_length': maxMessageBytes,
  });
  server.addService(definition, implementation);
  const injector = server.createConnectionInjector(ServerCredentials.createInsecure());
  return (socket) => serve(socket, server, injector);
}

function serve(socket: Duplex, server: Server, injector: ReturnType<Server['createConnectionInjector']>): ServedSocket {
  const internals = server as unknown as ServerInternals;
  let current: ServerHttp2Session | undefined;
  const closed = new Promise<void>((resolve) => {
    for (const http2Server of internals.http2Servers.keys()) {
      http2Server.on('session', (session: ServerHttp2Session) => {
        current = session;
        session.on('error', () => {});
        session.on('close', () => socket.destroy());
      });
      http2Server.prependListener('stream', withoutDate);
      // What the peer sends that is not HTTP/2 ends its connection, nothing else.
      http2Server.on('sessionError', () => socket.destroy());
    }
    socket.on('error', () => {});
    socket.on('close', () => {
      server.forceShutdown();
      resolve();
    });
  });
  injector.injectConnection(socket);
  const close = () => {
    server.forceShutdown();
    socket.destroy();
  };
  const probe = async (limitMs: number): Promise<boolean> => {
    const before = received(socket);
    const { promise: answered, resolve } = Promise.withResolvers<void>();
    if (current !== undefined && !current.destroyed) current.ping(() => resolve());
    const timer = new AbortController();
    await Promise.race([answered, closed, delay(limitMs, undefined, { signal: timer.signal }).catch(() => {})]);
    timer.abort();
    return received(socket) > before;
  };
  return { closed, probe, close, [Symbol.dispose]: close };
}

/** Node says the time of day with each answer. No client of gRPC looks at it, and to write the first takes an emulated guest 35 ms. */
function withoutDate(stream: ServerHttp2Stream): void {
  const respond = stream.respond.bind(stream);
  // Of Node's own compatibility API, and not in its types: lib/internal/http2/core.js, prepareResponseHeaders.
  stream.respond = (headers, options) => respond(headers, { ...options, sendDate: false } as typeof options);
}

/** Bytes that have come on a connection; a stream that is no socket does not count them. */
function received(socket: Duplex): number {
  return (socket as Partial<Socket>).bytesRead ?? 0;
}
