import { posix } from 'node:path';
import { KilnError } from '../errors.ts';
import { isBind, translateBind } from './binds.ts';
import type { DeviceNumber } from './block-devices.ts';
import type { Translation } from './field-rules.ts';
import { translateMountOptions, virtualFilesystems } from './mount-options.ts';
import { guestPodDirectory } from './pod.ts';
import type { Mount } from './spec.ts';

/**
 * mounts, in their order: virtual filesystems are mounted by crun in the guest, and bind mounts from the host's volumes
 * there (binds.ts).
 *
 * @throws KilnError unimplemented, naming the JSON path and the destination
 */
export function translateMounts(mounts: readonly Mount[], path: string, translation: Translation): readonly Mount[] {
  return mounts.flatMap((mount, index) => {
    if (translation.blockDevices.isNode(mount)) return [];
    const at = `${path}[${index}]`;
    const { destination, type = '', source = '' } = mount;
    for (const mappings of ['uidMappings', 'gidMappings']) {
      if (!(mappings in mount)) continue;
      throw new KilnError('unimplemented', `${at}.${mappings}: idmapped mounts are not supported yet: ${destination}`);
    }
    const isDisk = !isBind(mount) && !virtualFilesystems.has(type);
    const node = isDisk ? translation.blockDevices.nodeOf(mount) : undefined;
    if (isDisk && node === undefined) {
      throw new KilnError('unimplemented', `${at}: mounts of type "${type}" are not supported: ${destination}`, {
        hint: `its source is ${source === '' ? 'empty' : source}, which is no block device of the host`,
      });
    }
    const { options = [], ...rest } = mount;
    const withOptions = { ...rest, options: withoutSelinux(options, at, translation.warnings) };
    if (node !== undefined) return mountOfDisk(withOptions, node, at, translation);
    if (isBind(mount) && translation.pod !== undefined && destination === '/dev/shm') return podShm(withOptions, at);
    if (isBind(mount)) return translateBind(withOptions, at, translation);
    if (mount.options === undefined) return mount;
    return { ...withOptions, options: translateMountOptions(withOptions.options, `${at}.options`) };
  });
}

/**
 * A filesystem of a disk: the agent mounts it, so that it is complete on the disk when the container is removed, and crun
 * binds it. What is of a mount is said to both; what is between mounts is the bind's affair, the rest the filesystem's.
 */
function mountOfDisk(mount: Mount, node: DeviceNumber, at: string, translation: Translation): Mount {
  const { type = '' } = mount;
  const options = translateMountOptions(mount.options ?? [], `${at}.options`);
  const ofBind = options.filter((option) => propagations.test(option) || ofMounts.has(option));
  const ofFilesystem = options.filter((option) => !propagations.test(option) && option !== 'tmpcopyup');
  const directory = `${posix.dirname(translation.rootfsPath)}/filesystems`;
  const source = translation.blockDevices.addFilesystem({ type, options: ofFilesystem }, node, directory);
  return { ...mount, type: 'bind', source, options: ['bind', ...ofBind] };
}

/** Flags of a mount, and not of its filesystem: crun gives the bind those that it is told, and no others. mount(2) */
const ofMounts: ReadonlySet<string> = new Set(
  'ro nosuid nodev noexec noatime nodiratime relatime strictatime'.split(' '),
);

const propagations = /^r?(shared|slave|private|unbindable)$/;

/** CRI mounts one and the same filesystem of the host there for all containers of a pod; the guest has one for them, too. */
function podShm(mount: Mount, at: string): Mount {
  const options = translateMountOptions(mount.options ?? [], `${at}.options`);
  return { ...mount, type: 'bind', source: `${guestPodDirectory}/shm`, options };
}

/** A kernel without SELinux refuses mount options with a context. */
function withoutSelinux(options: readonly string[], path: string, warnings: string[]): readonly string[] {
  const contexts = options.filter((option) => /^(fs|def|root)?context=/.test(option));
  if (contexts.length === 0) return options;
  warnings.push(`${path}.options: ${contexts.join(',')} is not applied: SELinux is not active in the guest`);
  return options.filter((option) => !contexts.includes(option));
}
