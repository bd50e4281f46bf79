/**
 * Bind mounts. Their sources are files and directories of the host, which the guest sees as volumes: over 9P, by a number
 * each (docs/volumes.md). What lies in the host's /proc, /sys and /dev is none of these: it tells of the host's kernel,
 * processes and hardware. Where a container's own kernel is what is meant, the guest's takes its place.
 */
import { posix } from 'node:path';
import { KilnError } from '../errors.ts';
import { nodesAlikeEverywhere } from './devices.ts';
import type { Translation } from './field-rules.ts';
import { translateMountOptions } from './mount-options.ts';
import type { Mount } from './spec.ts';

/** A file or directory of the host that is mounted in a container. */
export interface VolumeMount {
  /** Absolute path on the host. */
  readonly source: string;
  /** Absolute path in the container. */
  readonly destination: string;
  /** Nothing can be changed in it: in what is mounted at the source, or in what is mounted below it, too (`rro`). */
  readonly readOnly: 'no' | 'mount' | 'tree';
  /** What is mounted below the source comes along. */
  readonly recursive: boolean;
  /** What the host mounts below the source later comes along, too. */
  readonly follows: boolean;
}

const bindOptions = ['bind', 'rbind'];
const bindTypes = ['bind', 'rbind'];

/** runc and crun take the type or an option for it. */
export function isBind({ type = '', options = [] }: Mount): boolean {
  return bindTypes.includes(type) || options.some((option) => bindOptions.includes(option));
}

/**
 * A bind mount as crun in the guest gets it; what of the host it needs is added to `translation.volumes`.
 *
 * @throws KilnError unimplemented for what cannot be had in the guest
 */
export function translateBind(mount: Mount, at: string, translation: Translation): Mount {
  const { bundle, volumes, volumePath, hasMountsBelow } = translation;
  const { destination, type = '', options = [] } = mount;
  const source = posix.resolve(bundle, mount.source ?? '');
  const recursive = type === 'rbind' || options.includes('rbind');
  const shared = options.find((option) => option === 'shared' || option === 'rshared');
  const others = options.filter((option) => !bindOptions.includes(option));
  const translated = [recursive ? 'rbind' : 'bind', ...translateMountOptions(others, `${at}.options`)];
  const guestSource = guestsOwn(source, at);
  if (guestSource !== undefined) return { ...mount, type: 'bind', source: guestSource, options: translated };
  if (shared !== undefined) {
    throw new KilnError('unimplemented', `${at}.options: ${shared}: mounts in a guest cannot appear on the host`, {
      hint: `use rslave or rprivate for ${destination}`,
    });
  }
  const follows = options.some((option) => option === 'slave' || option === 'rslave');
  const readOnly = readOnlyOf(translated, options);
  const volume = { source, destination, readOnly, recursive, follows };
  volumes.push(volume);
  // The guest has one mount for all, so there `ro` would count for what is mounted below the source, too.
  const isKeptByServer = readOnly === 'mount' && recursive && hasMountsBelow(source);
  const guestOptions = isKeptByServer ? translated.filter((option) => option !== 'ro') : translated;
  return { ...mount, type: 'bind', source: volumePath(volumes.length - 1), options: guestOptions };
}

/** @param translated where the last word about it has been found; @param given where the recursive one still is */
function readOnlyOf(translated: readonly string[], given: readonly string[]): VolumeMount['readOnly'] {
  if (!translated.includes('ro')) return 'no';
  return given.includes('rro') ? 'tree' : 'mount';
}

/**
 * The guest's own path that stands for one of the host; undefined for a path whose files are to be had from the host.
 *
 * @throws KilnError unimplemented for what the guest has nothing for
 */
export function guestsOwn(source: string, at: string): string | undefined {
  if (source === '/sys' || source.startsWith('/sys/')) return source;
  if (source === '/dev/shm' || source === '/dev/mqueue') return source;
  if (source.startsWith('/dev/') && nodesAlikeEverywhere.has(source.slice('/dev/'.length))) return source;
  if (source === '/dev' || source.startsWith('/dev/')) {
    throw new KilnError('unimplemented', `${at}: ${source} is a device of the host, not of the guest`, {
      hint: 'the guest has devices of its own; list the ones that the container needs in linux.devices',
    });
  }
  if (source === '/proc' || source.startsWith('/proc/')) {
    throw new KilnError('unimplemented', `${at}: ${source} tells of the processes of the host, not of the guest`, {
      hint: 'mount a filesystem of type "proc"',
    });
  }
  return undefined;
}
