import { check, declare } from './libc.ts';

const cLsetxattr = declare<[path: string, name: string, value: Uint8Array, size: bigint, flags: number]>(
  'int lsetxattr(const char *path, const char *name, const void *value, size_t size, int flags)',
);

/** setxattr(2): gives a file, or a symbolic link itself, an extended attribute. @throws SysError EOPNOTSUPP, EPERM, ENOSPC */
export function lsetxattr(path: string, name: string, value: Uint8Array): void {
  check(cLsetxattr(path, name, value, BigInt(value.length), 0), 'lsetxattr', path);
}
