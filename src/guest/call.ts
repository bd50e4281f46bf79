/** One question to the agent, and its answer. */
import { type Client, type ServiceError, status } from '@grpc/grpc-js';
import { KilnError } from '../errors.ts';
import { printable } from '../host/printable.ts';

/** One unary method of the generated service table. */
export interface UnaryMethod<Req, Res> {
  readonly path: string;
  readonly requestSerialize: (request: Req) => Buffer;
  readonly responseDeserialize: (bytes: Buffer) => Res;
}

export interface CallOptions {
  /** Milliseconds; no limit when absent. */
  readonly limitMs?: number;
  /** Gives the call up: it rejects with the signal's reason, and the agent is told. */
  readonly signal?: AbortSignal | undefined;
}

/** Characters of a guest's message that are passed on. */
const messageChars = 4096;

/** An error of a call in Kiln's terms; `unavailable` when the connection is gone. */
export function toKilnError(error: unknown): KilnError {
  const { code, details } = error as Partial<ServiceError>;
  if (typeof code !== 'number') return KilnError.from(error);
  if (code === status.UNAVAILABLE) {
    return new KilnError('unavailable', 'the connection to the guest was lost', { cause: error });
  }
  return new KilnError(KilnError.codeOfStatus(code), printable(details || String(error)).slice(0, messageChars), {
    cause: error,
  });
}

export function unary<Req, Res>(
  client: Client,
  method: UnaryMethod<Req, Res>,
  request: Req,
  { limitMs, signal }: CallOptions = {},
): Promise<Res> {
  const { path, requestSerialize, responseDeserialize } = method;
  if (signal?.aborted) return Promise.reject(signal.reason);
  return new Promise((resolve, reject) => {
    const deadline = limitMs === undefined ? Number.POSITIVE_INFINITY : Date.now() + limitMs;
    const done = (error: ServiceError | null, response?: Res) => {
      signal?.removeEventListener('abort', cancel);
      if (error === null && response !== undefined) resolve(response);
      else if (signal?.aborted) reject(signal.reason);
      else if (error?.code === status.DEADLINE_EXCEEDED) reject(silent(path, limitMs ?? 0, error));
      else reject(toKilnError(error));
    };
    const call = client.makeUnaryRequest(path, requestSerialize, responseDeserialize, request, { deadline }, done);
    const cancel = () => call.cancel();
    signal?.addEventListener('abort', cancel, { once: true });
  });
}

/** A call that goes on for long: it is cancelled when the signal is aborted, and at the end of the scope in any case. */
export function cancelling(
  call: { cancel(): void; on(event: 'error', listener: () => void): unknown },
  signal: AbortSignal,
): Disposable {
  // Whoever reads its messages is told; an error that comes after them (the cancellation is one) has nobody to go to.
  call.on('error', () => {});
  const cancel = () => call.cancel();
  signal.addEventListener('abort', cancel, { once: true });
  return {
    [Symbol.dispose]: () => {
      signal.removeEventListener('abort', cancel);
      cancel();
    },
  };
}

/** The error of a call that was not answered in time. */
export function silent(path: string, limitMs: number, cause: unknown): KilnError {
  const name = path.slice(path.lastIndexOf('/') + 1);
  return new KilnError(
    'deadline-exceeded',
    `the agent in the guest did not answer ${name} within ${limitMs / 1000} s`,
    { cause },
  );
}
