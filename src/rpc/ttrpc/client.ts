/**
 * A ttrpc client: concurrent unary calls over one connection.
 *
 * Each call takes the next odd stream id; the Response with that id ends it, in whatever order they come. The protocol
 * has no cancel: a call that times out or is aborted here is only forgotten, and its late Response ignored. When the
 * connection is lost every open call fails with Unavailable, and the client is done: make a new one on a new socket.
 */
import type { Duplex } from 'node:stream';
import { decodeReply, encodeRequest, maxTimerMs } from './envelope.ts';
import { type DecodedFrame, encodeFrame, FrameDecoder, maxDataLength, messageType } from './frame.ts';
import { statusCode, TtrpcError } from './status.ts';

export interface CallOptions {
  /** Fails the call with DeadlineExceeded after this many ms; the server is told too. Default: none. */
  readonly timeoutMs?: number;
  readonly metadata?: ReadonlyMap<string, string>;
  /** Gives up waiting: the call fails with Canceled, the signal's reason as its cause. */
  readonly signal?: AbortSignal;
}

interface OpenCall {
  readonly name: string;
  settle(result: Buffer | TtrpcError): void;
}

const maxStreamId = 0xffff_ffff;

export class TtrpcClient {
  readonly #socket: Duplex;
  readonly #decoder = new FrameDecoder();
  readonly #calls = new Map<number, OpenCall>();
  readonly #closed = Promise.withResolvers<void>();
  #nextStreamId = 1;
  #lost: TtrpcError | undefined;

  /** The socket may still be connecting; the client owns it from here on. */
  constructor(socket: Duplex) {
    this.#socket = socket;
    socket.on('error', (error) => this.#lose(`connection failed: ${error.message}`, error));
    socket.on('end', () => this.#lose('connection closed by the server'));
    socket.on('close', () => this.#lose('connection closed'));
    socket.on('data', (chunk: Buffer) => {
      for (const frame of this.#decoder.push(chunk)) this.#onFrame(frame);
    });
    if (socket.destroyed) this.#lose('connection closed');
  }

  /** Resolves when the connection is gone, for whatever reason. Never rejects. */
  get closed(): Promise<void> {
    return this.#closed.promise;
  }

  /**
   * Calls a method and resolves to the reply's payload.
   *
   * @param service full name, such as `containerd.task.v2.Task`
   * @param method bare name, such as `Create`
   * @throws TtrpcError: the server's status, or Unavailable (connection lost; whether the method ran is unknown),
   * DeadlineExceeded, Canceled, ResourceExhausted (request or reply over 4 MiB).
   */
  async call(service: string, method: string, payload: Uint8Array, options: CallOptions = {}): Promise<Buffer> {
    const { metadata, signal } = options;
    // A longer time than a timer can hold (about 24 days) is the same as none.
    const timeoutMs =
      options.timeoutMs !== undefined && options.timeoutMs <= maxTimerMs ? options.timeoutMs : undefined;
    const name = `${service}/${method}`;
    if (this.#lost !== undefined) {
      throw new TtrpcError(statusCode.Unavailable, `${name}: ${this.#lost.message}`, { cause: this.#lost });
    }
    if (signal?.aborted) throw canceled(name, signal);
    if (timeoutMs !== undefined && timeoutMs <= 0) throw timedOut(name, timeoutMs);
    const data = encodeRequest({ service, method, payload, timeoutMs, metadata });
    if (data.length > maxDataLength) {
      throw new TtrpcError(
        statusCode.ResourceExhausted,
        `${name}: request of ${data.length} bytes is over the maximum message size of ${maxDataLength}`,
      );
    }
    if (this.#nextStreamId > maxStreamId) {
      throw new TtrpcError(statusCode.Unavailable, `${name}: all stream ids of the connection are used up`);
    }
    const streamId = this.#nextStreamId;
    this.#nextStreamId += 2;

    const { promise, resolve, reject } = Promise.withResolvers<Buffer>();
    const settle = (result: Buffer | TtrpcError): void => {
      this.#calls.delete(streamId);
      if (result instanceof TtrpcError) reject(result);
      else resolve(result);
    };
    this.#calls.set(streamId, { name, settle });
    const onAbort = (): void => {
      if (signal !== undefined) settle(canceled(name, signal));
    };
    signal?.addEventListener('abort', onAbort, { once: true });
    const timer = timeoutMs === undefined ? undefined : setTimeout(() => settle(timedOut(name, timeoutMs)), timeoutMs);
    try {
      this.#socket.write(encodeFrame({ streamId, type: messageType.request, flags: 0 }, data));
      return await promise;
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener('abort', onAbort);
    }
  }

  /** Closes the connection; open calls fail with Unavailable. */
  close(): void {
    this.#lose('connection closed by the client');
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #onFrame(frame: DecodedFrame): void {
    // Unknown ids are the replies to calls that were given up; unknown types are from later versions.
    const call = this.#calls.get(frame.streamId);
    if (call === undefined) return;
    if (frame.type === messageType.data) {
      call.settle(new TtrpcError(statusCode.Internal, `${call.name}: the server answered a unary call with a stream`));
    } else if (frame.type === messageType.response) {
      call.settle(frame.kind === 'frame' ? replyOf(frame.data) : tooLarge(call.name, frame.length));
    }
  }

  #lose(reason: string, cause?: unknown): void {
    if (this.#lost !== undefined) return;
    this.#lost = new TtrpcError(statusCode.Unavailable, reason, cause === undefined ? {} : { cause });
    this.#socket.destroy();
    for (const call of Array.from(this.#calls.values())) {
      // An error of its own for each call, so that each names its method.
      call.settle(new TtrpcError(statusCode.Unavailable, `${call.name}: ${reason}`, { cause: this.#lost }));
    }
    this.#closed.resolve();
  }
}

function replyOf(data: Buffer): Buffer | TtrpcError {
  try {
    return decodeReply(data);
  } catch (error) {
    return error instanceof TtrpcError ? error : new TtrpcError(statusCode.Internal, String(error), { cause: error });
  }
}

function tooLarge(name: string, length: number): TtrpcError {
  return new TtrpcError(
    statusCode.ResourceExhausted,
    `${name}: reply of ${length} bytes is over the maximum message size of ${maxDataLength}`,
  );
}

function canceled(name: string, signal: AbortSignal): TtrpcError {
  return new TtrpcError(statusCode.Canceled, `${name}: canceled`, { cause: signal.reason });
}

function timedOut(name: string, timeoutMs: number): TtrpcError {
  return new TtrpcError(statusCode.DeadlineExceeded, `${name}: no reply within ${timeoutMs} ms`);
}
