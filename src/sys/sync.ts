import { declare } from './libc.ts';

const cSyncfs = declare<[fd: number]>('int syncfs(int fd)');

/**
 * syncfs(2): writes the changes of the filesystem that `fd` is on to its disk; done on a thread of the pool.
 *
 * @throws SysError
 */
export async function syncfs(fd: number): Promise<void> {
  await cSyncfs.promise('syncfs', `fd ${fd}`, fd);
}
