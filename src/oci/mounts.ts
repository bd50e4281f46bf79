import { KilnError } from '../errors.ts';
import type { Translation } from './field-rules.ts';
import type { Mount } from './spec.ts';

/** Filesystems that need nothing of the host. crun mounts cgroup2 for `cgroup` where there is no v1. */
const virtual = new Set(['proc', 'sysfs', 'tmpfs', 'devpts', 'mqueue', 'cgroup', 'cgroup2']);

const bindOptions = new Set(['bind', 'rbind']);
const idmapOptions = new Set(['idmap', 'ridmap']);

/**
 * mounts: virtual filesystems are mounted by crun in the guest; whatever has its source on the host is not there.
 *
 * @throws KilnError unimplemented, naming the destination
 */
export function translateMounts(mounts: readonly Mount[], path: string, { warnings }: Translation): readonly Mount[] {
  return mounts.map((mount, index) => {
    const { destination, type = '', source = '', options = [] } = mount;
    const isBind = type === 'bind' || type === 'rbind' || options.some((option) => bindOptions.has(option));
    if (isBind || (!virtual.has(type) && source.startsWith('/'))) {
      throw new KilnError('unimplemented', `bind mounts are not supported yet: ${destination}`, {
        hint: `its source is ${source === '' ? 'empty' : source}`,
      });
    }
    if (!virtual.has(type)) {
      throw new KilnError('unimplemented', `mounts of type "${type}" are not supported: ${destination}`);
    }
    if ('uidMappings' in mount || 'gidMappings' in mount || options.some((option) => idmapOptions.has(option))) {
      throw new KilnError('unimplemented', `idmapped mounts are not supported yet: ${destination}`);
    }
    return withoutSelinux(mount, `${path}[${index}]`, warnings);
  });
}

/** A kernel without SELinux refuses mount options with a context. */
function withoutSelinux(mount: Mount, path: string, warnings: string[]): Mount {
  const contexts = mount.options?.filter((option) => /^(fs|def|root)?context=/.test(option)) ?? [];
  if (contexts.length === 0) return mount;
  warnings.push(`${path}.options: ${contexts.join(',')} is not applied: SELinux is not active in the guest`);
  return { ...mount, options: mount.options?.filter((option) => !contexts.includes(option)) };
}
