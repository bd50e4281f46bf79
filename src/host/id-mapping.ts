import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, openSync, writeFileSync } from 'node:fs';
import { KilnError } from '../errors.ts';

/** An owner of files, and as whom a mount shows it. */
export interface IdMapping {
  readonly uid: { readonly from: number; readonly to: number };
  readonly gid: { readonly from: number; readonly to: number };
}

/**
 * Calls `use` with the descriptor of a user namespace that maps the one owner, for MOUNT_ATTR_IDMAP. A user namespace
 * cannot be made without a process in it, so one is started for that moment.
 *
 * @throws KilnError failed-precondition where the host lets nobody make a user namespace
 */
export async function withIdMapping<T>({ uid, gid }: IdMapping, use: (userns: number) => T): Promise<T> {
  // It has made the namespace when it writes, and ends with its stdin, so with us at the latest.
  const holder = spawn('unshare', ['--user', 'sh', '-c', 'echo && read -r _'], {
    stdio: ['pipe', 'pipe', 'ignore'],
    cwd: '/',
  });
  try {
    await written(holder);
    const proc = `/proc/${holder.pid}`;
    writeFileSync(`${proc}/uid_map`, `${uid.from} ${uid.to} 1`);
    writeFileSync(`${proc}/gid_map`, `${gid.from} ${gid.to} 1`);
    const userns = openSync(`${proc}/ns/user`, 'r');
    try {
      return use(userns);
    } finally {
      closeSync(userns);
    }
  } finally {
    holder.kill('SIGKILL');
  }
}

async function written(holder: ChildProcess): Promise<void> {
  const ended = once(holder, 'exit').then(([code]) => {
    throw new Error(`unshare --user ended (exit code ${code})`);
  });
  ended.catch(() => {});
  try {
    await Promise.race([once(holder.stdout as NodeJS.EventEmitter, 'data'), ended]);
  } catch (cause) {
    throw new KilnError('failed-precondition', `cannot make a user namespace: ${(cause as Error).message}`, {
      hint: 'allow user namespaces (sysctl user.max_user_namespaces)',
      cause,
    });
  }
}
