import { KilnError } from '../errors.ts';
import type { Translation } from './field-rules.ts';
import { translateMountOptions } from './mount-options.ts';
import type { Mount } from './spec.ts';

/**
 * Filesystems that need nothing of the host: what is in them is memory's or the guest's kernel's. crun mounts cgroup2
 * for `cgroup` where there is no v1.
 */
const virtual = new Set([
  ...['proc', 'sysfs', 'tmpfs', 'ramfs', 'devpts', 'mqueue', 'cgroup', 'cgroup2'],
  ...['bpf', 'debugfs', 'tracefs', 'securityfs'],
]);

const bindOptions = new Set(['bind', 'rbind']);

/**
 * mounts: virtual filesystems are mounted by crun in the guest; whatever has its source on the host is not there.
 *
 * @throws KilnError unimplemented, naming the JSON path and the destination
 */
export function translateMounts(mounts: readonly Mount[], path: string, { warnings }: Translation): readonly Mount[] {
  return mounts.map((mount, index) => {
    const at = `${path}[${index}]`;
    const { destination, type = '', source = '', options = [] } = mount;
    const isBind = type === 'bind' || type === 'rbind' || options.some((option) => bindOptions.has(option));
    if (isBind || (!virtual.has(type) && source.startsWith('/'))) {
      throw new KilnError('unimplemented', `${at}: bind mounts are not supported yet: ${destination}`, {
        hint: `its source is ${source === '' ? 'empty' : source}`,
      });
    }
    if (!virtual.has(type)) {
      throw new KilnError('unimplemented', `${at}: mounts of type "${type}" are not supported: ${destination}`);
    }
    for (const mappings of ['uidMappings', 'gidMappings']) {
      if (!(mappings in mount)) continue;
      throw new KilnError('unimplemented', `${at}.${mappings}: idmapped mounts are not supported yet: ${destination}`);
    }
    if (mount.options === undefined) return mount;
    const translated = translateMountOptions(mount.options, `${at}.options`);
    return { ...mount, options: withoutSelinux(translated, at, warnings) };
  });
}

/** A kernel without SELinux refuses mount options with a context. */
function withoutSelinux(options: readonly string[], path: string, warnings: string[]): readonly string[] {
  const contexts = options.filter((option) => /^(fs|def|root)?context=/.test(option));
  if (contexts.length === 0) return options;
  warnings.push(`${path}.options: ${contexts.join(',')} is not applied: SELinux is not active in the guest`);
  return options.filter((option) => !contexts.includes(option));
}
