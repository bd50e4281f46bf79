/**
 * What the agent answers when a call cannot be done. The codes are gRPC's (the table is part of gRPC's specification,
 * statuscodes.md); proto/kiln/agent/v1/agent.proto says which one means what here. The message is written for the
 * person who typed `ctr run`.
 */
const statusOfCode = {
  'invalid-argument': 3,
  'not-found': 5,
  'already-exists': 6,
  'failed-precondition': 9,
  aborted: 10,
  'out-of-range': 11,
  internal: 13,
} as const;

export type AgentErrorCode = keyof typeof statusOfCode;

export class AgentError extends Error {
  override readonly name = 'AgentError';
  readonly code: AgentErrorCode;

  constructor(code: AgentErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
  }
}

/** Any thrown value as what gRPC sends: a status number and its details. What is not an AgentError is INTERNAL. */
export function grpcStatusOf(error: unknown): { code: number; details: string } {
  // When a clean-up failed as well, the code is that of what went wrong first.
  let first = error;
  while (first instanceof SuppressedError) first = first.suppressed;
  const code = first instanceof AgentError ? first.code : 'internal';
  return { code: statusOfCode[code], details: describe(error) };
}

/** The text of any thrown value; what a failed clean-up hid is part of it. */
export function describe(error: unknown): string {
  if (error instanceof SuppressedError) return `${describe(error.suppressed)}; and then: ${describe(error.error)}`;
  return error instanceof Error ? error.message : String(error);
}
