/** The far end of a ttrpc connection, played by hand: writes any bytes, and shows the frames that come back. */
import { type Duplex, duplexPair } from 'node:stream';
import {
  type CallContext,
  type DecodedFrame,
  decodeReply,
  encodeFrame,
  encodeRequest,
  FrameDecoder,
  type Handler,
  messageType,
  type RequestEnvelope,
  TtrpcError,
  type TtrpcServer,
} from '../../../src/rpc/ttrpc/index.ts';

export type WholeFrame = Extract<DecodedFrame, { kind: 'frame' }>;

export class RawPeer {
  readonly socket: Duplex;
  readonly #decoder = new FrameDecoder();
  readonly #frames: WholeFrame[] = [];
  readonly #ended = Promise.withResolvers<void>();
  #wanted: { count: number; resolve: (frames: WholeFrame[]) => void; reject: (error: Error) => void } | undefined;
  #isEnded = false;

  constructor(socket: Duplex) {
    this.socket = socket;
    socket.on('error', () => {});
    socket.on('data', (chunk: Buffer) => {
      for (const frame of this.#decoder.push(chunk)) {
        if (frame.kind === 'frame') this.#frames.push(frame);
      }
      this.#deliver();
    });
    const onEnd = (): void => {
      this.#isEnded = true;
      this.#deliver();
      this.#ended.resolve();
    };
    socket.on('end', onEnd);
    socket.on('close', onEnd);
  }

  /** Resolves when the other side has closed. */
  get ended(): Promise<void> {
    return this.#ended.promise;
  }

  /** Frames that have come and were not asked for yet. */
  get unread(): number {
    return this.#frames.length;
  }

  write(...chunks: Uint8Array[]): void {
    for (const chunk of chunks) this.socket.write(chunk);
  }

  /** The next `count` frames; rejects when the connection ends before. */
  take(count: number): Promise<WholeFrame[]> {
    const { promise, resolve, reject } = Promise.withResolvers<WholeFrame[]>();
    this.#wanted = { count, resolve, reject };
    this.#deliver();
    return promise;
  }

  async next(): Promise<WholeFrame> {
    const [frame] = await this.take(1);
    if (frame === undefined) throw new Error('no frame');
    return frame;
  }

  #deliver(): void {
    const wanted = this.#wanted;
    if (wanted === undefined) return;
    if (this.#frames.length >= wanted.count) {
      this.#wanted = undefined;
      wanted.resolve(this.#frames.splice(0, wanted.count));
    } else if (this.#isEnded) {
      this.#wanted = undefined;
      wanted.reject(new Error(`connection ended with ${this.#frames.length} of ${wanted.count} frames`));
    }
  }
}

/** A fresh in-memory connection to the server. */
export function connect(server: TtrpcServer): RawPeer {
  const [near, far] = duplexPair();
  server.serve(far);
  return new RawPeer(near);
}

export function request(streamId: number, envelope: Partial<RequestEnvelope>, flags = 0): Buffer {
  const data = encodeRequest({ service: 'test.Echo', method: 'Echo', payload: Buffer.alloc(0), ...envelope });
  return encodeFrame({ streamId, type: messageType.request, flags }, data);
}

/** A Response as `code: message`, or as its payload in hex. */
export function read(frame: WholeFrame): string {
  if (frame.type !== messageType.response || frame.flags !== 0) return `type ${frame.type} flags ${frame.flags}`;
  try {
    return decodeReply(frame.data).toString('hex');
  } catch (error) {
    return error instanceof TtrpcError ? `${error.codeName}: ${error.message}` : String(error);
  }
}

/** Cuts bytes into chunks of the given sizes, over and over. */
export function* chop(bytes: Buffer, sizes: readonly number[]): Generator<Buffer> {
  let turn = 0;
  for (let offset = 0; offset < bytes.length; turn += 1) {
    const size = Math.max(1, sizes[turn % sizes.length] ?? bytes.length);
    yield bytes.subarray(offset, offset + size);
    offset += size;
  }
}

/** A method that stays open, as Wait does: `opened` gives each call's context and a way to answer it. */
export function openCalls(): {
  handler: Handler;
  calls: { context: CallContext; answer: (payload: Buffer) => void }[];
} {
  const calls: { context: CallContext; answer: (payload: Buffer) => void }[] = [];
  const handler: Handler = (_, context) =>
    new Promise((answer, reject) => {
      calls.push({ context, answer });
      context.signal.addEventListener('abort', () => reject(context.signal.reason));
    });
  return { handler, calls };
}
