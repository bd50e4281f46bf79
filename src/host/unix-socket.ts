import net from 'node:net';
import { type ErrorCode, KilnError } from '../errors.ts';

/** sun_path has 108 bytes with its NUL, unix(7). Node cuts a longer path short and says nothing. */
const socketPathLimit = 107;

/** Throws `code` for a path that is too long for a Unix socket. */
export function requireSocketPath(path: string, code: ErrorCode = 'failed-precondition'): void {
  const length = Buffer.byteLength(path);
  if (length <= socketPathLimit) return;
  throw new KilnError(code, `the socket path ${path} has ${length} bytes, the system's limit is ${socketPathLimit}`, {
    hint: 'choose a shorter KILN_STATE_DIR',
  });
}

/** Listens on a Unix socket that does not exist yet. Throws `internal` naming the path. */
export async function listenUnix(path: string): Promise<net.Server> {
  requireSocketPath(path);
  const server = net.createServer();
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  server.once('error', reject);
  server.listen(path, resolve);
  try {
    await promise;
  } catch (cause) {
    throw new KilnError('internal', `cannot listen on ${path}: ${(cause as Error).message}`, { cause });
  }
  server.off('error', reject);
  return server;
}
