import { readFileSync } from 'node:fs';
import { KilnError } from '../../errors.ts';
import { type HostDevices, hostDevices } from '../host-devices.ts';
import { kvmProblem } from '../kvm.ts';

export type Accelerator = 'kvm' | 'tcg';

/**
 * Chooses hardware virtualisation where it works, else software emulation, with the reason.
 * Throws `failed-precondition` when KVM is demanded and missing.
 */
export function chooseAccelerator(
  wanted: 'auto' | Accelerator,
  devices: HostDevices = hostDevices,
): { accelerator: Accelerator; reason: string } {
  if (wanted === 'tcg') return { accelerator: 'tcg', reason: 'vm.accelerator = "tcg"' };
  const problem = kvmProblem(devices);
  if (problem === undefined) return { accelerator: 'kvm', reason: 'hardware KVM is available' };
  if (wanted === 'kvm') {
    throw new KilnError('failed-precondition', `vm.accelerator is "kvm", but ${problem}`, {
      hint: 'load the KVM module, or set vm.accelerator = "auto" to allow slow software emulation',
    });
  }
  return { accelerator: 'tcg', reason: problem };
}

/**
 * The host CPU's clock in kHz, for `tsc_early_khz`. Under TCG the guest's TSC calibration loops for ever in about half
 * of all boots on microvm unless it is told the frequency. Undefined where /proc/cpuinfo does not say (arm64).
 */
export function hostTscKhz(devices: HostDevices = hostDevices): number | undefined {
  const mhz = /^cpu MHz\s*:\s*([\d.]+)/m.exec(readFileSync(devices.cpuinfo, 'utf8'))?.[1];
  return mhz === undefined ? undefined : Math.round(Number(mhz) * 1000);
}
