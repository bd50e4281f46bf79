import { readFileSync } from 'node:fs';
import { KilnError } from '../../errors.ts';
import type { HostDevices } from '../host-devices.ts';
import type { VmConfig } from '../vmm.ts';

export const hugePageMib = 2;

export function inHugePages(mib: number): number {
  return Math.ceil(mib / hugePageMib);
}

/**
 * Firecracker reserves none, and gets SIGBUS when the pool is empty: docs/hugepages.md. So it is told before.
 *
 * @throws KilnError resource-exhausted when the pool has too few
 */
export function requireHugePages({ memoryMib }: VmConfig, { freeHugePages }: HostDevices): void {
  const needed = inHugePages(memoryMib);
  const free = Number(readOr(freeHugePages, '0'));
  if (free >= needed) return;
  const message = `vm.huge_pages is set, but the host has ${free} free pages of 2 MiB, and the VM needs ${needed}`;
  throw new KilnError('resource-exhausted', message, {
    hint: 'raise vm.nr_hugepages (sysctl), or set vm.huge_pages = false in the config file',
  });
}

function readOr(file: string, otherwise: string): string {
  try {
    return readFileSync(file, 'utf8');
  } catch {
    return otherwise; // A kernel without huge pages.
  }
}
