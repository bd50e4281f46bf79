/** A container's block devices: each is put behind a drive slot of its virtual machine. See docs/volumes.md. */
import type { HostBlockDevice } from '../host/block-devices.ts';
import type { DeviceNumber, FilesystemMount } from '../oci/block-devices.ts';
import type { RootfsMount } from '../rootfs/index.ts';
import type { AttachedDisk } from './disk-slots.ts';
import type { Tenancy } from './tenancy.ts';

export interface ContainerDevices {
  readonly devices: readonly HostBlockDevice[];
  readonly filesystems: readonly FilesystemMount[];
}

export interface AttachedDevices {
  /** Serials, in the order of the devices. */
  readonly disks: readonly string[];
  /** The guest's, in the same order. */
  readonly numbers: readonly DeviceNumber[];
  readonly mounts: readonly (Omit<RootfsMount, 'type'> & { readonly type: string })[];
}

/**
 * Attaches them, and has the guest look at them.
 *
 * @throws KilnError what `Sandbox.attachDisk` and `Guest.findDisks` throw
 */
export async function attachDevices(
  tenancy: Tenancy,
  { devices, filesystems }: ContainerDevices,
  signal: AbortSignal,
): Promise<AttachedDevices> {
  if (devices.length === 0) return { disks: [], numbers: [], mounts: [] };
  const attached: AttachedDisk[] = [];
  for (const { file, readOnly } of devices) {
    attached.push(await tenancy.attachDisk({ file, readOnly, device: true }, signal));
  }
  const disks = attached.map(({ serial }) => serial);
  const wanted = devices.map(({ bytes }, index) => ({ serial: disks[index] ?? '', bytes }));
  const numbers = await tenancy.sandbox.guest.findDisks(wanted, signal);
  const mounts = filesystems.map(({ device, target, type, options }) => {
    return { source: { disk: disks[device] ?? '' }, target, type, options, directories: [] };
  });
  return { disks, numbers, mounts };
}
