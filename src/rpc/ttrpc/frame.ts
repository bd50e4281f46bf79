/**
 * ttrpc framing: the bytes on the wire, and nothing else (no sockets, no protobuf).
 *
 * ttrpc is containerd's RPC for processes of one host: many concurrent calls over one stream socket, without HTTP/2,
 * handshake, ping or flow control. Each message is one frame: a 10-byte header, then the data.
 *
 *     offset  0         4          8      9       10
 *             | length  | streamID | type | flags | data ...      both numbers are unsigned, big-endian
 *
 * `length` counts the data only and is at most 4 MiB. The client numbers its calls with odd stream ids that only grow.
 * Type 1 is a Request (opens the stream), 2 a Response (ends it), 3 Data (streaming methods only). A unary call is one
 * Request with flags 0, answered by one Response with the same id, in any order relative to other calls.
 * Source: github.com/containerd/ttrpc PROTOCOL.md and channel.go.
 */

/** Bytes of a frame's header (channel.go, messageHeaderLength). */
export const headerLength = 10;

/** The most data a frame may carry, in bytes (channel.go, messageLengthMax). */
export const maxDataLength = 4 << 20;

/** The first room given to data that arrives in pieces; it doubles as the data really comes. */
const firstAllocation = 64 << 10;

/** PROTOCOL.md, "Message Types". A receiver ignores types it does not know. */
export const messageType = { request: 1, response: 2, data: 3 } as const;

/** PROTOCOL.md, "Request Flags" and "Data Flags", seen from the receiver: "remote" is the sender of the frame. */
export const frameFlag = { remoteClosed: 0x1, remoteOpen: 0x2, noData: 0x4 } as const;

export interface FrameHeader {
  /** Unsigned 32 bits. */
  readonly streamId: number;
  /** One byte: a `messageType`, or one from a later version of the protocol. */
  readonly type: number;
  /** One byte of `frameFlag`s. */
  readonly flags: number;
}

/** What the decoder found: a whole frame, or the header of one that is larger than allowed (its data is skipped). */
export type DecodedFrame =
  | (FrameHeader & { readonly kind: 'frame'; readonly data: Buffer })
  | (FrameHeader & { readonly kind: 'oversized'; readonly length: number });

/**
 * One frame, ready to be written.
 *
 * @throws RangeError when the data is longer than `maxDataLength` or a header field does not fit its width.
 */
export function encodeFrame(header: FrameHeader, data: Uint8Array): Buffer {
  if (data.length > maxDataLength) {
    throw new RangeError(`frame data of ${data.length} bytes is over the limit of ${maxDataLength}`);
  }
  const frame = Buffer.allocUnsafe(headerLength + data.length);
  frame.writeUInt32BE(data.length, 0);
  frame.writeUInt32BE(header.streamId, 4);
  frame.writeUInt8(header.type, 8);
  frame.writeUInt8(header.flags, 9);
  frame.set(data, headerLength);
  return frame;
}

/** A frame whose header is complete and whose data is still arriving. */
interface PartialFrame {
  readonly header: FrameHeader;
  readonly length: number;
  buffer: Buffer;
  filled: number;
}

/**
 * Turns a byte stream into frames, whatever the chunks it comes in. One per connection; it cannot fail.
 *
 * Each byte is copied a bounded number of times (none for a frame that lies inside one chunk), and memory follows the
 * data received, not the length announced: a peer cannot make us reserve 4 MiB with ten bytes.
 */
export class FrameDecoder {
  readonly #header = Buffer.alloc(headerLength);
  #headerFilled = 0;
  #partial: PartialFrame | undefined;
  /** Bytes of an oversized frame that are still to be dropped. */
  #discard = 0;

  /** True between frames' edges: a connection that ends now was cut in the middle of a message. */
  get midFrame(): boolean {
    return this.#headerFilled > 0 || this.#partial !== undefined || this.#discard > 0;
  }

  /** Bytes reserved for the frame that is arriving; never more than twice what came, plus 64 KiB. */
  get bufferedBytes(): number {
    return this.#partial?.buffer.length ?? 0;
  }

  /**
   * Takes the next chunk and returns the frames it completes, in order. An oversized frame is reported as soon as its
   * header is there, so that the sender learns of it even if the data never ends.
   *
   * The data of a frame may share memory with the chunk: do not reuse the chunk's buffer.
   */
  push(chunk: Uint8Array): DecodedFrame[] {
    const bytes = Buffer.isBuffer(chunk) ? chunk : Buffer.from(chunk.buffer, chunk.byteOffset, chunk.byteLength);
    const frames: DecodedFrame[] = [];
    let offset = 0;
    while (offset < bytes.length) {
      if (this.#discard > 0) {
        const skipped = Math.min(this.#discard, bytes.length - offset);
        this.#discard -= skipped;
        offset += skipped;
      } else if (this.#partial !== undefined) {
        offset += this.#fill(this.#partial, bytes, offset, frames);
      } else {
        const taken = bytes.copy(this.#header, this.#headerFilled, offset, offset + headerLength - this.#headerFilled);
        this.#headerFilled += taken;
        offset += taken;
        if (this.#headerFilled === headerLength) offset += this.#begin(bytes, offset, frames);
      }
    }
    return frames;
  }

  /** Acts on a complete header; returns how many bytes of data it took from the chunk. */
  #begin(bytes: Buffer, offset: number, frames: DecodedFrame[]): number {
    this.#headerFilled = 0;
    const length = this.#header.readUInt32BE(0);
    const header = {
      streamId: this.#header.readUInt32BE(4),
      type: this.#header.readUInt8(8),
      flags: this.#header.readUInt8(9),
    };
    if (length > maxDataLength) {
      this.#discard = length;
      frames.push({ kind: 'oversized', ...header, length });
      return 0;
    }
    const available = bytes.length - offset;
    if (length <= available) {
      frames.push({ kind: 'frame', ...header, data: bytes.subarray(offset, offset + length) });
      return length;
    }
    const room = Math.min(length, Math.max(firstAllocation, available));
    this.#partial = { header, length, buffer: Buffer.allocUnsafe(room), filled: 0 };
    return 0;
  }

  /** Adds the chunk's bytes to the frame that is arriving; returns how many it took. */
  #fill(partial: PartialFrame, bytes: Buffer, offset: number, frames: DecodedFrame[]): number {
    const taken = Math.min(partial.length - partial.filled, bytes.length - offset);
    const needed = partial.filled + taken;
    if (needed > partial.buffer.length) {
      // Doubling keeps the total copying linear in the data.
      const grown = Buffer.allocUnsafe(Math.min(partial.length, Math.max(needed, partial.buffer.length * 2)));
      partial.buffer.copy(grown, 0, 0, partial.filled);
      partial.buffer = grown;
    }
    bytes.copy(partial.buffer, partial.filled, offset, offset + taken);
    partial.filled = needed;
    if (partial.filled === partial.length) {
      this.#partial = undefined;
      frames.push({ kind: 'frame', ...partial.header, data: partial.buffer });
    }
    return taken;
  }
}
