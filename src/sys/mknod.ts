import { check, declare } from './libc.ts';

const cMknod = declare<[path: string, mode: number, device: bigint]>(
  'int mknod(const char *pathname, unsigned int mode, uint64_t dev)',
);

/** stat(2): the type in a file's mode. */
const S_IFBLK = 0o060000;

/**
 * mknod(2): makes a node of a block device; the umask takes from its mode.
 *
 * @param device as st_rdev of another node of it
 * @throws SysError EEXIST, ENOENT, EPERM
 */
export function mknodBlock(path: string, mode: number, device: bigint): void {
  check(cMknod(path, S_IFBLK | mode, device), 'mknod', path);
}
