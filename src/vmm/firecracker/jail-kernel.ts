/** What a jail needs root for. Another set plays it, for tests without root. */
import { chmodSync, closeSync, lchownSync, readdirSync, statSync } from 'node:fs';
import { stat } from 'node:fs/promises';
import { KilnError } from '../../errors.ts';
import { withIdMapping } from '../../host/id-mapping.ts';
import { mkfifo } from '../../sys/fifo.ts';
import { mknodBlock } from '../../sys/mknod.ts';
import { MNT_DETACH, MS_PRIVATE, MS_SHARED, mount, UMOUNT_NOFOLLOW, umount2 } from '../../sys/mount.ts';
import {
  MOUNT_ATTR_IDMAP,
  MOUNT_ATTR_NODEV,
  MOUNT_ATTR_NOEXEC,
  MOUNT_ATTR_NOSUID,
  MOUNT_ATTR_RDONLY,
  mountSetattr,
  moveMount,
  openTreeClone,
} from '../../sys/mount-tree.ts';

export interface TmpfsOptions {
  readonly sizeBytes: number;
  /** Files, folders and nodes. */
  readonly inodes: number;
  /** Mounts that are made in it later appear in every copy of it, in other mount namespaces too. */
  readonly shared: boolean;
}

export interface FileMount {
  readonly readOnly: boolean;
  /** The user and group that may use the file; of the mount, never of the file. */
  readonly uid: number;
}

export interface JailKernel {
  mountTmpfs(target: string, options: TmpfsOptions): void;
  /** Mounts a file over another one so that a user can read it, or write it, too. The file itself is not changed. */
  mountFile(file: string, target: string, how: FileMount): Promise<void>;
  /** Unmounts with everything below it; nothing mounted there is no error. */
  unmount(target: string): void;
  /** Of a symbolic link, the link's. */
  chown(file: string, uid: number, gid: number): void;
  mkfifo(file: string, mode: number): void;
  /** Makes a node of a block device, by st_rdev of another one. The mode is set whatever the umask. */
  mknod(file: string, mode: number, device: bigint): void;
  /** The processes whose root directory it is. */
  processesIn(root: string): number[];
}

export const realKernel: JailKernel = {
  mountTmpfs(target, { sizeBytes, inodes, shared }) {
    mount('kiln-jail', target, 'tmpfs', 0, `size=${sizeBytes},nr_inodes=${inodes},mode=755`);
    mount(null, target, null, shared ? MS_SHARED : MS_PRIVATE, null);
  },

  async mountFile(file, target, how) {
    const { mode, uid, gid } = await stat(file);
    const attributes =
      MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | (how.readOnly ? MOUNT_ATTR_RDONLY : 0);
    const tree = openTreeClone(file);
    try {
      // Read by all the world already: then it may lie in any file system.
      if (how.readOnly && (mode & 0o004) !== 0) mountSetattr(tree, attributes);
      else {
        const mapping = { uid: { from: uid, to: how.uid }, gid: { from: gid, to: how.uid } };
        await withIdMapping(mapping, (userns) => showAs(tree, attributes, userns));
      }
      moveMount(tree, target);
    } finally {
      closeSync(tree);
    }
  },

  unmount(target) {
    try {
      umount2(target, MNT_DETACH | UMOUNT_NOFOLLOW);
    } catch (error) {
      // umount2(2): EINVAL is no mount point.
      if (!['EINVAL', 'ENOENT'].includes((error as NodeJS.ErrnoException).code ?? '')) throw error;
    }
  },

  chown: lchownSync,
  mkfifo,

  mknod(file, mode, device) {
    mknodBlock(file, mode, device);
    chmodSync(file, mode);
  },

  processesIn(root) {
    const { dev, ino } = statSync(root, { bigint: true });
    const isIn = (pid: string): boolean => {
      try {
        const its = statSync(`/proc/${pid}/root`, { bigint: true });
        return its.dev === dev && its.ino === ino;
      } catch {
        return false; // It has ended.
      }
    };
    const pids = readdirSync('/proc').filter((name) => /^\d+$/.test(name));
    return pids.filter(isIn).map(Number);
  },
};

function showAs(tree: number, attributes: number, userns: number): void {
  try {
    mountSetattr(tree, attributes | MOUNT_ATTR_IDMAP, userns);
  } catch (cause) {
    const message = `its file system cannot give the jailed Firecracker access to it: ${(cause as Error).message}`;
    throw new KilnError('failed-precondition', message, {
      hint: 'it has to lie on ext4, XFS, btrfs or tmpfs, with Linux 5.12 or newer (tmpfs: 6.3); or set vm.jail = "off"',
      cause,
    });
  }
}
