import { type ErrorCode, forLog, KilnError } from '../errors.ts';
import type { Logger } from '../observe/logger.ts';
import { type CallContext, TtrpcError } from '../rpc/ttrpc/index.ts';

type Method<Request, Response> = (request: Request, context: CallContext) => Promise<Response>;

/** Answers that belong to the conversation, such as a Kill that comes after the exit. */
const ordinary: ReadonlySet<ErrorCode> = new Set(['not-found', 'failed-precondition', 'already-exists', 'canceled']);

/**
 * A method whose failures are in our log too: the client may be gone, and keeps only the message anyway.
 *
 * @param before what the method has to wait for, if there is something
 */
export function told<Request, Response>(
  name: string,
  { logger, before }: { readonly logger: Logger; readonly before?: (() => Promise<void> | undefined) | undefined },
  method: Method<Request, Response>,
): Method<Request, Response> {
  return async (request, context) => {
    try {
      await before?.();
      return await method(request, context);
    } catch (error) {
      const expected = error instanceof TtrpcError || (error instanceof KilnError && ordinary.has(error.code));
      const level = expected && !name.startsWith('Create') ? 'debug' : 'error';
      logger[level]({ err: forLog(error) }, `${name} failed`);
      throw error;
    }
  };
}
