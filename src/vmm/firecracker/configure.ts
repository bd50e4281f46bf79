import { commonKernelWords } from '../kernel-words.ts';
import type { VmConfig, VmShape } from '../vmm.ts';
import type { FirecrackerRequest } from './api.ts';
import { type DrivePaths, driveNames, drivesAt, makeDriveFiles, serialOf } from './drives.ts';
import { hugePageMib, inHugePages } from './huge-pages.ts';
import type { FirecrackerOptions } from './options.ts';
import type { Started } from './start.ts';
import { isAtLeast } from './version.ts';

/** The minor version of Firecracker 1 that has free page reporting: CHANGELOG.md, 1.14.0. */
const reportingSince = 14;

/** The guest's own CID. Each VM has a vsock of its own, so the number need not differ between VMs. */
const guestCid = 3;

type Settings = Pick<FirecrackerOptions, 'hugePages' | 'diskLimits'>;

/** What the requests name, by Firecracker's paths. */
interface Files {
  readonly kernel: string;
  readonly initrd: string | undefined;
  readonly drives: DrivePaths;
  readonly vsock: string;
  /** The serial of the guest image's disk. */
  readonly imageSerial: string;
}

/** Everything up to the start, each with an answer of its own, so that an error names what was refused. */
export async function configureAndStart(
  { api, place, version, signal }: Started,
  config: VmConfig,
  settings: Settings,
): Promise<void> {
  const { kernel, initrd, guestImage } = config;
  const files = {
    kernel: await place.show('kernel', kernel),
    initrd: initrd === undefined ? undefined : await place.show('initrd', initrd),
    drives: await makeDriveFiles(guestImage, place),
    vsock: place.vsock.inside,
    imageSerial: await serialOf(guestImage),
  };
  for (const [name, body] of requestsFor(config, files, settings, isAtLeast(version, reportingSince))) {
    await api.call(name, body, signal);
  }
  await api.call('PUT /actions', { action_type: 'InstanceStart' }, signal);
  // They are in the guest's memory now.
  for (const name of ['kernel', 'initrd'] as const) place.hide(name);
}

/**
 * All that Firecracker is told before a start, as text, but for its files and what depends on its version: the same texts mean
 * the same VM.
 */
export function configurationText(shape: VmShape, settings: Settings): string[] {
  const drives = new Map(driveNames.map((name) => [name, name]));
  const files = { kernel: 'kernel', initrd: shape.initrd && 'initrd', drives, vsock: 'vsock', imageSerial: '' };
  return requestsFor(shape, files, settings, true).map((request) => JSON.stringify(request));
}

function requestsFor(
  shape: VmShape,
  files: Files,
  { hugePages, diskLimits }: Settings,
  reportsFreePages: boolean,
): FirecrackerRequest[] {
  const { vcpus, memoryMib } = shape;
  const memory = hugePages
    ? ({ mem_size_mib: inHugePages(memoryMib) * hugePageMib, huge_pages: '2M' } as const)
    : { mem_size_mib: memoryMib };
  const boot = {
    kernel_image_path: files.kernel,
    ...(files.initrd === undefined ? {} : { initrd_path: files.initrd }),
    boot_args: kernelCommandLine(shape, files.imageSerial),
  };
  const balloon = { amount_mib: 0, deflate_on_oom: true, free_page_reporting: true };
  return [
    ['PUT /machine-config', { vcpu_count: vcpus, ...memory }],
    ['PUT /boot-source', boot],
    ...drivesAt(files.drives, diskLimits).map((drive): FirecrackerRequest => ['PUT /drives', drive]),
    ['PUT /vsock', { guest_cid: guestCid, uds_path: files.vsock }],
    ['PUT /entropy', {}],
    // The guest tells what memory it does not use, and the host has it back. Huge pages are nobody else's anyway.
    ...(reportsFreePages && !hugePages ? [['PUT /balloon', balloon] satisfies FirecrackerRequest] : []),
  ];
}

/**
 * i8042: the kernel reboots by it, which ends Firecracker (FAQ.md), and looks for no keyboard and mouse there. Firecracker
 * itself adds `pci=off` and what describes its devices.
 */
function kernelCommandLine(shape: VmShape, imageSerial: string): string {
  const words = [...commonKernelWords(shape, 'k'), 'i8042.noaux', 'i8042.nomux', 'i8042.dumbkbd', 'swiotlb=noforce'];
  return [...words, `kiln.image_serial=${imageSerial}`].join(' ');
}
