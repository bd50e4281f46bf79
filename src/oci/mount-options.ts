/**
 * The options of a mount whose filesystem is made in the guest, in the words that crun 1.8 knows.
 *
 * runtime-spec, config.md "Linux mount options" has the list. crun 1.8 knows most of them, hands what it does not know
 * to the filesystem as its own (`size=1m`), and has three gaps that are closed here: it never takes a flag back
 * (`ro,rw` is read-only with it), it mistakes some recursive options, and it does not know the newest ones.
 */
import { KilnError } from '../errors.ts';

/**
 * Filesystems that need nothing of the host: what is in them is memory's or the guest's kernel's. crun mounts cgroup2
 * for `cgroup` where there is no v1.
 */
export const virtualFilesystems: ReadonlySet<string> = new Set([
  ...['proc', 'sysfs', 'tmpfs', 'ramfs', 'devpts', 'mqueue', 'cgroup', 'cgroup2'],
  ...['bpf', 'debugfs', 'tracefs', 'securityfs'],
]);

/** Options that take a flag back, by the flag. The last one that is given wins, mount(8). */
const opposites: Readonly<Record<string, string>> = {
  rw: 'ro',
  suid: 'nosuid',
  dev: 'nodev',
  exec: 'noexec',
  async: 'sync',
  atime: 'noatime',
  diratime: 'nodiratime',
  norelatime: 'relatime',
  nostrictatime: 'strictatime',
  nomand: 'mand',
};

/** They ask for what is so anyway: nothing is written back late, as nothing is on a disk, and errors are in the log. */
const withoutEffect = new Set(['loud', 'silent', 'noiversion', 'nolazytime', 'lazytime', 'symfollow']);

const refused: Readonly<Record<string, string>> = {
  nosymfollow: 'crun in the guest cannot forbid symbolic links',
  iversion: 'filesystems of memory have no inode versions',
  idmap: 'idmapped mounts are not supported yet',
  ridmap: 'idmapped mounts are not supported yet',
};

/** Recursive forms of the options above; `rbind`, `rshared`, `rslave`, `rprivate` and `runbindable` are none of them. */
const recursive = new Map(
  [
    ...['ro', 'nosuid', 'nodev', 'noexec', 'sync', 'dirsync', 'noatime', 'nodiratime', 'relatime', 'strictatime'],
    ...['mand', 'nosymfollow', 'symfollow', ...Object.keys(opposites)],
  ].map((option) => [`r${option}`, option]),
);

/** All that can be asked for, in the order of runtime-spec's features.md. What is not in it goes to the filesystem. */
export const mountOptions: readonly string[] = [
  ...['bind', 'rbind', 'private', 'rprivate', 'slave', 'rslave', 'unbindable', 'runbindable', 'remount', 'defaults'],
  ...['ro', 'nosuid', 'nodev', 'noexec', 'sync', 'dirsync', 'noatime', 'nodiratime', 'relatime', 'strictatime', 'mand'],
  ...Object.keys(opposites),
  ...withoutEffect,
  ...recursive.keys(),
  'tmpcopyup',
]
  .filter((option) => !Object.hasOwn(refused, recursive.get(option) ?? option))
  .sort();

/**
 * @param path the list's JSON path
 * @throws KilnError unimplemented, naming the option
 */
export function translateMountOptions(options: readonly string[], path: string): readonly string[] {
  const result: string[] = [];
  for (const [index, given] of options.entries()) {
    // There is nothing below a filesystem that has just been mounted.
    const option = recursive.get(given) ?? given;
    const reason = Object.hasOwn(refused, option) ? refused[option] : undefined;
    if (reason !== undefined) throw new KilnError('unimplemented', `${path}[${index}]: ${given}: ${reason}`);
    if (withoutEffect.has(option)) continue;
    const undone = Object.hasOwn(opposites, option) ? opposites[option] : undefined;
    if (undone === undefined) result.push(option);
    else while (result.includes(undone)) result.splice(result.indexOf(undone), 1);
  }
  return result;
}
