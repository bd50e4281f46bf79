/**
 * The server's side of one ttrpc connection.
 *
 * Requests run concurrently and are answered as they finish: a Wait stays open for a container's life while Kill and
 * Delete come and go on the same connection, so nothing here may wait for anything else. There is no cancel message: a
 * caller that gives up forgets its stream and drops the reply. A stream gets exactly one Response.
 *
 * What a peer does wrong is answered on the stream it did it on, and the connection goes on (as in ttrpc's server.go):
 * even or reused id, malformed Request, data on a stream that takes none: InvalidArgument; too large: ResourceExhausted;
 * no such service or method: Unimplemented. Frames of an unknown type are ignored. End of input ends the connection.
 */
import type { Duplex } from 'node:stream';
import { type DecodedRequest, decodeRequest, encodeFailure, encodeReply } from './envelope.ts';
import { type DecodedFrame, encodeFrame, FrameDecoder, frameFlag, maxDataLength, messageType } from './frame.ts';
import type { Handler, TtrpcConnection } from './handler.ts';
import { type CallStatus, statusCode, TtrpcError } from './status.ts';

export interface ServerConnectionOptions {
  readonly info: TtrpcConnection;
  readonly services: ReadonlyMap<string, ReadonlyMap<string, Handler>>;
  readonly maxConcurrentRequests: number;
  readonly replayedRequests: number;
  readonly toStatus: (error: unknown) => CallStatus;
  readonly onClose: (error: Error | undefined) => void;
}

type WholeFrame = Extract<DecodedFrame, { kind: 'frame' }>;

export class ServerConnection {
  readonly #socket: Duplex;
  readonly #options: ServerConnectionOptions;
  readonly #decoder = new FrameDecoder();
  /** Requests in progress, by stream id. */
  readonly #streams = new Map<number, AbortController>();
  readonly #closed = Promise.withResolvers<void>();
  #lastStreamId = 0;
  #replaysToCome: number;
  #state: 'open' | 'draining' | 'closed' = 'open';
  #graceTimer: NodeJS.Timeout | undefined;

  constructor(socket: Duplex, options: ServerConnectionOptions) {
    this.#socket = socket;
    this.#options = options;
    this.#replaysToCome = options.replayedRequests;
  }

