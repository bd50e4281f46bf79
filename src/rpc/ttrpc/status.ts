/**
 * How a ttrpc call fails: the gRPC status codes, as numbers on the wire, and the error that carries one.
 *
 * A Response holds an optional google.rpc.Status {code, message}; absent means success. containerd turns the code into
 * its own error classes (pkg/errgrpc), so the code decides what a user sees: NotFound is often not an error at all.
 */

/** google.golang.org/grpc/codes, the names as Go prints them. */
export const statusCode = {
  OK: 0,
  Canceled: 1,
  Unknown: 2,
  InvalidArgument: 3,
  DeadlineExceeded: 4,
  NotFound: 5,
  AlreadyExists: 6,
  PermissionDenied: 7,
  ResourceExhausted: 8,
  FailedPrecondition: 9,
  Aborted: 10,
  OutOfRange: 11,
  Unimplemented: 12,
  Internal: 13,
  Unavailable: 14,
  DataLoss: 15,
  Unauthenticated: 16,
} as const;

export type StatusName = keyof typeof statusCode;

const names = new Map<number, StatusName>(
  Object.entries(statusCode).map(([name, code]) => [code, name as StatusName] as const),
);

/** The name of a status code; `Code(99)` for one that has none, as Go prints it. */
export function statusName(code: number): string {
  return names.get(code) ?? `Code(${code})`;
}

/** A failed call's code and message, as they go over the wire. */
export interface CallStatus {
  /** A gRPC status code other than 0. */
  readonly code: number;
  readonly message: string;
}

/** The error of a ttrpc call: thrown by handlers to choose the status, and by the client when a call fails. */
export class TtrpcError extends Error implements CallStatus {
  override readonly name = 'TtrpcError';
  /** A gRPC status code (`statusCode`). */
  readonly code: number;

  constructor(code: number, message: string, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
  }

  /** The code's name, such as `NotFound`. */
  get codeName(): string {
    return statusName(this.code);
  }
}
