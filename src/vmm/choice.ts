import { findProgram } from '../host/program.ts';
import { isSupported, versionOf } from './firecracker/version.ts';
import { type HostDevices, hostDevices } from './host-devices.ts';
import { kvmProblem } from './kvm.ts';

export type VmmName = 'firecracker' | 'qemu';

export interface Wishes {
  readonly vmm: 'auto' | VmmName;
  /** Firecracker's program: a name on PATH or a path. */
  readonly firecracker: string;
  /** What only QEMU has: software emulation, and channels of other kinds than Firecracker's. */
  readonly accelerator: 'auto' | 'kvm' | 'tcg';
  readonly channel: string;
}

export interface VmmChoice {
  readonly name: VmmName;
  readonly reason: string;
}

/** Chooses Firecracker where it is asked for, or where it can do what is asked for, else QEMU; with the reason. Never rejects. */
export async function chooseVmm(
  { vmm, firecracker, accelerator, channel }: Wishes,
  devices: HostDevices = hostDevices,
): Promise<VmmChoice> {
  const qemu = (reason: string): VmmChoice => ({ name: 'qemu', reason });
  if (vmm !== 'auto') return { name: vmm, reason: `${vmm} is asked for` };
  if (accelerator === 'tcg') return qemu('vm.accelerator = "tcg"');
  if (channel !== 'auto' && channel !== 'hybrid-vsock') return qemu(`vm.channel = "${channel}"`);
  const problem = kvmProblem(devices);
  if (problem !== undefined) return qemu(`Firecracker needs hardware KVM, but ${problem}`);
  const program = findProgram(firecracker);
  if (program === undefined) return qemu(`there is no program "${firecracker}" (vm.firecracker)`);
  const version = await versionOf(program);
  if (!isSupported(version)) return qemu(`version ${version} of ${program} is not supported`);
  return { name: 'firecracker', reason: `Firecracker ${version} and hardware KVM are there` };
}
