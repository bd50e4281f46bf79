import { readFileSync } from 'node:fs';
import { KilnError } from '../../errors.ts';
import type { HostDevices } from '../host-devices.ts';

export const hugePageMib = 2;

export function inHugePages(mib: number): number {
  return Math.ceil(mib / hugePageMib);
}

/**
 * Firecracker reserves none, and gets SIGBUS when the pool is empty: docs/hugepages.md. So it is told before.
 *
 * @throws KilnError resource-exhausted when the pool has too few
 */
export function requireHugePages(mib: number, { freeHugePages }: HostDevices): void {
  const needed = inHugePages(mib);
  const free = Number(readOr(freeHugePages, '0'));
  if (free >= needed) return;
  const message = `vm.huge_pages is set, but the host has ${free} free pages of 2 MiB, and the VM needs ${needed}`;
  throw new KilnError('resource-exhausted', message, {
    hint: 'raise vm.nr_hugepages (sysctl), or set vm.huge_pages = false in the config file',
  });
}

/** What asks for room before a VM gets more memory: the host's other memory is not reserved, its huge pages are counted. */
export function roomFor({ hugePages }: { readonly hugePages: boolean }, devices: HostDevices): (mib: number) => void {
  return hugePages ? (mib) => requireHugePages(mib, devices) : () => {};
}

function readOr(file: string, otherwise: string): string {
  try {
    return readFileSync(file, 'utf8');
  } catch {
    return otherwise; // A kernel without huge pages.
  }
}