  /** Begins to read. Separate from the constructor, because a socket that is dead already closes us at once. */
  start(): void {
    const socket = this.#socket;
    // The error listener stays for good: a socket may fail again after it was destroyed.
    socket.on('error', (error) => this.#tearDown(error));
    socket.on('close', () => {
      this.#tearDown(undefined);
      this.#closed.resolve();
    });
    if (socket.closed) this.#closed.resolve();
    if (socket.destroyed) {
      this.#tearDown(undefined);
      return;
    }
    socket.on('end', () => {
      this.#tearDown(this.#decoder.midFrame ? new Error('connection ended inside a frame') : undefined);
    });
    socket.on('drain', () => socket.resume());
    socket.on('data', (chunk: Buffer) => this.#onBytes(chunk));
  }

  /** See TtrpcServer.close. */
  close(graceMs: number): Promise<void> {
    if (this.#state === 'open') {
      this.#state = 'draining';
      this.#graceTimer = setTimeout(() => this.#tearDown(undefined), graceMs);
      this.#abortAll(new TtrpcError(statusCode.Unavailable, 'server is closing'));
      this.#endWhenDrained();
    }
    return this.#closed.promise;
  }

  #onBytes(chunk: Buffer): void {
    for (const frame of this.#decoder.push(chunk)) {
      if (this.#state === 'closed') return;
      this.#onFrame(frame);
    }
  }

  #onFrame(frame: DecodedFrame): void {
    // A Response sent to a server, and types of later versions: PROTOCOL.md asks to ignore what is unknown.
    if (frame.type !== messageType.request && frame.type !== messageType.data) return;
    const replayed = frame.type === messageType.request && this.#replaysToCome > 0;
    if (replayed) this.#replaysToCome -= 1;
    try {
      if (frame.kind === 'oversized') {
        // The id is not used up: nothing vouches for the header of a frame that nobody should have sent.
        throw new TtrpcError(
          statusCode.ResourceExhausted,
          `message length ${frame.length} exceed maximum message size of ${maxDataLength}`,
        );
      }
      if (frame.streamId % 2 !== 1) throw invalid('StreamID must be odd for client initiated streams');
      if (frame.type === messageType.request) this.#onRequest(frame, replayed);
      else this.#onData(frame);
    } catch (error) {
      this.#refuse(frame.streamId, this.#statusOf(error, undefined));
    }
  }

  /** @throws TtrpcError when the request is refused. */
  #onRequest(frame: WholeFrame, replayed: boolean): void {
    if (frame.streamId <= this.#lastStreamId) throw invalid('StreamID cannot be re-used and must increment');
    this.#lastStreamId = frame.streamId;
    const request = decodeRequest(frame.data);
    const methods = this.#options.services.get(request.service);
    if (methods === undefined) throw new TtrpcError(statusCode.Unimplemented, `service ${request.service}`);
    const handler = methods.get(request.method);
    if (handler === undefined) throw new TtrpcError(statusCode.Unimplemented, `method ${request.method}`);
    if ((frame.flags & frameFlag.remoteOpen) !== 0) {
      // The arguments would follow as Data; running the method without them could do the wrong thing.
      // (remoteClosed alone is fine: the request is whole, and a Response is a legal answer.)
      throw invalid(`method ${request.method} is unary: it takes no stream of requests`);
    }
    if (this.#state === 'draining') throw new TtrpcError(statusCode.Unavailable, 'server is closing');
    if (this.#streams.size >= this.#options.maxConcurrentRequests) {
      throw new TtrpcError(statusCode.ResourceExhausted, `${this.#streams.size} requests are in progress already`);
    }
    if (request.timeoutMs !== undefined && request.timeoutMs <= 0) {
      throw new TtrpcError(statusCode.DeadlineExceeded, 'the timeout had passed before the request arrived');
    }
    void this.#run(frame.streamId, request, { handler, replayed });
  }

  /** @throws TtrpcError: no method here takes a stream, so data is always out of place. */
  #onData(frame: WholeFrame): void {
    if (!this.#streams.has(frame.streamId)) throw invalid('StreamID is no longer active');
    const isBareClose = (frame.flags & frameFlag.noData) !== 0 && frame.data.length === 0;
    if (!isBareClose) throw invalid('data handling error: the method is unary and takes no stream data');
  }

  /** Runs a handler and answers. Never rejects. */
  async #run(
    streamId: number,
    request: DecodedRequest,
    { handler, replayed }: { handler: Handler; replayed: boolean },
  ): Promise<void> {
    const abort = new AbortController();
    this.#streams.set(streamId, abort);
    const { metadata, timeoutMs } = request;
    const timer = timeoutMs === undefined ? undefined : setTimeout(() => abort.abort(timedOut(timeoutMs)), timeoutMs);
    let response: Uint8Array;
    try {
      const context = { metadata, signal: abort.signal, connection: this.#options.info, replayed };
      response = encodeReply(await handler(request.payload, context));
    } catch (error) {
      response = encodeFailure(this.#statusOf(error, abort.signal));
    } finally {
      clearTimeout(timer);
    }
    // Gone when the stream was refused meanwhile (it has had its Response) or the connection has closed.
    if (this.#streams.get(streamId) !== abort) return;
    this.#streams.delete(streamId);
    this.#send(streamId, response);
    this.#endWhenDrained();
  }

  /** Ends a stream with an error; a request in progress on it is aborted, and its reply dropped. */
  #refuse(streamId: number, status: CallStatus): void {
    const running = this.#streams.get(streamId);
    this.#streams.delete(streamId);
    this.#send(streamId, encodeFailure(status));
    running?.abort(new TtrpcError(status.code, status.message));
    this.#endWhenDrained();
  }

  #send(streamId: number, response: Uint8Array): void {
    if (!this.#socket.writable) return;
    const data =
      response.length <= maxDataLength
        ? response
        : encodeFailure({
            code: statusCode.ResourceExhausted,
            message: `response of ${response.length} bytes is over the maximum message size of ${maxDataLength}`,
          });
    const flushed = this.#socket.write(encodeFrame({ streamId, type: messageType.response, flags: 0 }, data));
    // A peer that does not read its replies gets no further requests in: what waits in memory stays bounded by the
    // requests in progress. Reading goes on at 'drain'.
    if (!flushed) this.#socket.pause();
  }

  #statusOf(error: unknown, signal: AbortSignal | undefined): CallStatus {
    const aborted = signal?.aborted === true && error instanceof Error && error.name === 'AbortError';
    const cause: unknown = aborted ? signal.reason : error;
    try {
      const { code, message } = cause instanceof TtrpcError ? cause : this.#options.toStatus(cause);
      // 0 would tell the caller that the call succeeded.
      const valid = Number.isInteger(code) && code > 0 && code <= 0x7fff_ffff;
      return { code: valid ? code : statusCode.Unknown, message: String(message) };
    } catch {
      return { code: statusCode.Internal, message: 'the error could not be turned into a status' };
    }
  }

  #abortAll(reason: TtrpcError): void {
    for (const abort of Array.from(this.#streams.values())) abort.abort(reason);
  }

  #endWhenDrained(): void {
    if (this.#state !== 'draining' || this.#streams.size > 0 || this.#socket.writableEnded) return;
    this.#socket.end(() => this.#tearDown(undefined));
  }

  #tearDown(error: Error | undefined): void {
    if (this.#state === 'closed') return;
    this.#state = 'closed';
    clearTimeout(this.#graceTimer);
    const running = Array.from(this.#streams.values());
    this.#streams.clear();
    this.#socket.destroy();
    for (const abort of running) abort.abort(new TtrpcError(statusCode.Canceled, 'connection closed'));
    this.#options.onClose(error);
  }
}

function invalid(message: string): TtrpcError {
  return new TtrpcError(statusCode.InvalidArgument, message);
}

function timedOut(timeoutMs: number): TtrpcError {
  return new TtrpcError(statusCode.DeadlineExceeded, `the request's timeout of ${timeoutMs} ms passed`);
}
