import { accessSync, constants, existsSync } from 'node:fs';
import path from 'node:path';
import type { HostDevices } from './host-devices.ts';

/** KVM modules with hardware behind them. `kvm_pvm` is not one: stock guest kernels do not reach init under it. */
const hardwareKvmModules = ['kvm_intel', 'kvm_amd'];

/** Why virtual machines cannot have hardware virtualisation; undefined when they can. */
export function kvmProblem(devices: HostDevices): string | undefined {
  // On arm64 KVM is part of the kernel and has no module directory of a vendor.
  const isLoaded = (name: string) => existsSync(path.join(devices.modules, name));
  const hardware = devices.arch === 'arm64' || hardwareKvmModules.some(isLoaded);
  if (!hardware) return `none of the kernel modules ${hardwareKvmModules.join(', ')} is loaded`;
  try {
    accessSync(devices.kvm, constants.R_OK | constants.W_OK);
    return undefined;
  } catch (error) {
    return `${devices.kvm} cannot be opened: ${(error as NodeJS.ErrnoException).code ?? String(error)}`;
  }
}
