/*
 * Memory that a running VM can get: docs/memory-hotplug.md of Firecracker v1.16, virtio-mem. The VM is told before its start how
 * much that is at the most, and has none of it then; it is in its snapshots, too, as holes. While it runs it is asked to take
 * more. Its kernel does so by and by, in blocks, or not at all: the host looks until it has.
 */
import { setTimeout as delay } from 'node:timers/promises';
import { KilnError } from '../../errors.ts';
import type { MemoryGrowth, VmShape } from '../vmm.ts';
import type { FirecrackerApi } from './api.ts';
import { hugePageMib, inHugePages } from './huge-pages.ts';
import type { FirecrackerOptions } from './options.ts';
import { isAtLeast } from './version.ts';

/** The minor version of Firecracker 1 that has it: CHANGELOG.md, 1.14.0. */
const growthSince = 14;

/** What can be added at all is a multiple of the one, and what is added of the other: the defaults, in MiB. */
const slotMib = 128;
const blockMib = 2;

/** A guest takes a GiB in some tens of milliseconds; one whose kernel has no driver never does. */
const takeLimitMs = 5_000;
const lookIntervalMs = 10;

export interface GuestMemory {
  /** What it has from its start, in MiB. */
  readonly bootMib: number;
  /** What it can get at most while it runs, in MiB; 0 for none. */
  readonly hotplugMib: number;
}

/** What a VM is told of its memory by a Firecracker of that version. */
export function guestMemory(
  { memoryMib }: Pick<VmShape, 'memoryMib'>,
  { hugePages, memoryMaxMib }: Pick<FirecrackerOptions, 'hugePages' | 'memoryMaxMib'>,
  version: string,
): GuestMemory {
  const bootMib = hugePages ? inHugePages(memoryMib) * hugePageMib : memoryMib;
  const missingMib = isAtLeast(version, growthSince) ? Math.max(memoryMaxMib - bootMib, 0) : 0;
  return { bootMib, hotplugMib: roundUp(missingMib, slotMib) };
}

/**
 * Of a VM that was started so; null for one that cannot grow.
 *
 * @param requireRoom throws when the host has no room for so many MiB more
 */
export function memoryGrowth(
  api: FirecrackerApi,
  memory: GuestMemory,
  requireRoom: (mib: number) => void,
): MemoryGrowth | null {
  if (memory.hotplugMib === 0) return null;
  let last: Promise<unknown> = Promise.resolve();
  return {
    limitMib: memory.bootMib + memory.hotplugMib,
    growTo(mib) {
      // One at a time: each begins with what the one before has reached.
      const step = last.then(() => grow(api, roundUp(mib - memory.bootMib, blockMib), requireRoom));
      last = step.catch(() => {});
      return step;
    },
  };
}

/** @param wantedMib beside what the VM has from its start */
async function grow(api: FirecrackerApi, wantedMib: number, requireRoom: (mib: number) => void): Promise<void> {
  const { requested_size_mib: before, plugged_size_mib: has } = await api.hotplugMemory();
  if (has >= wantedMib) return;
  requireRoom(wantedMib - has);
  try {
    await api.call('PATCH /hotplug/memory', { requested_size_mib: Math.max(wantedMib, before) });
  } catch (error) {
    if (!(error instanceof KilnError && error.code === 'internal')) throw error;
    throw new KilnError('internal', error.message, { hint: driverHint, cause: error });
  }
  const deadline = performance.now() + takeLimitMs;
  let taken = has;
  while (taken < wantedMib) {
    if (performance.now() > deadline) {
      // So that it takes no more later, when nobody needs it.
      await api.call('PATCH /hotplug/memory', { requested_size_mib: before });
      const message = `the guest has taken ${taken} of ${wantedMib} MiB of further memory in ${takeLimitMs / 1000} s`;
      throw new KilnError('deadline-exceeded', message, { hint: driverHint });
    }
    await delay(lookIntervalMs);
    taken = (await api.hotplugMemory()).plugged_size_mib;
  }
}

const driverHint = "the guest's kernel needs the driver virtio_mem (CONFIG_VIRTIO_MEM) and Linux 5.16 or newer";

function roundUp(value: number, unit: number): number {
  return Math.ceil(value / unit) * unit;
}

/**
 * The words on the kernel's command line without which it would leave its new memory unused. Nothing is taken away from a
 * guest, so the memory need not be movable, and holds the kernel's tables of itself where the kernel can do that.
 */
export const growthKernelWords = ['memhp_default_state=online', 'memory_hotplug.memmap_on_memory=1'];
