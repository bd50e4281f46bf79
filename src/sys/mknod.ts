import { check, declare } from './libc.ts';

const cMknod = declare<[path: string, mode: number, device: bigint]>(
  'int mknod(const char *pathname, unsigned int mode, uint64_t dev)',
);

/** stat(2): the type in a file's mode. */
export const S_IFBLK = 0o060000;

/**
 * mknod(2): makes a node of a block device; the umask takes from its mode.
 *
 * @param device as st_rdev of another node of it
 * @throws SysError EEXIST, ENOENT, EPERM
 */
export function mknodBlock(path: string, mode: number, device: bigint): void {
  check(cMknod(path, S_IFBLK | mode, device), 'mknod', path);
}

/** stat(2): the types of what `makeNode` can make. */
export const S_IFIFO = 0o010000;
export const S_IFCHR = 0o020000;

const cMknodBytes = declare<[path: Buffer, mode: number, device: bigint]>(
  'int mknod(const uint8_t *pathname, unsigned int mode, uint64_t dev)',
);

/**
 * mknod(2) of a path in bytes; the umask takes from its mode. The character device 0 is overlayfs's whiteout.
 *
 * @throws SysError EEXIST, ENOENT, EPERM
 */
export function makeNode(path: Buffer, mode: number, device = 0n): void {
  check(cMknodBytes(Buffer.concat([path, Buffer.of(0)]), mode, device), 'mknod', path.toString());
}
