import { constants } from 'node:os';
import { SysError } from './error.ts';
import { declare, errno } from './libc.ts';

/** lseek(2), from linux/fs.h. */
const SEEK_DATA = 3;
const SEEK_HOLE = 4;

const cLseek = declare<[fd: number, offset: number, whence: number]>(
  'int64_t lseek64(int fd, int64_t offset, int whence)',
);

/** A piece of a file that is no hole. */
export interface Extent {
  readonly start: number;
  /** Behind its last byte. */
  readonly end: number;
}

/**
 * The next piece of a sparse file that has data, at or behind `from`; undefined when there is only a hole left. A
 * filesystem that knows no holes has one piece.
 *
 * @throws SysError
 */
export function nextExtent(fd: number, from: number): Extent | undefined {
  const start = cLseek(fd, from, SEEK_DATA);
  if (start === -1) {
    const error = errno();
    if (error === constants.errno.ENXIO) return undefined;
    throw new SysError(error, 'lseek', `fd ${fd}`);
  }
  const end = cLseek(fd, start, SEEK_HOLE);
  if (end === -1) throw new SysError(errno(), 'lseek', `fd ${fd}`);
  return { start, end };
}
