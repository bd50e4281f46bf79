import { z } from 'zod';
import { KilnError } from '../../errors.ts';
import { identityRecord } from '../../host/process-identity.ts';
import { readOnlySlots, type VmRecord, writableSlots } from '../vmm.ts';

/*
 * What is written down of a VM so that a later kilnd, which may be of another version, finds it again.
 */

const channel = z.union([
  z.object({ kind: z.literal('hybrid-vsock') }),
  z.object({ kind: z.literal('virtio-serial') }),
  z.object({ kind: z.literal('kernel-vsock'), cid: z.int().positive(), port: z.int().positive() }),
]);

const qemuRecord = z.object({
  version: z.literal(1),
  qemu: identityRecord,
  backend: identityRecord.optional(),
  channel,
  usedSlots: z.array(z.enum([...readOnlySlots, ...writableSlots])),
});

export type ChannelRecord = z.infer<typeof channel>;
export type QemuRecord = z.infer<typeof qemuRecord>;

/** @throws KilnError invalid-argument */
export function parseQemuRecord(record: VmRecord): QemuRecord {
  const result = qemuRecord.safeParse(record);
  if (result.success) return result.data;
  const [issue] = result.error.issues;
  throw new KilnError('invalid-argument', `not a record of a QEMU VM: ${issue?.path.join('.')}: ${issue?.message}`);
}
