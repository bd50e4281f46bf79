/** What is thrown when a VMM, or the agent in its guest, does not answer in time. */
import { setTimeout as delay } from 'node:timers/promises';
import { KilnError } from '../errors.ts';
import type { Vm } from '../vmm/vmm.ts';
import { consoleLimitMs } from './limits.ts';

/** Bytes of guest console that go into an error message. */
const consoleTailBytes = 2000;

export async function agentSilent(vm: Vm, timeoutMs: number): Promise<KilnError> {
  return new KilnError(
    'deadline-exceeded',
    `the agent in the guest did not call within ${timeoutMs / 1000} s; the guest console's last lines:\n${await tailOf(vm)}`,
    { hint: 'see docs/guest.md; vm.boot_timeout_s in the config file sets the limit' },
  );
}

/** @param action as in "start" */
export function vmmSilent(vmm: { readonly name: string }, action: string, timeoutMs: number): KilnError {
  return new KilnError('deadline-exceeded', `${vmm.name} did not ${action} within ${timeoutMs / 1000} s`, {
    hint: 'vm.boot_timeout_s in the config file sets the limit',
  });
}

/** The last lines of the guest's console, for a message; a VMM that hangs has none. */
export async function tailOf(vm: Vm): Promise<string> {
  const given = await Promise.race([vm.consoleTail(consoleTailBytes), delay(consoleLimitMs, '', { ref: false })]);
  return given || '(nothing)';
}
