/** A TCP connection's two directions, each with its own end, one chunk at a time; and its end by force, socket(7). */
import type { Socket } from 'node:net';
import { countRelayed } from './garbage.ts';
import { declare } from './libc.ts';

/** asm-generic/socket.h. */
const SOL_SOCKET = 1;
const SO_LINGER = 13;

const cSetsockopt = declare<[fd: number, level: number, name: number, value: Int32Array, length: number]>(
  'int setsockopt(int sockfd, int level, int optname, const int *optval, unsigned int optlen)',
);

/**
 * Hands over what comes from the other end, until that has sent its last; the direction to it stays open. No more is read
 * while `take` has not resolved.
 *
 * @throws what `take` throws; ECONNRESET
 */
export async function readSocket(socket: Socket, take: (data: Buffer) => Promise<void>): Promise<void> {
  // Without the option the socket would be destroyed at the end of this direction.
  for await (const data of socket.iterator({ destroyOnReturn: false }) as AsyncIterable<Buffer>) {
    await take(data);
    countRelayed(data.length);
  }
}

/** Resolves when the kernel has taken all of it. @throws EPIPE, ECONNRESET */
export function writeSocket(socket: Socket, data: Buffer): Promise<void> {
  countRelayed(data.length);
  return new Promise((resolve, reject) => {
    socket.write(data, (error) => (error ? reject(error) : resolve()));
  });
}

/** Ends the direction to the other end; the one from it stays open. @throws EPIPE, ECONNRESET */
export function endSocket(socket: Socket): Promise<void> {
  return new Promise((resolve, reject) => {
    socket.end((error?: Error | null) => (error ? reject(error) : resolve()));
  });
}

/**
 * Ends a connection in both directions at once, so that its other end gets ECONNRESET; what is on its way is dropped. Node's
 * `resetAndDestroy` writes all of that first, and ends the direction in order before it resets it.
 */
export function resetSocket(socket: Socket): void {
  // The handle that Node's stream reads from; its types leave it out.
  const handle = (socket as unknown as { readonly _handle: { readonly fd: number } | null })._handle;
  // struct linger: on, and no time. Where that fails the connection just ends.
  const linger = Int32Array.of(1, 0);
  if (handle !== null) cSetsockopt(handle.fd, SOL_SOCKET, SO_LINGER, linger, linger.byteLength);
  socket.destroy();
}
