import { z } from 'zod';
import { identityRecord } from '../../host/process-identity.ts';
import { nics, parseVmRecord, usedSlots } from '../record.ts';
import type { VmRecord } from '../vmm.ts';

const channel = z.union([
  z.object({ kind: z.literal('hybrid-vsock') }),
  z.object({ kind: z.literal('virtio-serial') }),
  z.object({
    kind: z.literal('kernel-vsock'),
    cid: z.int().positive(),
    port: z.int().positive(),
    filesPort: z.int().positive().optional(),
  }),
]);

const qemuRecord = z.object({
  version: z.literal(1),
  qemu: identityRecord,
  backend: identityRecord.optional(),
  channel,
  usedSlots,
  nics,
});

export type ChannelRecord = z.infer<typeof channel>;
export type QemuRecord = z.infer<typeof qemuRecord>;

/** @throws KilnError invalid-argument */
export function parseQemuRecord(record: VmRecord): QemuRecord {
  return parseVmRecord(qemuRecord, 'a QEMU VM', record);
}
