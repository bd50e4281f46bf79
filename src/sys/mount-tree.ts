/**
 * Mounts as file descriptors, Linux 5.12: a mount is copied (open_tree(2)), changed while nobody sees it
 * (mount_setattr(2)) and then put in its place (move_mount(2)). Alone in this way a mount can show the files of one owner
 * as those of another, without a change to the files.
 */
import { SysError } from './error.ts';
import { declare, errno } from './libc.ts';

/** Numbers of system calls, the same on every architecture (include/uapi/asm-generic/unistd.h). */
const SYS_open_tree = 428;
const SYS_move_mount = 429;
const SYS_mount_setattr = 442;

/** fcntl.h and linux/mount.h. */
const AT_FDCWD = -100;
const AT_EMPTY_PATH = 0x1000;
const OPEN_TREE_CLONE = 1;
const OPEN_TREE_CLOEXEC = 0o2000000;
const MOVE_MOUNT_F_EMPTY_PATH = 4;

export const MOUNT_ATTR_RDONLY = 0x1;
export const MOUNT_ATTR_NOSUID = 0x2;
export const MOUNT_ATTR_NODEV = 0x4;
export const MOUNT_ATTR_NOEXEC = 0x8;
export const MOUNT_ATTR_IDMAP = 0x100000;

/** struct mount_attr: four 64-bit fields, these at the given byte offsets. */
const MOUNT_ATTR_SIZE = 32;
const ATTR_SET = 0;
const USERNS_FD = 24;

const cOpenTree = declare<[number: number, dirfd: number, path: string, flags: number]>(
  'long syscall(long number, int dirfd, const char *path, unsigned int flags)',
);
const cMountSetattr = declare<
  [number: number, dirfd: number, path: string, flags: number, attr: Uint8Array, size: number]
>('long syscall(long number, int dirfd, const char *path, unsigned int flags, const void *attr, unsigned long size)');
const cMoveMount = declare<
  [number: number, fromDirfd: number, from: string, toDirfd: number, to: string, flags: number]
>(
  'long syscall(long number, int from_dirfd, const char *from_path, int to_dirfd, const char *to_path, unsigned int flags)',
);

/** open_tree(2) with OPEN_TREE_CLONE: a detached copy of the mount at `path`; it goes with its descriptor. @throws SysError */
export function openTreeClone(path: string): number {
  const fd = cOpenTree(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
  if (fd === -1) throw new SysError(errno(), 'open_tree', path);
  return fd;
}

/**
 * mount_setattr(2) on the mount of a descriptor.
 *
 * @param userns the user namespace of MOUNT_ATTR_IDMAP: an owner in the file system is shown as what the namespace's map
 *   makes of it, and every other as nobody
 * @throws SysError EINVAL where the file system cannot do that, ENOSYS before Linux 5.12
 */
export function mountSetattr(fd: number, attributes: number, userns?: number): void {
  const attr = new Uint8Array(MOUNT_ATTR_SIZE);
  const fields = new DataView(attr.buffer);
  fields.setBigUint64(ATTR_SET, BigInt(attributes), true);
  fields.setBigUint64(USERNS_FD, BigInt(userns ?? 0), true);
  const result = cMountSetattr(SYS_mount_setattr, fd, '', AT_EMPTY_PATH, attr, MOUNT_ATTR_SIZE);
  if (result === -1) throw new SysError(errno(), 'mount_setattr');
}

/** move_mount(2): puts the detached mount of a descriptor at `target`. @throws SysError */
export function moveMount(fd: number, target: string): void {
  const result = cMoveMount(SYS_move_mount, fd, '', AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH);
  if (result === -1) throw new SysError(errno(), 'move_mount', target);
}
