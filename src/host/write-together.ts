import type { Writable } from 'node:stream';

/** Writes to a socket, in one piece with all else that is written to it so in this turn: a piece wakes its reader. */
export function writeTogether(socket: Writable, text: string): void {
  socket.cork();
  process.nextTick(() => socket.uncork());
  socket.write(text);
}
