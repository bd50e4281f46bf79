/** The `kiln` command's end of the control protocol; unlike the launcher it never starts a kilnd. */
import { connect } from 'node:net';
import { KilnError } from '../../errors.ts';
import {
  type ControlReply,
  type ControlRequest,
  controlMessageLimit,
  encodeControlRequest,
  parseControlReply,
} from './request.ts';
import { controlSocketPath } from './socket-path.ts';

/**
 * Sends one request to the kilnd of a state folder and resolves with its reply, whatever its exit code.
 * @throws {KilnError} `unavailable` when no kilnd runs or it stopped before it answered; `permission-denied` when its
 * socket is not ours to use; what the encoder throws. An aborted signal rejects with the signal's reason.
 */
export async function controlCall(
  stateDir: string,
  request: ControlRequest,
  options: { readonly signal?: AbortSignal } = {},
): Promise<ControlReply> {
  const { signal } = options;
  const socketPath = controlSocketPath(stateDir);
  const bytes = encodeControlRequest(request);
  signal?.throwIfAborted();
  const socket = connect({ path: socketPath, allowHalfOpen: true });
  const abort = () => socket.destroy();
  signal?.addEventListener('abort', abort);
  try {
    socket.end(bytes);
    const chunks: Uint8Array[] = [];
    let length = 0;
    for await (const chunk of socket as AsyncIterable<Uint8Array>) {
      length += chunk.length;
      if (length > controlMessageLimit) {
        throw new KilnError('resource-exhausted', `kilnd's reply exceeds ${controlMessageLimit} bytes`);
      }
      chunks.push(chunk);
    }
    signal?.throwIfAborted();
    const reply = parseControlReply(Buffer.concat(chunks));
    if (reply === null) throw stopping(socketPath);
    return reply;
  } catch (error) {
    signal?.throwIfAborted();
    throw error instanceof KilnError ? error : connectionError(error, socketPath);
  } finally {
    signal?.removeEventListener('abort', abort);
    socket.destroy();
  }
}

function connectionError(error: unknown, socketPath: string): KilnError {
  const cause = error;
  switch ((error as NodeJS.ErrnoException | null)?.code) {
    case 'ENOENT':
    case 'ECONNREFUSED':
      return new KilnError('unavailable', `kilnd is not running: nothing listens on ${socketPath}`, {
        hint: 'it starts by itself with the first container; another state folder is chosen by KILN_STATE_DIR',
        cause,
      });
    case 'EACCES':
    case 'EPERM':
      return new KilnError('permission-denied', `no access to ${socketPath}`, { hint: 'run this as root', cause });
    case 'ECONNRESET':
    case 'EPIPE':
      return stopping(socketPath, cause);
    default:
      return new KilnError('internal', `the connection to ${socketPath} failed: ${String(error)}`, { cause });
  }
}

function stopping(socketPath: string, cause?: unknown): KilnError {
  return new KilnError('unavailable', `the kilnd at ${socketPath} stopped before it answered`, { cause });
}
