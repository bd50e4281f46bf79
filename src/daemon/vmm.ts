import type { KilnConfig } from '../config/config.ts';
import type { Logger } from '../observe/logger.ts';
import { chooseAccelerator } from '../vmm/qemu/accelerator.ts';
import { createQemu } from '../vmm/qemu/driver.ts';
import type { Vmm } from '../vmm/vmm.ts';
import { vsockBackendProgram } from './installation.ts';

let warnedOfEmulation = false;

/** The VMM that the configuration asks for. Says once at warning level when VMs run under software emulation. */
export function selectVmm(config: KilnConfig, logger: Logger): Vmm {
  const { accelerator, reason } = chooseAccelerator(config.vm.accelerator);
  if (accelerator === 'tcg' && !warnedOfEmulation) {
    warnedOfEmulation = true;
    logger.warn({ reason }, 'no hardware virtualisation: VMs run under software emulation, 15 to 20 times slower');
  }
  return createQemu({
    qemu: config.vm.qemu,
    vsockBackend: vsockBackendProgram,
    accelerator,
    channel: config.vm.channel,
  });
}
