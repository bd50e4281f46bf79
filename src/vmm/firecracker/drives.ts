/*
 * Firecracker's drives. A VM has all of them from its start: one per slot, with a placeholder behind it, since drives
 * cannot be added later (but for a developer preview of 1.16).
 */
import { stat } from 'node:fs/promises';
import { isReadOnly } from '../drive-slots.ts';
import { readOnlySlots, type SlotName, type VmShape, writableSlots } from '../vmm.ts';
import type { FirecrackerRequests } from './api.ts';
import type { Place } from './place.ts';
import { type RateLimits, rateLimiter } from './rate-limiter.ts';

type Drive = FirecrackerRequests['PUT /drives'];

/** What a guest sees of an empty slot, in bytes. The file is sparse: it takes no space. */
export const emptySlotBytes = 2 ** 40;

/** What virtio has for a disk's serial, in bytes (VIRTIO_BLK_ID_BYTES). */
const serialBytes = 20;

/**
 * The serial by which a guest knows the disk of a file, which is Firecracker's choice: v1.16
 * src/vmm/src/devices/virtio/block/virtio/device.rs, build_device_id. It is another one when another file is put behind.
 * A mount of the file has the same, and of a device each node has one of its own.
 */
export async function serialOf(file: string): Promise<string> {
  const { dev, rdev, ino } = await stat(file, { bigint: true });
  return `${dev}${rdev}${ino}`.slice(0, serialBytes);
}

/**
 * How many devices a VM can have at the most, on x86 without PCI: one per interrupt (v1.16
 * tests/integration_tests/functional/test_max_devices.py).
 */
const maxDevices = 17;

/** The guest image, vsock, entropy, balloon, and memory that is added. */
const otherDevices = 5;

/** One per container, for its own changes; the rest is for images. */
const writableCount = 4;

/** The drive slots of a VM with so many network cards. */
export function slotsBeside(networkCards: number): readonly SlotName[] {
  const readOnlyCount = maxDevices - otherDevices - writableCount - networkCards;
  return [...readOnlySlots.slice(0, readOnlyCount), ...writableSlots.slice(0, writableCount)];
}

/** The guest image's, first so that the guest finds it as /dev/vda, and one per slot. */
export function driveNames(networkCards: number): readonly (SlotName | 'guest')[] {
  return ['guest', ...slotsBeside(networkCards)];
}

/** Each drive's file, by its path for Firecracker. */
export type DrivePaths = ReadonlyMap<SlotName | 'guest', string>;

/** Shows the guest image, and makes an empty file per slot. */
export async function makeDriveFiles({ guestImage, networkCards }: VmShape, place: Place): Promise<DrivePaths> {
  const paths = new Map<SlotName | 'guest', string>([['guest', await place.show('guest', guestImage)]]);
  for (const slot of slotsBeside(networkCards)) {
    paths.set(slot, place.makeEmpty(slot, { bytes: emptySlotBytes, readOnly: isReadOnly(slot) }));
  }
  return paths;
}

/** @param limits of each slot's drive */
export function drivesAt(paths: DrivePaths, limits: RateLimits): Drive[] {
  const limiter = rateLimiter(limits);
  const limited = limiter === undefined ? {} : { rate_limiter: limiter };
  return [...paths].map(([name, file]) =>
    name === 'guest' ? drive(name, file, true) : { ...drive(name, file, isReadOnly(name)), ...limited },
  );
}

function drive(id: string, file: string, readOnly: boolean): Drive {
  return {
    ...{ drive_id: id, path_on_host: file, is_root_device: false, is_read_only: readOnly },
    // What the guest flushes is on the host's disk, as with a container of runc.
    cache_type: readOnly ? 'Unsafe' : 'Writeback',
  };
}
