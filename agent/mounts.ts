/**
 * The mounts of a container's root filesystem: done in the order of the host's list, undone in reverse.
 *
 * The host decides what is mounted where; this file only splits options into mount(2)'s flags and its data, as mount(8)
 * does.
 */
import { closeSync, mkdirSync, openSync, rmdirSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import type { Mount } from '../gen/kiln/agent/v1/agent.ts';
import { SysError } from '../src/sys/error.ts';
import * as sys from '../src/sys/mount.ts';
import { syncfs } from '../src/sys/sync.ts';
import { countUse, findDisk, forgetSize } from './disks.ts';
import { AgentError } from './errors.ts';
import type { Undo } from './undo.ts';

/** Options of mount(8) that are flags of mount(2): what each sets, or clears. */
const flagOptions: Record<string, { set?: number; clear?: number }> = {
  defaults: {},
  ro: { set: sys.MS_RDONLY },
  rw: { clear: sys.MS_RDONLY },
  nosuid: { set: sys.MS_NOSUID },
  suid: { clear: sys.MS_NOSUID },
  nodev: { set: sys.MS_NODEV },
  dev: { clear: sys.MS_NODEV },
  noexec: { set: sys.MS_NOEXEC },
  exec: { clear: sys.MS_NOEXEC },
  sync: { set: sys.MS_SYNCHRONOUS },
  async: { clear: sys.MS_SYNCHRONOUS },
  dirsync: { set: sys.MS_DIRSYNC },
  noatime: { set: sys.MS_NOATIME },
  atime: { clear: sys.MS_NOATIME },
  nodiratime: { set: sys.MS_NODIRATIME },
  diratime: { clear: sys.MS_NODIRATIME },
  relatime: { set: sys.MS_RELATIME },
  norelatime: { clear: sys.MS_RELATIME },
  strictatime: { set: sys.MS_STRICTATIME },
  bind: { set: sys.MS_BIND },
  rbind: { set: sys.MS_BIND | sys.MS_REC },
};

/** Options as in mount(8), split as mount(2) takes them: later flags win over earlier ones, data keeps its order. */
export function parseOptions(options: readonly string[]): { flags: number; data: string | null } {
  let flags = 0;
  const data: string[] = [];
  for (const option of options) {
    const flag = Object.hasOwn(flagOptions, option) ? flagOptions[option] : undefined;
    if (flag === undefined) data.push(option);
    else flags = (flags | (flag.set ?? 0)) & ~(flag.clear ?? 0);
  }
  return { flags, data: data.length === 0 ? null : data.join(',') };
}

/**
 * Does one mount; what undoes it goes on `undo`, so that a failure later takes it back.
 *
 * @throws AgentError naming the target
 */
export function mountOne(mount: Mount, undo: Undo): void {
  const { target } = mount;
  if (resolve(target) !== target)
    throw new AgentError('invalid-argument', `mount target "${target}" is not an absolute path`);
  const source = sourceOf(mount);
  makeDirectories(target, undo);
  const { flags, data } = parseOptions(mount.options);
  try {
    sys.mount(source, target, mount.type, flags, data);
  } catch (error) {
    const options = mount.options.join(',');
    throw new AgentError('internal', `cannot mount ${mount.type} ${source} at ${target} (${options}): ${text(error)}`, {
      cause: error,
    });
  }
  if (mount.source?.$case === 'disk') countUse(mount.source.value, undo);
  undo.deferWithin(() => detach(target));
  if ((flags & (sys.MS_RDONLY | sys.MS_BIND)) === 0 && source.startsWith('/dev/')) undo.defer(() => settle(target));
  for (const directory of mount.directories) {
    const path = resolve(target, directory);
    if (!path.startsWith(`${target}/`)) {
      throw new AgentError('invalid-argument', `directory "${directory}" is not inside the mount at ${target}`);
    }
    mkdirSync(path, { recursive: true, mode: 0o755 });
  }
}

/**
 * Writes what the filesystems of these mounts hold in memory to their disks.
 *
 * @throws SysError
 */
export async function flushAll(mounts: readonly Mount[]): Promise<void> {
  for (const { target, options } of mounts.toReversed()) {
    if ((parseOptions(options).flags & sys.MS_RDONLY) === 0) await flush(target);
  }
}

function sourceOf({ source, target }: Mount): string {
  switch (source?.$case) {
    case 'disk':
      forgetSize(source.value);
      return findDisk(source.value);
    case 'device':
      return source.value;
    case undefined:
      throw new AgentError('invalid-argument', `the mount at ${target} has no source`);
  }
}

/** mkdir -p; `undo` removes what this has made and nobody else uses, and only that. */
function makeDirectories(path: string, undo: Undo): void {
  const first = mkdirSync(path, { recursive: true, mode: 0o755 });
  if (first === undefined) return;
  undo.deferWithin(() => {
    for (let made = path; ; made = dirname(made)) {
      try {
        rmdirSync(made);
      } catch (error) {
        // Another container of the pod has its own below.
        if ((error as NodeJS.ErrnoException).code === 'ENOTEMPTY') return;
        throw error;
      }
      if (made === first) return;
    }
  });
}

/**
 * Of a writable disk: everything is on the disk and its filesystem is marked clean when this returns, even if the kernel still
 * holds the filesystem: a container's mount namespace is taken apart a little after its last process.
 */
async function settle(target: string): Promise<void> {
  await flush(target);
  // A remount to read-only acts on the filesystem itself, in every mount namespace. It is refused while a file is open
  // for writing, which flush has made harmless.
  await unless('EBUSY', () => sys.mountAsync(null, target, null, sys.MS_REMOUNT | sys.MS_RDONLY, null));
}

async function detach(target: string): Promise<void> {
  const busy = await unless('EBUSY', () => sys.umount2Async(target, sys.UMOUNT_NOFOLLOW));
  // Its content is safe; detached, it goes as soon as its last user does.
  if (busy) sys.umount2(target, sys.MNT_DETACH | sys.UMOUNT_NOFOLLOW);
}

/** Writes what the filesystem at `target` holds in memory to where it is kept. @throws SysError */
export async function flush(target: string): Promise<void> {
  const fd = openSync(target, 'r');
  try {
    await syncfs(fd);
  } finally {
    closeSync(fd);
  }
}

/** Does `action`. @returns true when it failed with the error `code` */
async function unless(code: string, action: () => Promise<void>): Promise<boolean> {
  try {
    await action();
    return false;
  } catch (error) {
    if (error instanceof SysError && error.code === code) return true;
    throw error;
  }
}

function text(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
