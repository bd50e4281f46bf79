import { closeSync, openSync, readdirSync, rmSync } from 'node:fs';
import path from 'node:path';
import { socketIsServed } from '../host/unix-socket.ts';
import { flock } from '../sys/lock.ts';

/**
 * Removes the sockets in a folder on which nobody listens any more: those of relays that were killed. The lock is the
 * launcher's (native/relay-socket.c): while one is just making a socket there, nothing is removed, since a launcher
 * replaces a dead one by itself.
 */
export async function removeDeadSockets(folder: string): Promise<void> {
  const lock = openSync(folder, 'r');
  try {
    if (!flock(lock)) return;
    await Promise.all(readdirSync(folder).map((name) => removeIfDead(path.join(folder, name))));
  } finally {
    closeSync(lock);
  }
}

/** One that cannot be tried is left alone: it is in nobody's way. */
async function removeIfDead(file: string): Promise<void> {
  const served = await socketIsServed(file).catch(() => true);
  if (!served) rmSync(file, { recursive: true, force: true });
}
