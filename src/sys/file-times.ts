import { check, declare } from './libc.ts';
import { cPath } from './openat2.ts';

/** fcntl.h. */
const AT_FDCWD = -100;
const AT_SYMLINK_NOFOLLOW = 0x100;

const cUtimensat = declare<[dirfd: number, path: Buffer, times: Buffer, flags: number]>(
  'int utimensat(int dirfd, const uint8_t *path, const uint8_t *times, int flags)',
);

/**
 * utimensat(2): sets when a file was read and written last, to the nanosecond; of a symbolic link its own.
 *
 * @param ns since the epoch, for both
 * @throws SysError
 */
export function setFileTimes(path: Buffer, ns: bigint): void {
  const seconds = ns >= 0n ? ns / 1_000_000_000n : (ns - 999_999_999n) / 1_000_000_000n;
  const times = Buffer.alloc(32);
  for (const at of [0, 16]) {
    times.writeBigInt64LE(seconds, at);
    times.writeBigInt64LE(ns - seconds * 1_000_000_000n, at + 8);
  }
  check(cUtimensat(AT_FDCWD, cPath(path), times, AT_SYMLINK_NOFOLLOW), 'utimensat', path.toString());
}
