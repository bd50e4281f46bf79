/**
 * IPC, UTS and PID namespaces, namespaces(7). A namespace that a file is bound to lives without a process in it, except for
 * a PID namespace, which is dead when its first process has ended.
 */
import { closeSync, openSync } from 'node:fs';
import { check, declare } from './libc.ts';

/** linux/sched.h. */
const flags = { uts: 0x04000000, ipc: 0x08000000, pid: 0x20000000 } as const;

export type NamespaceKind = keyof typeof flags;

const cSetns = declare<[fd: number, nstype: number]>('int setns(int fd, int nstype)');
const cUnshare = declare<[flags: number]>('int unshare(int flags)');
const cSetdomainname = declare<[name: string, length: number]>('int setdomainname(const char *name, size_t len)');

/**
 * Does the action with this thread in new namespaces of these kinds, and in the ones it was in before afterwards; nothing may
 * be awaited in between. Meanwhile `/proc/thread-self/ns/ipc` and `…/uts` are the new ones. A thread stays in its PID
 * namespace: the first child that it makes is the first process of the new one, pid_namespaces(7).
 *
 * @throws SysError EPERM; what the action throws
 */
export function inNewNamespaces<T>(kinds: readonly NamespaceKind[], action: () => T): T {
  const own = kinds.map((kind) => ({ kind, fd: openSync(`/proc/thread-self/ns/${kind}`, 'r') }));
  try {
    const all = kinds.reduce((sum, kind) => sum | flags[kind], 0);
    check(cUnshare(all), 'unshare', kinds.join());
    try {
      return action();
    } finally {
      for (const { kind, fd } of own) check(cSetns(fd, flags[kind]), 'setns', kind);
    }
  } finally {
    for (const { fd } of own) closeSync(fd);
  }
}

/** setdomainname(2), of this thread's UTS namespace. @throws SysError */
export function setdomainname(name: string): void {
  check(cSetdomainname(name, Buffer.byteLength(name)), 'setdomainname', name);
}
