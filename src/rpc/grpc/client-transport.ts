/**
 * A gRPC client on one connection that already exists.
 *
 * gRPC over HTTP/2 in ten lines: a connection carries numbered streams, one per call. The client opens a stream with
 * headers (`:path` is /package.Service/Method, content-type application/grpc, grpc-timeout); then both sides send
 * messages, each behind five bytes: a compression flag and a big-endian length. The client half-closes its side of the
 * stream after its last message; the server ends with trailers, where grpc-status holds the result's code. Each stream
 * and the connection have a window: a sender stops when it has sent that many bytes that the receiver has not taken.
 *
 * grpc-js's own channel owns the dialling: it resolves a name, connects, and connects again with backoff timers. Here
 * the *guest* has dialled, the connection cannot be made again from this side, and when it is gone every call has to
 * fail at once. So this file implements grpc-js's `Channel` (its public `channelOverride` option) on a socket. What a
 * call does on its HTTP/2 stream stays grpc-js's own code (`Http2SubchannelCall`, not public: the version is pinned).
 */
import { type ClientHttp2Session, connect } from 'node:http2';
import type { Duplex } from 'node:stream';
import {
  type ChannelCredentials,
  type Client,
  type ClientOptions,
  connectivityState,
  credentials as grpcCredentials,
  type Metadata,
  Metadata as MetadataClass,
  status as Status,
} from '@grpc/grpc-js';
import { Http2SubchannelCall } from '@grpc/grpc-js/build/src/subchannel-call.js';
import { joinWaitingChunks, MessageDecoder } from './bounded-reading.ts';
import { connectionWindow, maxAnswerBytes, streamWindow } from './limits.ts';

type Channel = NonNullable<ClientOptions['channelOverride']>;
type Call = ReturnType<Channel['createCall']>;
type Listener = Parameters<Call['start']>[1];
type StatusObject = Parameters<Listener['onReceiveStatus']>[0];
type ServiceClientConstructor<C extends Client> = new (
  address: string,
  credentials: ChannelCredentials,
  options?: Partial<ClientOptions>,
) => C;

export interface SocketClientOptions {
  /** What the peer is called in error messages; default "the peer". */
  readonly peer?: string;
}

/** A client together with the connection it lives on. */
export interface SocketClient<C extends Client> extends Disposable {
  readonly client: C;
  /** Resolves when the connection has ended, with the reason; never rejects. From then on every call is UNAVAILABLE. */
  readonly closed: Promise<Error>;
  /** Ends the connection at once: calls in flight fail with UNAVAILABLE, the socket is destroyed, no handle is left. */
  close(): void;
}

/**
 * A client whose only transport is `socket`. Takes the socket over; `close` (or the peer) ends it. It never connects
 * again: a new connection needs a new client.
 */
export function clientOverSocket<C extends Client>(
  Service: ServiceClientConstructor<C>,
  socket: Duplex,
  options: SocketClientOptions = {},
): SocketClient<C> {
  const peer = options.peer ?? 'the peer';
  const channel = new SocketChannel(socket, peer);
  const client = new Service(peer, grpcCredentials.createInsecure(), { channelOverride: channel });
  const close = () => channel.close();
  return { client, closed: channel.closed, close, [Symbol.dispose]: close };
}

class SocketChannel implements Channel {
  readonly closed: Promise<Error>;
  readonly #peer: string;
  readonly #session: ClientHttp2Session;
  #lost: Error | undefined;
  #calls = 0;

  constructor(socket: Duplex, peer: string) {
    this.#peer = peer;
    this.#session = connect('http://localhost', {
      createConnection: () => socket,
      settings: { enablePush: false, initialWindowSize: streamWindow },
      // The peer's windows bound what we keep in memory; Node's own limit only makes it refuse streams.
      maxSessionMemory: Number.MAX_SAFE_INTEGER,
    });
    this.closed = new Promise((resolve) => {
      const lose = (reason: string, cause?: Error) => {
        this.#lost ??= new Error(`the connection to ${peer} ${reason}`, { cause });
        resolve(this.#lost);
        this.#session.destroy();
      };
      const broke = (error: Error) => lose(`broke: ${error.message}`, error);
      this.#session.on('error', broke);
      this.#session.on('goaway', () => lose('was ended by the other side'));
      this.#session.on('close', () => lose('was closed'));
      socket.on('error', broke);
      // Destroying a session does not destroy a socket that has not connected its HTTP/2 yet.
      this.#session.on('close', () => socket.destroy());
    });
    this.#session.once('connect', () => {
      if (!this.#session.destroyed) this.#session.setLocalWindowSize(connectionWindow);
    });
  }

  /** Why no call can succeed any more; undefined while the connection lives. */
  get lost(): Error | undefined {
    if (this.#lost === undefined && (this.#session.destroyed || this.#session.closed)) {
      return new Error(`the connection to ${this.#peer} was closed`);
    }
    return this.#lost;
  }

  get peer(): string {
    return this.#peer;
  }

  close(): void {
    this.#lost ??= new Error(`the connection to ${this.#peer} was closed on this side`);
    this.#session.destroy();
  }

  createCall(method: string, deadline: Date | number): Call {
    this.#calls += 1;
    return new SocketCall(this, method, deadline, this.#calls);
  }

  /** Opens the HTTP/2 stream of a call. @throws when the session has ended */
  open(method: string, metadata: Metadata, timeout: number | undefined) {
    return this.#session.request({
      ...metadata.toHttp2Headers(),
      ':method': 'POST',
      ':path': method,
      'content-type': 'application/grpc',
      te: 'trailers',
      // gRPC allows eight digits and a unit.
      ...(timeout === undefined ? {} : { 'grpc-timeout': `${Math.min(timeout, 99_999_999)}m` }),
    });
  }

  getTarget(): string {
    return this.#peer;
  }

  getConnectivityState(): connectivityState {
    return this.lost === undefined ? connectivityState.READY : connectivityState.SHUTDOWN;
  }

  watchConnectivityState(): void {
    throw new Error('a connection that was dialled by the peer has no states to wait for');
  }

  getChannelzRef(): ReturnType<Channel['getChannelzRef']> {
    throw new Error('channelz is not offered');
  }
}

