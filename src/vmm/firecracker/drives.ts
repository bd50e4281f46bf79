/*
 * Firecracker's drives. A VM has all of them from its start: one per slot, with a placeholder behind it, since drives
 * cannot be added later (but for a developer preview of 1.16).
 */
import { closeSync, ftruncateSync, mkdirSync, openSync } from 'node:fs';
import { stat } from 'node:fs/promises';
import path from 'node:path';
import { readOnlySlots, type SlotName, writableSlots } from '../vmm.ts';
import type { FirecrackerRequests } from './api.ts';

type Drive = FirecrackerRequests['PUT /drives'];

/** What a guest sees of an empty slot. The file is sparse: it takes no space. */
const emptySlotBytes = 2 ** 40;

/** What virtio has for a disk's serial, in bytes (VIRTIO_BLK_ID_BYTES). */
const serialBytes = 20;

/**
 * The serial by which a guest knows the disk of a file, which is Firecracker's choice: v1.16
 * src/vmm/src/devices/virtio/block/virtio/device.rs, build_device_id. It is another one when another file is put behind.
 */
export async function serialOf(file: string): Promise<string> {
  const { dev, rdev, ino } = await stat(file, { bigint: true });
  return `${dev}${rdev}${ino}`.slice(0, serialBytes);
}

/** The guest image, first so that the guest finds it as /dev/vda, and an empty file per slot in a folder that is made. */
export function makeDrives(guestImage: string, folder: string): Drive[] {
  mkdirSync(folder, { mode: 0o700 });
  const slot = (readOnly: boolean) => (name: SlotName) => drive(name, emptyFile(path.join(folder, name)), readOnly);
  return [drive('guest', guestImage, true), ...readOnlySlots.map(slot(true)), ...writableSlots.map(slot(false))];
}

function drive(id: string, file: string, readOnly: boolean): Drive {
  return {
    ...{ drive_id: id, path_on_host: file, is_root_device: false, is_read_only: readOnly },
    // What the guest flushes is on the host's disk, as with a container of runc.
    cache_type: readOnly ? 'Unsafe' : 'Writeback',
  };
}

function emptyFile(file: string): string {
  const fd = openSync(file, 'wx', 0o600);
  try {
    ftruncateSync(fd, emptySlotBytes);
  } finally {
    closeSync(fd);
  }
  return file;
}
