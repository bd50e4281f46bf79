import type { KilnConfig } from '../config/config.ts';
import { KilnError } from '../errors.ts';
import { findProgram } from '../host/program.ts';
import { CounterSums } from '../observe/counter-sums.ts';
import type { Logger } from '../observe/logger.ts';
import type { Parking } from '../vmm/cards.ts';
import { chooseVmm } from '../vmm/choice.ts';
import { createFirecracker, type JailSettings } from '../vmm/firecracker/driver.ts';
import { type HostDevices, hostDevices } from '../vmm/host-devices.ts';
import { chooseAccelerator } from '../vmm/qemu/accelerator.ts';
import { createQemu } from '../vmm/qemu/driver.ts';
import type { Vmm } from '../vmm/vmm.ts';
import { qemuIdlePlugin, vsockBackendProgram } from './installation.ts';

/** What all Firecrackers count since kilnd's start; the real one has some 300 counters. */
export const firecrackerCounters = new CounterSums(1000);

/** What has been told, each thing once. */
const told = new Set<string>();

/** What kilnd gives to every VMM. */
export interface VmmServices {
  readonly logger: Logger;
  readonly parking: Parking;
}

const drivers: Readonly<Record<string, (config: KilnConfig, services: VmmServices) => Vmm>> = {
  firecracker({ vm, storage }, { logger, parking }) {
    const { firecracker, hugePages, memoryMaxMib, bootTimer } = vm;
    const networkLimits = { bytesPerS: vm.networkMibPerS * 2 ** 20, opsPerS: 0 };
    const diskLimits = { bytesPerS: storage.diskMibPerS * 2 ** 20, opsPerS: storage.diskOpsPerS };
    const jail = () => jailSettings(vm, logger);
    const settings = { firecracker, hugePages, memoryMaxMib, bootTimer, diskLimits, networkLimits };
    return createFirecracker({ ...settings, jail, parking, logger, count: firecrackerCounters.add });
  },
  qemu({ vm, template }, { logger, parking }) {
    warnOfEmulation(vm.accelerator, logger);
    const { qemu, accelerator } = vm;
    const translationMib = vm.translationMib === 0 ? undefined : vm.translationMib;
    const idlePlugin = vm.translationIdleS === 0 ? undefined : { file: qemuIdlePlugin, afterS: vm.translationIdleS };
    // The only one that can be saved.
    const channel = vm.channel === 'auto' && template.enabled ? 'virtio-serial' : vm.channel;
    return createQemu({
      qemu,
      vsockBackend: vsockBackendProgram,
      accelerator,
      translationMib,
      idlePlugin,
      channel,
      parking,
      logger,
    });
  },
};

/**
 * The VMM that the configuration asks for. Says once at info level which that is and why, and at warning level when VMs run
 * under software emulation or without a jail.
 *
 * @throws KilnError failed-precondition for a setting that only Firecracker has, where it is not the one
 */
export async function selectVmm(
  config: KilnConfig,
  services: VmmServices,
  devices: HostDevices = hostDevices,
): Promise<Vmm> {
  const { logger } = services;
  const { name, reason } = await chooseVmm(config.vm, devices);
  once(`${name}: ${reason}`, () => logger.info({ vmm: name, reason }, 'chose the virtual machine monitor'));
  if (name === 'qemu') refuseForQemu(config, reason);
  return vmmNamed(name, config, services);
}

/** A setting that cannot be kept is an error, since a limit that does not limit would be worse. */
function refuseForQemu({ vm, storage }: KilnConfig, reason: string): void {
  const asked = {
    'vm.huge_pages': vm.hugePages,
    'vm.boot_timer': vm.bootTimer,
    'memory that grows (memory_max_mib)': vm.memoryMaxMib > vm.memoryMib,
    'a limit of network bandwidth (network_mib_per_s)': vm.networkMibPerS > 0,
    'a limit of disk bandwidth (disk_mib_per_s)': storage.diskMibPerS > 0,
    'a limit of disk requests (disk_ops_per_s)': storage.diskOpsPerS > 0,
  };
  for (const [what, isAsked] of Object.entries(asked)) {
    if (!isAsked) continue;
    throw new KilnError('failed-precondition', `${what} needs Firecracker, but this VM runs under QEMU: ${reason}`, {
      hint: 'leave it out, or install Firecracker on a host with hardware virtualisation',
    });
  }
}

/** The VMM of a VM that was booted earlier, under another configuration maybe. @throws KilnError not-found */
export function vmmNamed(name: string, config: KilnConfig, services: VmmServices): Vmm {
  const create = drivers[name];
  if (create === undefined) throw new KilnError('not-found', `there is no virtual machine monitor "${name}"`);
  return create(config, services);
}

/**
 * The jail that the configuration asks for, or undefined for none, of which it warns once.
 *
 * @throws KilnError failed-precondition when a jail is asked for and there is no jailer
 */
export function jailSettings(vm: KilnConfig['vm'], logger: Logger): JailSettings | undefined {
  if (vm.jail === 'off') return undefined;
  const jailer = findProgram(vm.jailer);
  if (jailer !== undefined) return { jailer, uids: { first: vm.jailUidFirst, count: vm.jailUids } };
  const reason = `there is no program "${vm.jailer}" (vm.jailer)`;
  if (vm.jail === 'on') {
    throw new KilnError('failed-precondition', `vm.jail is "on", but ${reason}`, {
      hint: 'install the jailer that comes with Firecracker, or set vm.jail = "auto"',
    });
  }
  once(reason, () => logger.warn({ reason }, 'Firecracker runs without a jail, as root'));
  return undefined;
}

function warnOfEmulation(wanted: KilnConfig['vm']['accelerator'], logger: Logger): void {
  const { accelerator, reason } = chooseAccelerator(wanted);
  if (accelerator !== 'tcg') return;
  const slow = 'no hardware virtualisation: VMs run under software emulation, 15 to 20 times slower';
  once(slow, () => logger.warn({ reason }, slow));
}

function once(what: string, tell: () => void): void {
  if (told.has(what)) return;
  told.add(what);
  tell();
}
