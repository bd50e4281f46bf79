import { SysError } from './error.ts';
import { declare, errno } from './libc.ts';

/** Operations of flock(2), from sys/file.h. */
const LOCK_EX = 2;
const LOCK_NB = 4;
const LOCK_UN = 8;
/** errno(3) on Linux. */
const EAGAIN = 11;

const cFlock = declare<[fd: number, operation: number]>('int flock(int fd, int operation)');

/**
 * flock(2) with LOCK_EX | LOCK_NB: takes the exclusive lock of the open file, without waiting. The lock lasts until
 * every copy of `fd` is closed, so it ends with the process however it ends.
 *
 * @returns false when somebody else holds it
 * @throws SysError for anything else
 */
export function flock(fd: number): boolean {
  if (cFlock(fd, LOCK_EX | LOCK_NB) === 0) return true;
  const error = errno();
  if (error === EAGAIN) return false;
  throw new SysError(error, 'flock', `fd ${fd}`);
}

/** flock(2) with LOCK_UN. @throws SysError */
export function funlock(fd: number): void {
  if (cFlock(fd, LOCK_UN) !== 0) throw new SysError(errno(), 'flock', `fd ${fd}`);
}
