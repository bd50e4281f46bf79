import path from 'node:path';
import type { KilnConfig } from '../config/config.ts';
import type { KilnPaths } from '../config/paths.ts';

/** Where the parts of this installation lie, relative to the bundle `dist/lib/kilnd.mjs`. */
const dist = path.resolve(import.meta.dirname, '..');

export const defaultGuestDir = path.join(dist, 'guest');
export const standInProgram = path.join(dist, 'libexec', 'kiln-standin');
export const volumesProgram = path.join(dist, 'libexec', 'kiln-volumes');
export const vsockBackendProgram = path.join(dist, 'libexec', 'vhost-device-vsock');
export const qemuIdlePlugin = path.join(dist, 'libexec', 'kiln-qemu-idle.so');

/** The files a VM boots from. */
export interface GuestFiles {
  readonly kernel: string;
  /** Undefined for a kernel that needs none. */
  readonly initrd: string | undefined;
  readonly guestImage: string;
}

/** Resolves `vm.kernel` and `vm.initrd`: the two kernels that Kiln builds have names, any other has a path. */
export function guestFiles(config: KilnConfig, paths: KilnPaths): GuestFiles {
  const { kernel, initrd } = config.vm;
  const guestImage = path.join(paths.guestDir, 'guest.erofs');
  switch (kernel) {
    case 'default':
      return {
        kernel: path.join(paths.guestDir, 'vmlinux'),
        initrd: initrd ?? path.join(paths.guestDir, 'initrd'),
        guestImage,
      };
    case 'minimal':
      return { kernel: path.join(paths.guestDir, 'vmlinux-minimal'), initrd, guestImage };
    default:
      return { kernel, initrd, guestImage };
  }
}
