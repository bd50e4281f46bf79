/*
 * Firecracker's drives. A VM has all of them from its start: one per slot, with a placeholder behind it, since drives
 * cannot be added later (but for a developer preview of 1.16).
 */
import { stat } from 'node:fs/promises';
import { readOnlySlots, type SlotName, writableSlots } from '../vmm.ts';
import type { FirecrackerRequests, RateLimiter, TokenBucket } from './api.ts';
import type { Place } from './place.ts';

type Drive = FirecrackerRequests['PUT /drives'];

/** What a guest sees of an empty slot, in bytes. The file is sparse: it takes no space. */
export const emptySlotBytes = 2 ** 40;

/** What virtio has for a disk's serial, in bytes (VIRTIO_BLK_ID_BYTES). */
const serialBytes = 20;

/**
 * The serial by which a guest knows the disk of a file, which is Firecracker's choice: v1.16
 * src/vmm/src/devices/virtio/block/virtio/device.rs, build_device_id. It is another one when another file is put behind.
 * A mount of the file has the same.
 */
export async function serialOf(file: string): Promise<string> {
  const { dev, rdev, ino } = await stat(file, { bigint: true });
  return `${dev}${rdev}${ino}`.slice(0, serialBytes);
}

export function isReadOnly(slot: SlotName): boolean {
  return readOnlySlots.includes(slot);
}

/** What each of a container's disks may do in a second; 0 is no limit. */
export interface DiskLimits {
  readonly bytesPerS: number;
  readonly opsPerS: number;
}

/** The guest image, first so that the guest finds it as /dev/vda, and an empty file per slot, which is made. */
export async function makeDrives(guestImage: string, place: Place, limits: DiskLimits): Promise<Drive[]> {
  const slots = [...readOnlySlots, ...writableSlots].map((slot) => {
    const readOnly = isReadOnly(slot);
    const file = place.makeEmpty(slot, { bytes: emptySlotBytes, readOnly });
    return { ...drive(slot, file, readOnly), ...limiterOf(limits) };
  });
  return [drive('guest', await place.show('guest', guestImage), true), ...slots];
}

/** Firecracker looks at a limiter each 100 ms, so a second's worth at once is as fine as need be. */
function limiterOf({ bytesPerS, opsPerS }: DiskLimits): { readonly rate_limiter?: RateLimiter } {
  const bucket = (size: number): TokenBucket => ({ size, refill_time: 1000 });
  const limiter = {
    ...(bytesPerS === 0 ? {} : { bandwidth: bucket(bytesPerS) }),
    ...(opsPerS === 0 ? {} : { ops: bucket(opsPerS) }),
  };
  return Object.keys(limiter).length === 0 ? {} : { rate_limiter: limiter };
}

function drive(id: string, file: string, readOnly: boolean): Drive {
  return {
    ...{ drive_id: id, path_on_host: file, is_root_device: false, is_read_only: readOnly },
    // What the guest flushes is on the host's disk, as with a container of runc.
    cache_type: readOnly ? 'Unsafe' : 'Writeback',
  };
}
