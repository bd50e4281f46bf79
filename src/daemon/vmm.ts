import type { KilnConfig } from '../config/config.ts';
import { KilnError } from '../errors.ts';
import type { Logger } from '../observe/logger.ts';
import { createFirecracker } from '../vmm/firecracker/driver.ts';
import { chooseAccelerator } from '../vmm/qemu/accelerator.ts';
import { createQemu } from '../vmm/qemu/driver.ts';
import type { Vmm } from '../vmm/vmm.ts';
import { vsockBackendProgram } from './installation.ts';

let warnedOfEmulation = false;

const drivers: Readonly<Record<string, (config: KilnConfig, logger: Logger) => Vmm>> = {
  firecracker: ({ vm }) => createFirecracker({ firecracker: vm.firecracker }),
  qemu({ vm, template }, logger) {
    warnOfEmulation(vm.accelerator, logger);
    const { qemu, accelerator } = vm;
    // The only one that can be saved.
    const channel = vm.channel === 'auto' && template.enabled ? 'virtio-serial' : vm.channel;
    return createQemu({ qemu, vsockBackend: vsockBackendProgram, accelerator, channel });
  },
};

/** The VMM that the configuration asks for. Says once at warning level when VMs run under software emulation. */
export function selectVmm(config: KilnConfig, logger: Logger): Vmm {
  return vmmNamed(config.vm.vmm === 'auto' ? 'qemu' : config.vm.vmm, config, logger);
}

/** The VMM of a VM that was booted earlier, under another configuration maybe. @throws KilnError not-found */
export function vmmNamed(name: string, config: KilnConfig, logger: Logger): Vmm {
  const create = drivers[name];
  if (create === undefined) throw new KilnError('not-found', `there is no virtual machine monitor "${name}"`);
  return create(config, logger);
}

function warnOfEmulation(wanted: KilnConfig['vm']['accelerator'], logger: Logger): void {
  const { accelerator, reason } = chooseAccelerator(wanted);
  if (accelerator !== 'tcg' || warnedOfEmulation) return;
  warnedOfEmulation = true;
  logger.warn({ reason }, 'no hardware virtualisation: VMs run under software emulation, 15 to 20 times slower');
}
