import { KilnError } from '../errors.ts';
import type { Translation } from './field-rules.ts';
import type { Device } from './spec.ts';

/** Devices that the guest has under the same numbers, and that are the same everywhere. Linux admin-guide/devices.txt. */
const guestDevices: Readonly<Record<string, string>> = {
  'c 1:3': 'null',
  'c 1:5': 'zero',
  'c 1:7': 'full',
  'c 1:8': 'random',
  'c 1:9': 'urandom',
  'c 5:0': 'tty',
  'c 5:1': 'console',
  'c 5:2': 'ptmx',
  // Drivers that the guest's kernels have, and that give every opener something new.
  'c 10:200': 'net/tun',
  'c 10:229': 'fuse',
};

/** Their names below /dev, of those that are there without a driver being loaded first. */
export const nodesAlikeEverywhere: ReadonlySet<string> = new Set(
  Object.entries(guestDevices).flatMap(([number, name]) => (number.startsWith('c 1:') || name === 'tty' ? [name] : [])),
);

/** Whether it means the same in the guest: a FIFO, or a device that the guest has under the same number. */
export function isGuestDevice({ type, major = 0, minor = 0 }: Pick<Device, 'type' | 'major' | 'minor'>): boolean {
  return type === 'p' || Object.hasOwn(guestDevices, `${type === 'u' ? 'c' : type} ${major}:${minor}`);
}

/**
 * linux.devices: device nodes that mean the same in the guest, and FIFOs, are made there; block devices become drives of the
 * virtual machine (block-devices.ts). The numbers of any other device name hardware of the host; in the guest they name
 * nothing, or another device.
 *
 * @throws KilnError unimplemented, naming the device
 */
export function translateDevices(
  devices: readonly Device[],
  path: string,
  { blockDevices, mapsIds }: Pick<Translation, 'blockDevices' | 'mapsIds'>,
): readonly Device[] {
  return devices.map((device, index) => {
    const { path: node, type, major = 0, minor = 0 } = device;
    const at = `${path}[${index}]`;
    if (isGuestDevice(device)) return device;
    if (!['c', 'u', 'b'].includes(type)) {
      throw new KilnError('invalid-argument', `${at}: ${node} has the unknown type "${type}"`);
    }
    const number = `${type === 'u' ? 'c' : type} ${major}:${minor}`;
    if (type !== 'b') {
      throw new KilnError(
        'unimplemented',
        `${at}: ${node} (${number}) is a character device of the host: its driver is there, not in the guest`,
        { hint: 'block devices can be had, and the character devices that docs/oci-spec.md names' },
      );
    }
    if (!mapsIds) return blockDevices.translateNode(device);
    // crun would bind the guest's own node of that name.
    throw new KilnError('unimplemented', `${at}: ${node} (${number}): not beside a user namespace of the container's`);
  });
}
