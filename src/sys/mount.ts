import { check, declare } from './libc.ts';

/** Flags of mount(2), from linux/mount.h. */
export const MS_RDONLY = 1;
export const MS_NOSUID = 2;
export const MS_NODEV = 4;
export const MS_NOEXEC = 8;
export const MS_SYNCHRONOUS = 16;
export const MS_REMOUNT = 32;
export const MS_DIRSYNC = 128;
export const MS_NOATIME = 1024;
export const MS_NODIRATIME = 2048;
export const MS_BIND = 4096;
export const MS_REC = 16384;
export const MS_PRIVATE = 1 << 18;
export const MS_SHARED = 1 << 20;
export const MS_RELATIME = 1 << 21;
export const MS_STRICTATIME = 1 << 24;

/** Flags of umount2(2), from sys/mount.h. */
export const MNT_DETACH = 2;
export const UMOUNT_NOFOLLOW = 8;

type MountArguments = [
  source: string | null,
  target: string,
  filesystemtype: string | null,
  mountflags: number,
  data: string | null,
];

const cMount = declare<MountArguments>(
  'int mount(const char *source, const char *target, const char *filesystemtype, unsigned long mountflags, const char *data)',
);
const cUmount2 = declare<[target: string, flags: number]>('int umount2(const char *target, int flags)');

/**
 * mount(2).
 *
 * @throws SysError its path is `target`
 */
export function mount(...args: MountArguments): void {
  check(cMount(...args), 'mount', args[1]);
}

/**
 * umount2(2), on this thread.
 *
 * @throws SysError
 */
export function umount2(target: string, flags: number): void {
  check(cUmount2(target, flags), 'umount2', target);
}

/** umount2(2) on a thread of the pool: the last unmount of a disk writes back everything that is still in memory. */
export async function umount2Async(target: string, flags: number): Promise<void> {
  await cUmount2.promise('umount2', target, target, flags);
}

/** mount(2) on a thread of the pool: for a remount that has to write back. @throws SysError */
export async function mountAsync(...args: MountArguments): Promise<void> {
  await cMount.promise('mount', args[1], ...args);
}
