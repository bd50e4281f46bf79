/**
 * What a ttrpc Request and Response frame carry: the two protobuf envelopes around a call's own message.
 *
 *     Request  { 1 service, 2 method, 3 payload, 4 timeout_nano (relative, 0 = none), 5 metadata {1 key, 2 value}[] }
 *     Response { 1 status {1 code, 2 message, 3 details[]}, 2 payload }
 *
 * proto3 omits empty fields, so a successful call with an empty reply is a Response frame of length 0.
 * Source: github.com/containerd/ttrpc request.proto.
 */
import { BinaryReader } from '@bufbuild/protobuf/wire';
import { Request, Response } from '../../../gen/ttrpc.ts';
import { type CallStatus, statusCode, TtrpcError } from './status.ts';

const nanosPerMilli = 1_000_000n;

/** The longest delay that setTimeout takes, in ms (2^31 - 1, about 24 days); above it Node fires at once. */
export const maxTimerMs = 0x7fff_ffff;

export interface RequestEnvelope {
  /** Full service name, such as `containerd.task.v2.Task`. */
  readonly service: string;
  /** Bare method name, such as `Create`. */
  readonly method: string;
  readonly payload: Uint8Array;
  /** The caller's remaining time in ms, rounded up; undefined for none, 0 or less when it has passed already. */
  readonly timeoutMs?: number | undefined;
  readonly metadata?: ReadonlyMap<string, string> | undefined;
}

export interface DecodedRequest extends RequestEnvelope {
  readonly payload: Buffer;
  readonly metadata: ReadonlyMap<string, string>;
}

export function encodeRequest(request: RequestEnvelope): Uint8Array {
  const { timeoutMs } = request;
  return Request.encode({
    service: request.service,
    method: request.method,
    payload: asBuffer(request.payload),
    timeoutNano: timeoutMs === undefined ? 0n : BigInt(Math.ceil(timeoutMs)) * nanosPerMilli,
    metadata: Array.from(request.metadata ?? [], ([key, value]) => ({ key, value })),
  }).finish();
}

/** @throws TtrpcError InvalidArgument when the bytes are not a Request. */
export function decodeRequest(data: Uint8Array): DecodedRequest {
  const request = decodeMessage(Request, data, (reason) => {
    return new TtrpcError(statusCode.InvalidArgument, `unmarshal request error: ${reason}`);
  });
  const metadata = new Map<string, string>();
  for (const { key, value } of request.metadata) {
    // A key may come more than once; Go's GetMetadataValue reads the first.
    if (!metadata.has(key)) metadata.set(key, value);
  }
  return {
    service: request.service,
    method: request.method,
    payload: request.payload,
    timeoutMs: toTimeoutMs(request.timeoutNano),
    metadata,
  };
}

/** A successful Response; empty for an empty payload. */
export function encodeReply(payload: Uint8Array): Uint8Array {
  return Response.encode({ status: undefined, payload: asBuffer(payload) }).finish();
}

/** A failed Response. */
export function encodeFailure({ code, message }: CallStatus): Uint8Array {
  return Response.encode({ status: { code, message, details: [] }, payload: Buffer.alloc(0) }).finish();
}

/**
 * The payload of a Response.
 *
 * @throws TtrpcError with the Response's status when the call failed; Internal when the bytes are not a Response.
 */
export function decodeReply(data: Uint8Array): Buffer {
  const { status, payload } = decodeMessage(Response, data, (reason) => {
    return new TtrpcError(statusCode.Internal, `malformed response: ${reason}`);
  });
  if (status !== undefined && status.code !== statusCode.OK) throw new TtrpcError(status.code, status.message);
  return payload;
}

/**
 * Decodes strictly. The generated decoder stops without an error at a zero tag or a stray end-group, which would turn
 * garbage into an empty message; walking the top-level fields first refuses it.
 */
function decodeMessage<T>(
  codec: { decode(input: Uint8Array): T },
  data: Uint8Array,
  refuse: (reason: string) => TtrpcError,
): T {
  try {
    const reader = new BinaryReader(data);
    while (reader.pos < reader.len) {
      const [fieldNumber, wireType] = reader.tag();
      reader.skip(wireType, fieldNumber);
    }
    return codec.decode(data);
  } catch (error) {
    throw refuse(error instanceof Error ? error.message : String(error));
  }
}

function toTimeoutMs(nanos: bigint): number | undefined {
  if (nanos === 0n) return undefined;
  if (nanos < 0n) return 0;
  const milliseconds = Number((nanos + nanosPerMilli - 1n) / nanosPerMilli);
  return milliseconds > maxTimerMs ? undefined : milliseconds;
}

function asBuffer(bytes: Uint8Array): Buffer {
  return Buffer.isBuffer(bytes) ? bytes : Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
