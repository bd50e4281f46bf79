import { z } from 'zod';
import { identityRecord } from '../../host/process-identity.ts';
import { nics, parseVmRecord, usedSlots } from '../record.ts';
import type { VmRecord } from '../vmm.ts';

const firecrackerRecord = z.object({
  version: z.literal(1),
  firecracker: identityRecord,
  usedSlots,
  nics,
  /** Absent in a record of a kilnd that gave no VM more than it had from its start. */
  memory: z.object({ bootMib: z.int(), hotplugMib: z.int() }).default({ bootMib: 0, hotplugMib: 0 }),
  /** Of the jail that it is in; absent for one that runs on the host as it is. */
  jail: z.object({ uid: z.int().positive() }).optional(),
});

export type FirecrackerRecord = z.infer<typeof firecrackerRecord>;

/** @throws KilnError invalid-argument */
export function parseFirecrackerRecord(record: VmRecord): FirecrackerRecord {
  return parseVmRecord(firecrackerRecord, 'a Firecracker VM', record);
}
