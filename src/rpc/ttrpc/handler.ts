/**
 * What a ttrpc service is made of: a table of names and functions from bytes to bytes, and a wrapper that lets a
 * function work on typed messages instead.
 */
import { statusCode, TtrpcError } from './status.ts';

/** One client's connection, as handlers and hooks see it: an identity to hang state on. */
export interface TtrpcConnection {
  /** Unique within one server, counting from 1. */
  readonly id: number;
}

export interface CallContext {
  readonly metadata: ReadonlyMap<string, string>;
  /**
   * Aborted when nobody waits for the reply any more: the connection closed (reason Canceled), the request's
   * timeout passed (DeadlineExceeded), or the server is closing (Unavailable). The reason is a TtrpcError, so
   * `signal.throwIfAborted()` and an AbortError from Node both end the call with the right status.
   */
  readonly signal: AbortSignal;
  readonly connection: TtrpcConnection;
  /**
   * True for a request that was sent before, to a server that ended without an answer: what it asks for may have been
   * done already, in part or in full.
   */
  readonly replayed: boolean;
}

/**
 * A method: the request's payload in, the reply's payload out (both encoded messages; either may be empty).
 * Throw a TtrpcError to fail with a chosen status.
 */
export type Handler = (payload: Buffer, context: CallContext) => Promise<Uint8Array>;

/** Full service name → bare method name → handler. */
export type ServiceTable = Readonly<Record<string, Readonly<Record<string, Handler>>>>;

/** What we need of a generated message object (ts-proto's `MessageFns`). */
export interface MessageCodec<T> {
  encode(message: T): { finish(): Uint8Array };
  decode(input: Uint8Array): T;
}

/** A handler that works on messages. A payload that does not decode is answered with InvalidArgument. */
export function unary<Request, Response>(
  requestCodec: MessageCodec<Request>,
  responseCodec: MessageCodec<Response>,
  method: (request: Request, context: CallContext) => Promise<Response>,
): Handler {
  return async (payload, context) => {
    let request: Request;
    try {
      request = requestCodec.decode(payload);
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      throw new TtrpcError(statusCode.InvalidArgument, `malformed request payload: ${reason}`, { cause: error });
    }
    return responseCodec.encode(await method(request, context)).finish();
  };
}
