import { KilnError } from '../errors.ts';
import { isBind, translateBind } from './binds.ts';
import type { Translation } from './field-rules.ts';
import { translateMountOptions } from './mount-options.ts';
import { guestPodDirectory } from './pod.ts';
import type { Mount } from './spec.ts';

/**
 * Filesystems that need nothing of the host: what is in them is memory's or the guest's kernel's. crun mounts cgroup2
 * for `cgroup` where there is no v1.
 */
const virtual = new Set([
  ...['proc', 'sysfs', 'tmpfs', 'ramfs', 'devpts', 'mqueue', 'cgroup', 'cgroup2'],
  ...['bpf', 'debugfs', 'tracefs', 'securityfs'],
]);

/**
 * mounts, in their order: virtual filesystems are mounted by crun in the guest, and bind mounts from the host's volumes
 * there (binds.ts).
 *
 * @throws KilnError unimplemented, naming the JSON path and the destination
 */
export function translateMounts(mounts: readonly Mount[], path: string, translation: Translation): readonly Mount[] {
  return mounts.map((mount, index) => {
    const at = `${path}[${index}]`;
    const { destination, type = '', source = '' } = mount;
    for (const mappings of ['uidMappings', 'gidMappings']) {
      if (!(mappings in mount)) continue;
      throw new KilnError('unimplemented', `${at}.${mappings}: idmapped mounts are not supported yet: ${destination}`);
    }
    if (!isBind(mount) && !virtual.has(type)) {
      throw new KilnError('unimplemented', `${at}: mounts of type "${type}" are not supported: ${destination}`, {
        hint: `its source is ${source === '' ? 'empty' : source}`,
      });
    }
    const { options = [], ...rest } = mount;
    const withOptions = { ...rest, options: withoutSelinux(options, at, translation.warnings) };
    if (isBind(mount) && translation.pod !== undefined && destination === '/dev/shm') return podShm(withOptions, at);
    if (isBind(mount)) return translateBind(withOptions, at, translation);
    if (mount.options === undefined) return mount;
    return { ...withOptions, options: translateMountOptions(withOptions.options, `${at}.options`) };
  });
}

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
