import { constants } from 'node:fs';
import { check, declare } from './libc.ts';

/** Flags that node:fs does not name. fcntl-linux.h; O_PATH: the file's place only, which needs no permission and opens no device. */
export const O_PATH = 0o10000000;
export const O_CLOEXEC = 0o2000000;

/** openat2(2), linux/openat2.h. */
export const RESOLVE_NO_MAGICLINKS = 0x02;
/** No symbolic link on the way, nor at its end. */
export const RESOLVE_NO_SYMLINKS = 0x04;
/** The way must not leave the directory. */
export const RESOLVE_BENEATH = 0x08;
/** The directory is "/" of the way, as after chroot(2). */
export const RESOLVE_IN_ROOT = 0x10;

/** asm/unistd.h: the same on each architecture. */
const SYS_openat2 = 437;
/** sizeof(struct open_how), its first version. */
const HOW_BYTES = 24;

const cSyscall = declare<[number: number, dirfd: number, path: Buffer, how: Buffer, size: number]>(
  'int64_t syscall(int64_t number, int dirfd, const uint8_t *path, const uint8_t *how, size_t size)',
);

/** A path in bytes, as C wants it: a file's name need not be UTF-8. */
export function cPath(path: string | Buffer): Buffer {
  return Buffer.concat([typeof path === 'string' ? Buffer.from(path) : path, Buffer.of(0)]);
}

/**
 * openat2(2): opens what a path below a directory names, by rules for the way there that hold while others change it.
 *
 * @param path in bytes, without a NUL; "." for the directory itself
 * @param resolve RESOLVE_*
 * @returns a descriptor, which is the caller's to close
 * @throws SysError ENOENT, ENOTDIR; ELOOP for a link that RESOLVE_NO_SYMLINKS forbids, EXDEV for a way out
 */
export function openat2(dirfd: number, path: Buffer, flags: number, resolve: number): number {
  const how = Buffer.alloc(HOW_BYTES);
  how.writeBigUInt64LE(BigInt(flags | O_CLOEXEC), 0);
  how.writeBigUInt64LE(BigInt(resolve), 16);
  return check(cSyscall(SYS_openat2, dirfd, cPath(path), how, HOW_BYTES), 'openat2', path.toString());
}

/** The place of a directory below another one, without following any link. @throws SysError */
export function openDirectoryBeneath(dirfd: number, path: Buffer): number {
  return openat2(dirfd, path, constants.O_DIRECTORY | constants.O_RDONLY, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS);
}
