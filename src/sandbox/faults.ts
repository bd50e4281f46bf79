import { KilnError } from '../errors.ts';

/**
 * The steps of a start at which something is acquired, in no particular order. The tests make each of them fail in
 * turn (`KILN_FAULT=<step>` in kilnd's environment) and check that nothing is left behind.
 */
export const faultPoints = [
  'sandbox-directory',
  'control-group',
  'stdio',
  'stand-in',
  'rootfs',
  'volumes',
  'vm-boot',
  'agent-connect',
  'hooks',
  'attach-disk',
  'container-create',
  'container-start',
] as const;

export type FaultPoint = (typeof faultPoints)[number];

const injected = process.env.KILN_FAULT;

/** Fails if a test asked for it; called right after the step's resource was acquired. */
export function faultPoint(point: FaultPoint): void {
  if (injected === point) throw new KilnError('internal', `injected failure at ${point} (KILN_FAULT)`);
}
