/** Locks as another process of the host has them: an open file of its own counts as one. flock(2), fcntl(2). */
import { closeSync, openSync } from 'node:fs';
import { SysError } from '../../src/sys/error.ts';
import { check, declare } from '../../src/sys/libc.ts';

/** sys/file.h, fcntl.h and struct flock of 64-bit Linux. */
const LOCK_EX_NB = 2 | 4;
const F_OFD_SETLK = 37;
const F_WRLCK = 1;
const FLOCK_SIZE = 32;

const cFlock = declare<[fd: number, operation: number]>('int flock(int fd, int operation)');
const cFcntl = declare<[fd: number, op: number, lock: Uint8Array]>('int fcntl(int fd, int op, uint8_t *lock)');

export interface Range {
  readonly start: number;
  /** 0: to the end, wherever that is. */
  readonly length: number;
}

/** Takes a lock for writing, of the whole file by flock(2) or of a range by fcntl(2); undefined when it is not to be had. */
export function lockFile(file: string, how: 'flock' | Range): Disposable | undefined {
  const fd = openSync(file, 'r+');
  try {
    if (how === 'flock') check(cFlock(fd, LOCK_EX_NB), 'flock', file);
    else check(cFcntl(fd, F_OFD_SETLK, flockOf(how)), 'fcntl', file);
    return { [Symbol.dispose]: () => closeSync(fd) };
  } catch (error) {
    closeSync(fd);
    if (error instanceof SysError && error.code === 'EAGAIN') return undefined;
    throw error;
  }
}

/** Whether another process could have it now. */
export function isLocked(file: string, how: 'flock' | Range): boolean {
  using lock = lockFile(file, how);
  return lock === undefined;
}

/** struct flock: type (2 bytes), whence (2), 4 of padding, start (8), length (8), pid. */
function flockOf({ start, length }: Range): Uint8Array {
  const bytes = Buffer.alloc(FLOCK_SIZE);
  bytes.writeInt16LE(F_WRLCK, 0);
  bytes.writeBigInt64LE(BigInt(start), 8);
  bytes.writeBigInt64LE(BigInt(length), 16);
  return bytes;
}
