import { constants } from 'node:os';
import { SysError } from './error.ts';
import { check, declare, errno } from './libc.ts';
import { cPath } from './openat2.ts';

/** XATTR_LIST_MAX and XATTR_SIZE_MAX, linux/limits.h. */
const maxBytes = 65_536;

const cList = declare<[path: Buffer, list: Buffer, size: number]>(
  'int64_t llistxattr(const uint8_t *path, uint8_t *list, size_t size)',
);
const cGet = declare<[path: Buffer, name: string, value: Buffer, size: number]>(
  'int64_t lgetxattr(const uint8_t *path, const char *name, uint8_t *value, size_t size)',
);
const cSet = declare<[path: Buffer, name: string, value: Buffer, size: number, flags: number]>(
  'int lsetxattr(const uint8_t *path, const char *name, const uint8_t *value, size_t size, int flags)',
);

const room = Buffer.alloc(maxBytes);

/** llistxattr(2): the names of a file's extended attributes; of a symbolic link its own. None where there can be none. */
export function llistxattr(path: Buffer): string[] {
  const length = cList(cPath(path), room, maxBytes);
  if (length === -1) {
    if (errno() === constants.errno.ENOTSUP) return [];
    throw new SysError(errno(), 'llistxattr', path.toString());
  }
  return room.toString('utf8', 0, length).split('\0').filter(Boolean);
}

/** lgetxattr(2); undefined when there is none of that name. @throws SysError */
export function lgetxattr(path: Buffer, name: string): Buffer | undefined {
  const length = cGet(cPath(path), name, room, maxBytes);
  if (length === -1) {
    if (errno() === constants.errno.ENODATA || errno() === constants.errno.ENOTSUP) return undefined;
    throw new SysError(errno(), 'lgetxattr', path.toString());
  }
  return Buffer.from(room.subarray(0, length));
}

/** lsetxattr(2): gives a file, or a symbolic link itself, an extended attribute. @throws SysError EOPNOTSUPP, EPERM, ENOSPC */
export function lsetxattr(path: string | Buffer, name: string, value: Uint8Array): void {
  // An empty buffer may have no address at all.
  const bytes = value.length === 0 ? Buffer.alloc(1) : Buffer.from(value);
  check(cSet(cPath(path), name, bytes, value.length, 0), 'lsetxattr', path.toString());
}
