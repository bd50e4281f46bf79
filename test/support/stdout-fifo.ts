import { constants, openSync, readdirSync } from 'node:fs';
import { Socket } from 'node:net';
import { join } from 'node:path';
import type { Scene } from './scene.ts';

/**
 * One more reading end of the FIFO for a detached container's stdout, opened without waiting for a writer; undefined when ctr
 * has removed the FIFO. Each has a folder of its own, so those of others may go meanwhile.
 */
export function openStdout(scene: Scene, id: string): Socket | undefined {
  for (const folder of readdirSync(scene.fifoDir)) {
    try {
      const fd = openSync(join(scene.fifoDir, folder, `${id}-stdout`), constants.O_RDONLY | constants.O_NONBLOCK);
      return new Socket({ fd, readable: true, writable: false });
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    }
  }
  return undefined;
}
