import { commonKernelWords } from '../kernel-words.ts';
import { cardMac, type NetworkCard, type VmConfig, type VmShape } from '../vmm.ts';
import type { FirecrackerRequest, RateLimiter } from './api.ts';
import { type DrivePaths, driveNames, drivesAt, makeDriveFiles, serialOf } from './drives.ts';
import { type GuestMemory, growthKernelWords, guestMemory } from './memory.ts';
import type { FirecrackerOptions } from './options.ts';
import { rateLimiter } from './rate-limiter.ts';
import type { Started } from './start.ts';
import { isAtLeast } from './version.ts';

/** The minor version of Firecracker 1 that has free page reporting: CHANGELOG.md, 1.14.0. */
const reportingSince = 14;

/** A version that has everything. */
const newest = '1.999.0';

/** Where x86 guests write to, since 1.13: src/vmm/src/arch/x86_64/layout.rs, BOOT_DEVICE_MEM_START. */
const bootTimerAddress = '0xc0000000';

/** The guest's own CID. Each VM has a vsock of its own, so the number need not differ between VMs. */
const guestCid = 3;

type Settings = Pick<FirecrackerOptions, 'hugePages' | 'diskLimits' | 'networkLimits' | 'memoryMaxMib' | 'bootTimer'>;

/** What the requests name, by Firecracker's paths. */
interface Files {
  readonly kernel: string;
  readonly initrd: string | undefined;
  readonly drives: DrivePaths;
  readonly vsock: string;
  readonly nics: readonly NetworkCard[];
  /** The serial of the guest image's disk. */
  readonly imageSerial: string;
}

/** Everything up to the start, each with an answer of its own, so that an error names what was refused. */
export async function configureAndStart(
  { api, place, nics, version, signal }: Started,
  config: VmConfig,
  settings: Settings,
): Promise<void> {
  const { kernel, initrd, guestImage } = config;
  const files = {
    kernel: await place.show('kernel', kernel),
    initrd: initrd === undefined ? undefined : await place.show('initrd', initrd),
    drives: await makeDriveFiles(config, place),
    vsock: place.vsock.inside,
    nics,
    imageSerial: await serialOf(guestImage),
  };
  for (const [name, body] of requestsFor(config, files, settings, version)) {
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
  const drives = new Map(driveNames(shape.networkCards).map((name) => [name, name]));
  const nics = Array.from({ length: shape.networkCards }, (_, index) => ({ mac: cardMac(index), tap: 'tap' }));
  const files = { kernel: 'kernel', initrd: shape.initrd && 'initrd', drives, vsock: 'vsock', nics, imageSerial: '' };
  return requestsFor(shape, files, settings, newest).map((request) => JSON.stringify(request));
}

function requestsFor(shape: VmShape, files: Files, settings: Settings, version: string): FirecrackerRequest[] {
  const { hugePages, diskLimits, networkLimits, bootTimer } = settings;
  const limiter = rateLimiter(networkLimits);
  const memory = guestMemory(shape, settings, version);
  const devices = memoryDevices(memory, settings, version);
  const machine = { vcpu_count: shape.vcpus, mem_size_mib: memory.bootMib };
  const boot = {
    kernel_image_path: files.kernel,
    ...(files.initrd === undefined ? {} : { initrd_path: files.initrd }),
    boot_args: kernelCommandLine(shape, devices, { imageSerial: files.imageSerial, bootTimer }),
  };
  return [
    ['PUT /machine-config', { ...machine, ...(hugePages ? { huge_pages: '2M' } : {}) }],
    ['PUT /boot-source', boot],
    ...drivesAt(files.drives, diskLimits).map((drive): FirecrackerRequest => ['PUT /drives', drive]),
    ...files.nics.map(
      (nic, index): FirecrackerRequest => ['PUT /network-interfaces', interfaceAt(nic, index, limiter)],
    ),
    ['PUT /vsock', { guest_cid: guestCid, uds_path: files.vsock }],
    ['PUT /entropy', {}],
    ...devices.map(({ request }) => request),
  ];
}

function interfaceAt({ mac, tap }: NetworkCard, index: number, limiter: RateLimiter | undefined) {
  const limits = limiter === undefined ? {} : { rx_rate_limiter: limiter, tx_rate_limiter: limiter };
  return { iface_id: interfaceId(index), host_dev_name: tap, guest_mac: mac, ...limits };
}

/** By which Firecracker knows the nth network card. */
export function interfaceId(index: number): string {
  return `net${index}`;
}

/** A device that changes how much memory the guest has, and what its kernel needs for it. */
interface MemoryDevice {
  readonly request: FirecrackerRequest;
  /** The driver, where it is a module. */
  readonly module: string;
  readonly kernelWords: readonly string[];
}

function memoryDevices(
  { hotplugMib }: GuestMemory,
  { hugePages }: Pick<Settings, 'hugePages'>,
  version: string,
): MemoryDevice[] {
  const devices: MemoryDevice[] = [];
  // The guest tells what memory it does not use, and the host has it back. Huge pages are nobody else's anyway.
  if (isAtLeast(version, reportingSince) && !hugePages) {
    const balloon = { amount_mib: 0, deflate_on_oom: true, free_page_reporting: true };
    devices.push({ request: ['PUT /balloon', balloon], module: 'virtio_balloon', kernelWords: [] });
  }
  if (hotplugMib > 0) {
    const request = ['PUT /hotplug/memory', { total_size_mib: hotplugMib }] as const;
    devices.push({ request, module: 'virtio_mem', kernelWords: growthKernelWords });
  }
  return devices;
}

/**
 * i8042: the kernel reboots by it, which ends Firecracker (FAQ.md), and looks for no keyboard and mouse there. Firecracker
 * itself adds `pci=off` and what describes its devices.
 */
function kernelCommandLine(
  shape: VmShape,
  devices: readonly MemoryDevice[],
  { imageSerial, bootTimer }: { readonly imageSerial: string; readonly bootTimer: boolean },
): string {
  const words = [...commonKernelWords(shape, 'k'), 'i8042.noaux', 'i8042.nomux', 'i8042.dumbkbd', 'swiotlb=noforce'];
  words.push(...devices.flatMap(({ kernelWords }) => kernelWords));
  if (bootTimer) words.push(`kiln.boot_timer=${bootTimerAddress}`);
  // A kernel that needs no initrd has them built in.
  if (shape.initrd !== undefined && devices.length > 0) {
    words.push(`kiln.modules=${devices.map(({ module }) => module).join(',')}`);
  }
  return [...words, `kiln.image_serial=${imageSerial}`].join(' ');
}
