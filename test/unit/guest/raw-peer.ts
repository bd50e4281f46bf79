/**
 * HTTP/2 frames by hand (RFC 9113, section 4), for a peer that keeps to no rule: what a real implementation would never
 * send. A frame is a 24-bit length, a type, flags, a 31-bit stream number, and the payload.
 */
import type { Socket } from 'node:net';

export const frameTypes = {
  data: 0,
  headers: 1,
  priority: 2,
  reset: 3,
  settings: 4,
  pushPromise: 5,
  ping: 6,
  goaway: 7,
  windowUpdate: 8,
  continuation: 9,
} as const;

const endStream = 1;
const endHeaders = 4;
/** What a client says first (RFC 9113, section 3.4). */
const prefaceBytes = 24;

export function frame(
  type: keyof typeof frameTypes,
  { flags = 0, stream = 0, payload = Buffer.alloc(0) }: { flags?: number; stream?: number; payload?: Buffer } = {},
): Buffer {
  const header = Buffer.alloc(9);
  header.writeUIntBE(payload.length, 0, 3);
  header.writeUInt8(frameTypes[type], 3);
  header.writeUInt8(flags, 4);
  header.writeUInt32BE(stream, 5);
  return Buffer.concat([header, payload]);
}

/** A header that is in no table (RFC 7541, section 6.2.2); of at most 126 bytes each, or with a length of two bytes. */
export function literal(name: string, value: string): Buffer {
  const length = (text: string) => {
    if (text.length < 127) return Buffer.from([text.length]);
    const rest = text.length - 127;
    const bytes = [127];
    for (let left = rest; ; left >>>= 7) {
      if (left < 128) return Buffer.from([...bytes, left]);
      bytes.push((left & 127) | 128);
    }
  };
  return Buffer.concat([Buffer.from([0]), length(name), Buffer.from(name), length(value), Buffer.from(value)]);
}

/** `:status: 200` is number 8 of HPACK's static table. */
export function answerHeaders(stream: number, more: readonly Buffer[] = []): Buffer {
  return frame('headers', { flags: endHeaders, stream, payload: Buffer.concat([Buffer.from([0x88]), ...more]) });
}

export function trailers(stream: number, more: readonly Buffer[] = [literal('grpc-status', '0')]): Buffer {
  return frame('headers', { flags: endHeaders | endStream, stream, payload: Buffer.concat(more) });
}

/** A gRPC message with its five bytes before it, of which a test may choose the flag and the length. */
export function grpcMessage(body: Uint8Array, length = body.length, flag = 0): Buffer {
  const prefix = Buffer.alloc(5);
  prefix.writeUInt8(flag, 0);
  prefix.writeUInt32BE(length, 1);
  return Buffer.concat([prefix, body]);
}

/** A message in frames of `size` bytes. */
export function dataFrames(stream: number, bytes: Buffer, size = 16_384): Buffer {
  const frames: Buffer[] = [];
  for (let at = 0; at < bytes.length; at += size) {
    frames.push(frame('data', { stream, payload: bytes.subarray(at, at + size) }));
  }
  return Buffer.concat(frames);
}

/** A whole answer to a unary call. */
export function answer(stream: number, body: Uint8Array): Buffer {
  return Buffer.concat([answerHeaders(stream), dataFrames(stream, grpcMessage(body)), trailers(stream)]);
}

/** Calls `onCall` with the number of each stream that the client opens, and takes the settings over. */
export function serveRaw(socket: Socket, onCall: (stream: number) => void): void {
  let buffered = Buffer.alloc(0);
  let skip = prefaceBytes;
  socket.on('error', () => {});
  socket.write(frame('settings'));
  socket.on('data', (chunk: Buffer) => {
    buffered = Buffer.concat([buffered, chunk]);
    if (buffered.length < skip) return;
    buffered = buffered.subarray(skip);
    skip = 0;
    while (buffered.length >= 9) {
      const length = buffered.readUIntBE(0, 3);
      if (buffered.length < 9 + length) return;
      const [type, flags, stream] = [buffered.readUInt8(3), buffered.readUInt8(4), buffered.readUInt32BE(5)];
      buffered = buffered.subarray(9 + length);
      if (type === frameTypes.headers) onCall(stream);
      if (type === frameTypes.settings && flags === 0) socket.write(frame('settings', { flags: 1 }));
    }
  });
}

/** The same bytes so many times. */
export function repeated(bytes: Buffer, times: number): Buffer {
  return Buffer.alloc(times * bytes.length, bytes);
}

/** Writes the same bytes again and again, as fast as the other side takes them, until the socket is closed. */
export function flood(socket: Socket, bytes: Buffer): void {
  const batch = repeated(bytes, Math.max(1, Math.floor(65_536 / bytes.length)));
  const pump = () => {
    while (!socket.destroyed) if (!socket.write(batch)) return;
  };
  socket.on('drain', pump);
  pump();
}
