/**
 * What a call keeps of a peer that chooses the size of its frames.
 *
 * HTTP/2's windows count the bytes of DATA frames and not the frames. A peer that sends a byte a frame makes us keep an
 * object of a hundred bytes and more for each: a stream that nobody reads would cost 200 MiB instead of its window of
 * one. Here bytes that wait are copied together, in both places where they do: in a stream that is paused, and in a
 * message that is not complete.
 */
import type { Readable } from 'node:stream';

/** gRPC's prefix of a message: a compression flag, and a length of four bytes. */
const prefixBytes = 5;

/** A chunk shorter than this is copied when it has to wait. In bytes. */
const smallChunk = 4096;

/** What small chunks are copied into. In bytes. */
const slabBytes = 16 * 1024;

/**
 * Copies small chunks together that a paused stream is given. The order is kept, and nothing waits once the stream
 * flows. To be called in the turn in which the stream got its reader.
 */
export function joinWaitingChunks(stream: Readable): void {
  const push = stream.push.bind(stream);
  let slab = Buffer.alloc(0);
  let length = 0;
  const flush = () => {
    if (length === 0) return;
    const joined = slab.subarray(0, length);
    length = 0;
    slab = Buffer.alloc(0);
    push(joined);
  };
  stream.push = (chunk: unknown, encoding?: BufferEncoding) => {
    const waits = length > 0 || stream.readableLength > 0;
    if (!(waits && chunk instanceof Uint8Array && chunk.length < smallChunk)) {
      flush();
      return push(chunk, encoding);
    }
    if (length + chunk.length > slabBytes) flush();
    if (length === 0) slab = Buffer.allocUnsafeSlow(slabBytes);
    slab.set(chunk, length);
    length += chunk.length;
    return false;
  };
  // There is always a chunk before those that are joined: when it has been read, they follow.
  stream.on('data', () => {
    if (length > 0 && stream.readableLength === 0) process.nextTick(flush);
  });
}

/** Takes a call's bytes apart into messages, each with its prefix, as grpc-js expects them. */
export class MessageDecoder {
  readonly #limit: number;
  readonly #prefix = Buffer.alloc(prefixBytes);
  #prefixLength = 0;
  /** The message that is being read, its prefix included. */
  #message: Buffer | undefined;
  #length = 0;

  /** @param limit bytes of the longest message taken */
  constructor(limit: number) {
    this.#limit = limit;
  }

  /** @throws Error when a message is longer than the limit */
  write(data: Buffer): Buffer[] {
    const messages: Buffer[] = [];
    for (let at = 0; at < data.length; ) {
      if (this.#message === undefined) {
        const taken = data.copy(this.#prefix, this.#prefixLength, at, at + prefixBytes - this.#prefixLength);
        at += taken;
        this.#prefixLength += taken;
        if (this.#prefixLength < prefixBytes) break;
        this.#message = this.#begin();
      }
      const taken = data.copy(this.#message, this.#length, at);
      at += taken;
      this.#length += taken;
      if (this.#length < this.#message.length) break;
      messages.push(this.#message);
      this.#message = undefined;
    }
    return messages;
  }

  #begin(): Buffer {
    this.#prefixLength = 0;
    const length = this.#prefix.readUInt32BE(1);
    if (length > this.#limit) throw new Error(`a message of ${length} bytes, of which ${this.#limit} are allowed`);
    const message = Buffer.allocUnsafe(prefixBytes + length);
    this.#prefix.copy(message);
    this.#length = prefixBytes;
    return message;
  }
}
