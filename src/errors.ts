/**
 * The one error type that crosses Kiln's module boundaries.
 *
 * Codes are the gRPC status names, because that is what containerd (ttrpc) and the agent (gRPC) speak; the numbers are
 * in `grpcStatus`, once. The message is for the person who typed the command: it names the thing that is wrong. The
 * hint says what to do.
 */
export const grpcStatus = {
  canceled: 1,
  unknown: 2,
  'invalid-argument': 3,
  'deadline-exceeded': 4,
  'not-found': 5,
  'already-exists': 6,
  'permission-denied': 7,
  'resource-exhausted': 8,
  'failed-precondition': 9,
  aborted: 10,
  'out-of-range': 11,
  unimplemented: 12,
  internal: 13,
  unavailable: 14,
} as const;

export type ErrorCode = keyof typeof grpcStatus;

const codeByStatus = new Map<number, ErrorCode>(
  Object.entries(grpcStatus).map(([code, status]) => [status, code as ErrorCode]),
);

export interface KilnErrorOptions {
  /** What the user can do about it, one sentence. */
  readonly hint?: string;
  readonly cause?: unknown;
}

export class KilnError extends Error {
  override readonly name = 'KilnError';
  readonly code: ErrorCode;
  readonly hint: string | undefined;

  constructor(code: ErrorCode, message: string, options: KilnErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.code = code;
    this.hint = options.hint;
  }

  /** The message with its hint: what a user gets to read on one line. */
  get userMessage(): string {
    return this.hint === undefined ? this.message : `${this.message} (${this.hint})`;
  }

  /** The same error, with what failed by it before its message. */
  after(what: string): KilnError {
    const hint = this.hint === undefined ? {} : { hint: this.hint };
    return new KilnError(this.code, `${what}: ${this.message}`, { ...hint, cause: this });
  }

  /**
   * Any thrown value as a KilnError; what is not one already becomes `internal`. Where a clean-up failed as well, the
   * code is that of what went wrong first, and the message tells both.
   */
  static from(error: unknown): KilnError {
    if (error instanceof KilnError) return error;
    if (error instanceof SuppressedError) {
      const first = KilnError.from(error.suppressed);
      const message = `${first.message}; and then: ${KilnError.from(error.error).message}`;
      return new KilnError(first.code, message, {
        ...(first.hint === undefined ? {} : { hint: first.hint }),
        cause: first,
      });
    }
    const message = error instanceof Error ? error.message : String(error);
    return new KilnError('internal', message, { cause: error });
  }

  /** The code for a gRPC status number; `unknown` for one we have no name for. */
  static codeOfStatus(status: number): ErrorCode {
    return codeByStatus.get(status) ?? 'unknown';
  }
}

/** An error as a log should have it: all of it where a clean-up has failed as well, which a SuppressedError hides. */
export function forLog(error: unknown): Error {
  return error instanceof Error && !(error instanceof SuppressedError) ? error : KilnError.from(error);
}
