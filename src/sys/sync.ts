import { declare } from './libc.ts';

const cSync = declare<[]>('void sync(void)');
const cSyncfs = declare<[fd: number]>('int syncfs(int fd)');

/** sync(2): writes every filesystem's changes to its disk; blocks this thread until that is done. */
export function sync(): void {
  cSync();
}

/**
 * syncfs(2): writes the changes of the filesystem that `fd` is on to its disk; done on a thread of the pool.
 *
 * @throws SysError
 */
export async function syncfs(fd: number): Promise<void> {
  await cSyncfs.promise('syncfs', `fd ${fd}`, fd);
}
