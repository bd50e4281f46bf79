/**
 * Pseudo-terminals, pty(7): a program has the slave as its terminal; what it writes is read from the master, and what is
 * written to the master is its input. When the last slave is closed, reading the master fails with EIO, which is how the
 * end of the output looks.
 */
import { Socket } from 'node:net';
import { check, declare } from './libc.ts';
import type { ReadInto } from './pipe.ts';

/** ioctl_tty(2), asm-generic/ioctls.h. */
const TIOCSWINSZ = 0x5414;
/** fcntl(2), linux/fcntl.h. */
const F_DUPFD_CLOEXEC = 1030;

const cIoctl = declare<[fd: number, op: number, argument: Uint16Array]>(
  'int ioctl(int fd, unsigned long op, uint16_t *argument)',
);
const cFcntl = declare<[fd: number, op: number, argument: number]>('int fcntl(int fd, int op, int argument)');

/** ioctl_tty(2), TIOCSWINSZ: sizes in characters; the foreground programs get SIGWINCH if it changed. @throws SysError */
export function setWindowSize(fd: number, width: number, height: number): void {
  // struct winsize: rows, columns, and the same in pixels, which nobody uses.
  check(cIoctl(fd, TIOCSWINSZ, Uint16Array.of(height, width, 0, 0)), 'ioctl', 'TIOCSWINSZ');
}

/** fcntl(2), F_DUPFD_CLOEXEC: another descriptor of the same open file. @throws SysError */
export function duplicate(fd: number): number {
  return check(cFcntl(fd, F_DUPFD_CLOEXEC, 0), 'fcntl', 'F_DUPFD_CLOEXEC');
}

interface PipeWrap {
  readonly Pipe: new (kind: number) => { open(fd: number): number };
  readonly constants: { readonly SOCKET: number };
}

/**
 * A character device that epoll takes, such as the master of a pseudo-terminal, as a stream; takes the descriptor over,
 * which must not block. Node would make a file or a tty.WriteStream of it, which block; libuv's pipe handle does not.
 *
 * @param into as in `socketFromFd`
 */
export function socketFromDevice(fd: number, direction: 'read' | 'write' | 'both', into?: ReadInto): Socket {
  const binding = (process as unknown as { binding(name: 'pipe_wrap'): PipeWrap }).binding('pipe_wrap');
  const handle = new binding.Pipe(binding.constants.SOCKET);
  const status = handle.open(fd);
  if (status !== 0) throw new Error(`cannot open the device as a stream: libuv's error ${status}`);
  const options = {
    handle,
    readable: direction !== 'write',
    writable: direction !== 'read',
    ...(into === undefined ? {} : { onread: into }),
  };
  // `handle` is net.Socket's own option, which the types leave out (vsock.ts uses it, too).
  return new Socket(options as unknown as ConstructorParameters<typeof Socket>[0]);
}