/** What grpc-js does not offer as an option: its own decoder keeps an object for each frame. */
interface CallInternals {
  decoder: { write(data: Buffer): Buffer[] };
}

/** One call. grpc-js starts it, feeds it serialised messages, and gets everything that happens through the listener. */
class SocketCall implements Call {
  readonly #channel: SocketChannel;
  readonly #method: string;
  readonly #deadline: number;
  readonly #number: number;
  #call: Http2SubchannelCall | undefined;
  #timer: NodeJS.Timeout | undefined;
  /** The status that was decided on this side, which wins over what the stream's end looks like. */
  #cancelled: StatusObject | undefined;

  constructor(channel: SocketChannel, method: string, deadline: Date | number, number: number) {
    this.#channel = channel;
    this.#method = method;
    this.#deadline = deadline instanceof Date ? deadline.getTime() : deadline;
    this.#number = number;
  }

  start(metadata: Metadata, listener: Listener): void {
    const timeout = Number.isFinite(this.#deadline) ? this.#deadline - Date.now() : undefined;
    const expire = () => this.cancelWithStatus(Status.DEADLINE_EXCEEDED, `${this.#method}: no answer in time`);
    if (timeout !== undefined && timeout <= 0) expire();
    if (this.#cancelled === undefined && this.#channel.lost === undefined) {
      try {
        const stream = this.#channel.open(this.#method, metadata, timeout);
        const transport = transportOf(this.#channel);
        this.#call = new Http2SubchannelCall(stream, noEvents, this.#translate(listener), transport, this.#number);
        (this.#call as unknown as CallInternals).decoder = new MessageDecoder(maxAnswerBytes);
        joinWaitingChunks(stream);
      } catch {
        // The session ended between the two lines above.
      }
    }
    if (this.#call === undefined) {
      // grpc-js expects that no status comes before `start` has returned.
      process.nextTick(() => listener.onReceiveStatus(this.#cancelled ?? this.#unavailable()));
      return;
    }
    // setTimeout takes 31 bits; a longer deadline (24 days) is as good as none.
    if (timeout !== undefined && timeout < 2 ** 31) this.#timer = setTimeout(expire, timeout);
  }

  sendMessageWithContext(context: Parameters<Call['sendMessageWithContext']>[0], message: Buffer): void {
    const framed = Buffer.allocUnsafe(5 + message.length);
    framed.writeUInt8(0, 0);
    framed.writeUInt32BE(message.length, 1);
    framed.set(message, 5);
    this.#call?.sendMessageWithContext(context, framed);
  }

  startRead(): void {
    this.#call?.startRead();
  }

  halfClose(): void {
    this.#call?.halfClose();
  }

  cancelWithStatus(code: Status, details: string): void {
    this.#cancelled ??= { code, details, metadata: new MetadataClass() };
    this.#call?.cancelWithStatus(code, details);
  }

  getPeer(): string {
    return this.#channel.peer;
  }

  getCallNumber(): number {
    return this.#number;
  }

  setCredentials(): void {}

  getAuthContext(): ReturnType<Call['getAuthContext']> {
    return null;
  }

  #unavailable(): StatusObject {
    return {
      code: Status.UNAVAILABLE,
      details: this.#channel.lost?.message ?? `the connection to ${this.#channel.peer} was closed`,
      metadata: new MetadataClass(),
    };
  }

  #translate(listener: Listener): Listener {
    return {
      onReceiveMetadata: (metadata) => listener.onReceiveMetadata(metadata),
      onReceiveMessage: (message: Buffer) => {
        if (message.readUInt8(0) === 0) listener.onReceiveMessage(message.subarray(5));
        // Nobody sends these: no encoding was offered in grpc-accept-encoding.
        else this.cancelWithStatus(Status.INTERNAL, `${this.#method}: a compressed message`);
      },
      onReceiveStatus: (status: StatusObject & { rstCode?: number }) => {
        clearTimeout(this.#timer);
        // rstCode is set when the stream ended without trailers, which is how a lost connection looks to a stream.
        const lost = status.rstCode !== undefined && this.#channel.lost !== undefined;
        listener.onReceiveStatus(this.#cancelled ?? (lost ? this.#unavailable() : status));
      },
    };
  }
}

/** grpc-js counts a connection's calls through this; nobody reads our counters. */
const noEvents = {
  addMessageSent: () => {},
  addMessageReceived: () => {},
  onStreamEnd: () => {},
  onCallEnd: () => {},
};

/** The little that a call asks of the transport it belongs to. */
function transportOf(channel: SocketChannel): ConstructorParameters<typeof Http2SubchannelCall>[3] {
  return {
    getOptions: () => ({ 'grpc.max_receive_message_length': maxAnswerBytes }),
    getPeerName: () => channel.peer,
    getAuthContext: () => ({}),
    getChannelzRef: () => {
      throw new Error('channelz is not offered');
    },
    createCall: () => {
      throw new Error('calls are made by the channel');
    },
    addDisconnectListener: () => {},
    shutdown: () => {},
  };
}
