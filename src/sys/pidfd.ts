/**
 * Process file descriptors, pidfd_open(2): a handle on a process that is not our child, which names no other process when
 * its pid is used again, and which epoll(7) reports as readable when the process has ended.
 */
import { closeSync } from 'node:fs';
import koffi from 'koffi';
import { SysError } from './error.ts';
import { declare, errno } from './libc.ts';
import type { Exit } from './process.ts';

/** Numbers of system calls, the same on every architecture since Linux 5.1 (include/uapi/asm-generic/unistd.h). */
const SYS_pidfd_send_signal = 424;
const SYS_pidfd_open = 434;

/** errno(3) on Linux. */
const ESRCH = 3;

/** linux/pidfd.h of Linux 6.15: _IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info), and what of it is asked for. */
const PIDFD_GET_INFO = 0xc040_ff0b;
const PIDFD_INFO_EXIT = 8n;
/** struct pidfd_info: 64 bytes, its mask and the status of wait(2) at the given byte offsets. */
const PIDFD_INFO_SIZE = 64;
const EXIT_CODE = 60;

const cSyscall = declare<[number: number, first: number, second: number, third: null, fourth: number]>(
  'long syscall(long number, int first, int second, void *third, unsigned int fourth)',
);

const cIoctl = declare<[fd: number, op: number, argument: Uint8Array]>(
  'int ioctl(int fd, unsigned long op, void *argument)',
);

/** pidfd_open(2). @returns undefined when there is no such process. @throws SysError for anything else */
export function pidfdOpen(pid: number): number | undefined {
  const fd = cSyscall(SYS_pidfd_open, pid, 0, null, 0);
  if (fd !== -1) return fd;
  const error = errno();
  if (error === ESRCH) return undefined;
  throw new SysError(error, 'pidfd_open', `pid ${pid}`);
}

/**
 * How a process ended that need not be our child: the status of wait(2), once its parent has waited for it.
 *
 * @returns 'unreaped' while nobody has; undefined on a kernel that does not tell (before Linux 6.15)
 */
export function exitStatusOf(pidfd: number): Exit | 'unreaped' | undefined {
  const info = new Uint8Array(PIDFD_INFO_SIZE);
  const fields = new DataView(info.buffer);
  fields.setBigUint64(0, PIDFD_INFO_EXIT, true);
  if (cIoctl(pidfd, PIDFD_GET_INFO, info) === -1) return undefined;
  if ((fields.getBigUint64(0, true) & PIDFD_INFO_EXIT) === 0n) return 'unreaped';
  return exitOf(fields.getInt32(EXIT_CODE, true));
}

/** What a status of wait(2) says. */
export function exitOf(waitStatus: number): Exit {
  const signal = waitStatus & 0x7f;
  return signal === 0 ? { kind: 'exited', code: waitStatus >> 8 } : { kind: 'signaled', signal };
}

/** koffi's poll on a descriptor, in libuv's loop. It says more than this to its callback, which nobody needs here. */
interface Poll {
  close(): void;
}

/** A process that somebody else started. Disposing it lets go of it, without a word to the process. */
export class ProcessHandle implements Disposable {
  readonly #fd: number;
  readonly #ended = Promise.withResolvers<void>();
  #poll: Poll | undefined;

  private constructor(fd: number) {
    this.#fd = fd;
    this.#poll = koffi.node.poll(fd, { readable: true }, () => {
      this[Symbol.dispose]();
      // koffi calls without what Node does around a callback: promises would settle only when something else happens.
      setImmediate(this.#ended.resolve);
    });
  }

  /** @returns undefined when there is no such process. @throws SysError for anything else */
  static open(pid: number): ProcessHandle | undefined {
    const fd = pidfdOpen(pid);
    return fd === undefined ? undefined : new ProcessHandle(fd);
  }

  /** Resolves when the process has ended; never when the handle is disposed before. */
  get ended(): Promise<void> {
    return this.#ended.promise;
  }

  /** Sends a signal; a process that has ended is no error. @throws SysError */
  kill(signal: number): void {
    if (this.#poll === undefined || cSyscall(SYS_pidfd_send_signal, this.#fd, signal, null, 0) !== -1) return;
    const error = errno();
    if (error !== ESRCH) throw new SysError(error, 'pidfd_send_signal');
  }

  [Symbol.dispose](): void {
    if (this.#poll === undefined) return;
    this.#poll.close();
    this.#poll = undefined;
    closeSync(this.#fd);
  }
}
