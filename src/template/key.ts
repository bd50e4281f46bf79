import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { release } from 'node:os';
import { fileIdentity } from '../host/program.ts';
import { kilnVersion } from '../version.ts';
import type { TemplateDriver, VmShape } from '../vmm/vmm.ts';

/** A later Kiln that makes templates in another way has another number. */
const formatVersion = 2;

/** What the host's CPU and kernel are: a guest has seen both, and does not look again after it was restored. */
export interface HostFacts {
  readonly cpu: string;
  readonly kernel: string;
}

/** proc_cpuinfo(5): what names a CPU, and what it can do. Its clock, which changes all the time, is not among it. */
const cpuFields = ['vendor_id', 'cpu family', 'model', 'model name', 'stepping', 'microcode', 'flags', 'Features'];

export function hostFacts(cpuinfo = '/proc/cpuinfo'): HostFacts {
  const [first = ''] = readFileSync(cpuinfo, 'utf8').split('\n\n');
  const lines = first.split('\n').filter((line) => cpuFields.includes(line.split(':')[0]?.trim() ?? ''));
  return { cpu: lines.map((line) => line.replace(/\s+/g, ' ')).join('; '), kernel: release() };
}

/**
 * Everything that a template depends on, by name. A template fits a VM when all of it is the same.
 *
 * @throws KilnError failed-precondition without the VMM's program, or a system error without one of the guest's files
 */
export function templateParts(driver: TemplateDriver, shape: VmShape, host: HostFacts = hostFacts()) {
  const { kernel, initrd, guestImage, memoryMib, vcpus, networkCards } = shape;
  return {
    format: formatVersion,
    kiln: kilnVersion,
    vmm: driver.fingerprint(shape),
    kernel: fileIdentity(kernel),
    initrd: initrd === undefined ? null : fileIdentity(initrd),
    guestImage: fileIdentity(guestImage),
    memoryMib,
    vcpus,
    networkCards,
    host,
  };
}

export type TemplateParts = ReturnType<typeof templateParts>;

/** The name of a template in its store. */
export function templateKey(parts: TemplateParts): string {
  return createHash('sha256').update(JSON.stringify(parts)).digest('hex').slice(0, 16);
}
