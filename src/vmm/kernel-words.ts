import type { VmShape } from './vmm.ts';

/**
 * The words of the kernel's command line that every VMM's guest gets. `panic=-1` reboots at once on a panic.
 *
 * @param reboot how the kernel reboots, which ends the VM: "t" (triple fault) or "k" (keyboard controller)
 */
export function commonKernelWords({ initrd }: VmShape, reboot: 'k' | 't'): string[] {
  const words = ['console=ttyS0', 'quiet', 'panic=-1', `reboot=${reboot}`, 'random.trust_cpu=on', 'cryptomgr.notests'];
  // Without an initrd the kernel mounts the guest image itself: it is the first disk that it finds.
  const root = ['root=/dev/vda', 'rootfstype=erofs', 'ro', 'init=/sbin/kiln-init'];
  return initrd === undefined ? [...words, ...root] : words;
}
