import { once } from 'node:events';
import { chmodSync } from 'node:fs';
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

/**
 * Listens on a Unix socket that only this user may connect to. Rejects with Node's error, EADDRINUSE where the file is
 * there already.
 */
export async function listenPrivately(server: net.Server, path: string): Promise<void> {
  // listen() binds before it returns, so the mask covers exactly the moment in which the socket file appears.
  const mask = process.umask(0o177);
  try {
    server.listen({ path });
  } finally {
    process.umask(mask);
  }
  await once(server, 'listening');
  chmodSync(path, 0o600);
}

/** Whether somebody accepts connections there. Rejects with Node's error where that cannot be found out. */
export function socketIsServed(path: string): Promise<boolean> {
  return new Promise((resolve, reject) => {
    const probe = net.connect({ path });
    probe.once('connect', () => {
      probe.destroy();
      resolve(true);
    });
    probe.once('error', (error: NodeJS.ErrnoException) => {
      if (error.code === 'ECONNREFUSED' || error.code === 'ENOENT') resolve(false);
      // More wait there than it can take at once.
      else if (error.code === 'EAGAIN') resolve(true);
      else reject(error);
    });
  });
}
