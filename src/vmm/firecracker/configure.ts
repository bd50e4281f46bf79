import { commonKernelWords } from '../kernel-words.ts';
import type { VmConfig } from '../vmm.ts';
import { makeDrives, serialOf } from './drives.ts';
import { hugePageMib, inHugePages } from './huge-pages.ts';
import type { FirecrackerOptions } from './options.ts';
import type { Started } from './start.ts';
import { isAtLeast } from './version.ts';

/** The minor version of Firecracker 1 that has free page reporting: CHANGELOG.md, 1.14.0. */
const reportingSince = 14;

/** The guest's own CID. Each VM has a vsock of its own, so the number need not differ between VMs. */
const guestCid = 3;

/** Everything up to the start, each with an answer of its own, so that an error names what was refused. */
export async function configureAndStart(
  { api, place, version, signal }: Started,
  config: VmConfig,
  { hugePages, diskLimits }: Pick<FirecrackerOptions, 'hugePages' | 'diskLimits'>,
): Promise<void> {
  const { kernel, initrd, guestImage, vcpus, memoryMib } = config;
  const memory = hugePages
    ? ({ mem_size_mib: inHugePages(memoryMib) * hugePageMib, huge_pages: '2M' } as const)
    : { mem_size_mib: memoryMib };
  await api.call('PUT /machine-config', { vcpu_count: vcpus, ...memory }, signal);
  const boot = {
    kernel_image_path: await place.show('kernel', kernel),
    ...(initrd === undefined ? {} : { initrd_path: await place.show('initrd', initrd) }),
    boot_args: await kernelCommandLine(config),
  };
  await api.call('PUT /boot-source', boot, signal);
  for (const drive of await makeDrives(guestImage, place, diskLimits)) await api.call('PUT /drives', drive, signal);
  await api.call('PUT /vsock', { guest_cid: guestCid, uds_path: place.vsock.inside }, signal);
  await api.call('PUT /entropy', {}, signal);
  // The guest tells what memory it does not use, and the host has it back. Huge pages are nobody else's anyway.
  if (isAtLeast(version, reportingSince) && !hugePages) {
    await api.call('PUT /balloon', { amount_mib: 0, deflate_on_oom: true, free_page_reporting: true }, signal);
  }
  await api.call('PUT /actions', { action_type: 'InstanceStart' }, signal);
  // They are in the guest's memory now.
  for (const name of ['kernel', 'initrd'] as const) place.hide(name);
}

/**
 * i8042: the kernel reboots by it, which ends Firecracker (FAQ.md), and looks for no keyboard and mouse there. Firecracker
 * itself adds `pci=off` and what describes its devices.
 */
async function kernelCommandLine(config: VmConfig): Promise<string> {
  const words = [...commonKernelWords(config, 'k'), 'i8042.noaux', 'i8042.nomux', 'i8042.dumbkbd', 'swiotlb=noforce'];
  return [...words, `kiln.image_serial=${await serialOf(config.guestImage)}`].join(' ');
}
