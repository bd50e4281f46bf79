import { Socket } from 'node:net';
import { SysError } from './error.ts';
import { check, declare } from './libc.ts';

/** Flag of open(2) on Linux. */
const O_CLOEXEC = 0o2000000;

const cPipe2 = declare<[pipefd: Int32Array, flags: number]>('int pipe2(int *pipefd, int flags)');

/** Both ends of a pipe. */
export interface Pipe {
  readonly read: number;
  readonly write: number;
}

/**
 * pipe2(2) with O_CLOEXEC. A real pipe, not the socket pair that Node's child_process makes: only a pipe can be opened
 * again through /dev/stdout.
 *
 * @returns two blocking file descriptors; the caller closes them
 * @throws SysError
 */
export function pipe2(): Pipe {
  const fds = new Int32Array(2);
  check(cPipe2(fds, O_CLOEXEC), 'pipe2');
  const [read = -1, write = -1] = fds;
  return { read, write };
}

/** Reading without a new buffer for every chunk; net.Socket's `onread`. */
export interface ReadInto {
  /** Where to read the first chunk to, and after each call of `callback` the next one. */
  readonly buffer: () => Uint8Array;
  /** The first `length` bytes have been read. False pauses the stream, until `resume`. */
  readonly callback: (length: number) => boolean;
}

/** ioctl_list(2): FIONREAD. */
const FIONREAD = 0x541b;

const cIoctl = declare<[fd: number, op: number, argument: Int32Array]>(
  'int ioctl(int fd, unsigned long op, int *argument)',
);

/** fcntl(2), Linux's <fcntl.h>. */
const F_SETPIPE_SZ = 1031;

const cFcntl = declare<[fd: number, op: number, argument: number]>('int fcntl(int fd, int op, int argument)');

/**
 * Makes a pipe hold so many bytes, or more. fcntl(2), F_SETPIPE_SZ.
 *
 * @returns false where the system allows this user no more (/proc/sys/fs/pipe-max-size, pipe-user-pages-soft)
 * @throws SysError
 */
export function growPipe(fd: number, bytes: number): boolean {
  try {
    check(cFcntl(fd, F_SETPIPE_SZ, bytes), 'fcntl', 'F_SETPIPE_SZ');
    return true;
  } catch (error) {
    if (error instanceof SysError && error.code === 'EPERM') return false;
    throw error;
  }
}

/** How many bytes can be read from a pipe now. pipe(7), FIONREAD. @throws SysError */
export function bytesInPipe(fd: number): number {
  const count = new Int32Array(1);
  check(cIoctl(fd, FIONREAD, count), 'ioctl', 'FIONREAD');
  return count[0] ?? 0;
}

/**
 * One end of a pipe or FIFO as a stream that waits in epoll, not in a thread as `fs.ReadStream` does. Takes the
 * descriptor over: destroying the stream closes it. The open file becomes non-blocking.
 *
 * Errors of the descriptor are thrown here (Node recognises the kind of file: a regular file is refused).
 *
 * @param into read into its buffers, and emit no 'data'
 */
export function socketFromFd(fd: number, direction: 'read' | 'write' | 'both', into?: ReadInto): Socket {
  return new Socket({
    fd,
    readable: direction !== 'write',
    writable: direction !== 'read',
    allowHalfOpen: direction === 'both',
    ...(into === undefined ? {} : { onread: into }),
  });
}
