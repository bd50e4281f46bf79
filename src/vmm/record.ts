import { z } from 'zod';
import { KilnError } from '../errors.ts';
import { readOnlySlots, type VmRecord, writableSlots } from './vmm.ts';

/*
 * What is written down of a VM so that a later kilnd, which may be of another version, finds it again. Each driver has a
 * form of its own.
 */

/** The drive slots that have a file, in any driver's record. */
export const usedSlots = z.array(z.enum([...readOnlySlots, ...writableSlots]));

/** Those that an earlier kilnd has given the VM: none, when it knew of none. */
export const nics = z.array(z.object({ mac: z.string(), tap: z.string() })).default([]);

/** @param what the record should be of: "a QEMU VM". @throws KilnError invalid-argument */
export function parseVmRecord<T>(form: z.ZodType<T>, what: string, record: VmRecord): T {
  const result = form.safeParse(record);
  if (result.success) return result.data;
  const [issue] = result.error.issues;
  throw new KilnError('invalid-argument', `not a record of ${what}: ${issue?.path.join('.')}: ${issue?.message}`);
}
