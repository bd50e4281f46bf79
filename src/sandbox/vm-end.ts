import type { SandboxEnd } from './sandbox.ts';

/** signal(7). */
export const sigkill = 9;

/** Exit status of what was in a VM that was killed from outside, or is ended by us, and in one that failed. */
export const vmKilledStatus = 128 + sigkill;
export const unknownStatus = 255;

/** What the end of its VM makes of a container's exit status. */
export function statusOfVmEnd({
  signal,
  guestStopped,
  agentLost = false,
}: Pick<SandboxEnd, 'signal' | 'guestStopped'> & { readonly agentLost?: boolean }): number {
  return signal === 'SIGKILL' && !guestStopped && !agentLost ? vmKilledStatus : unknownStatus;
}
