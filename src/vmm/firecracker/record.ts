import { z } from 'zod';
import { identityRecord } from '../../host/process-identity.ts';
import { parseVmRecord, usedSlots } from '../record.ts';
import type { VmRecord } from '../vmm.ts';

const firecrackerRecord = z.object({
  version: z.literal(1),
  firecracker: identityRecord,
  usedSlots,
});

export type FirecrackerRecord = z.infer<typeof firecrackerRecord>;

/** @throws KilnError invalid-argument */
export function parseFirecrackerRecord(record: VmRecord): FirecrackerRecord {
  return parseVmRecord(firecrackerRecord, 'a Firecracker VM', record);
}
