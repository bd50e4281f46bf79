import { z } from 'zod';
import { KilnError } from '../../errors.ts';
import { identityRecord } from '../../host/process-identity.ts';
import { readOnlySlots, type VmRecord, writableSlots } from '../vmm.ts';

/*
 * What is written down of a VM so that a later kilnd, which may be of another version, finds it again.
 */

const firecrackerRecord = z.object({
  version: z.literal(1),
  firecracker: identityRecord,
  usedSlots: z.array(z.enum([...readOnlySlots, ...writableSlots])),
});

export type FirecrackerRecord = z.infer<typeof firecrackerRecord>;

/** @throws KilnError invalid-argument */
export function parseFirecrackerRecord(record: VmRecord): FirecrackerRecord {
  const result = firecrackerRecord.safeParse(record);
  if (result.success) return result.data;
  const [issue] = result.error.issues;
  const where = `${issue?.path.join('.')}: ${issue?.message}`;
  throw new KilnError('invalid-argument', `not a record of a Firecracker VM: ${where}`);
}
