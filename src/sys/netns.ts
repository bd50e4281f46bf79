/**
 * Network namespaces, network_namespaces(7), as things that are held by a descriptor: one that has no name and no process
 * in it lives as long as somebody has it open.
 *
 * A thread is in one namespace, and what it makes then (sockets, interfaces, child processes) is in that one. So the
 * JavaScript thread goes there, does one thing without waiting for anything, and comes back.
 */
import { closeSync, openSync, readlinkSync } from 'node:fs';
import { check, declare } from './libc.ts';

/** linux/sched.h. */
const CLONE_NEWNET = 0x40000000;

/** This thread's own; proc(5). */
const ownNamespace = '/proc/thread-self/ns/net';

const cSetns = declare<[fd: number, nstype: number]>('int setns(int fd, int nstype)');
const cUnshare = declare<[flags: number]>('int unshare(int flags)');

export class NetworkNamespace implements Disposable {
  readonly #fd: number;
  #closed = false;

  private constructor(fd: number) {
    this.#fd = fd;
  }

  /** unshare(2): a new one, in which there is a loopback interface that is down. @throws SysError EPERM */
  static create(): NetworkNamespace {
    return comingBack(() => {
      check(cUnshare(CLONE_NEWNET), 'unshare', 'CLONE_NEWNET');
      return NetworkNamespace.open(ownNamespace);
    });
  }

  /** The one that a file stands for: `/proc/<pid>/ns/net`, or a mount of that. @throws a system error; EINVAL at `run` */
  static open(path: string): NetworkNamespace {
    return new NetworkNamespace(openSync(path, 'r'));
  }

  /** Close-on-exec; this object's to close. */
  get fd(): number {
    return this.#fd;
  }

  /** What names it on this host: "net:[4026532008]". namespaces(7) */
  get identity(): string {
    return readlinkSync(`/proc/self/fd/${this.#fd}`);
  }

  /**
   * Does the action with this thread in the namespace: setns(2), there and back. What the action leaves to be done later, after
   * an `await` or in a callback, is done outside.
   *
   * @throws SysError EINVAL when the file was no network namespace's; what the action throws
   */
  run<T>(action: () => T): T {
    return comingBack(() => {
      check(cSetns(this.#fd, CLONE_NEWNET), 'setns', `fd ${this.#fd}`);
      return action();
    });
  }

  /** Safe to call twice. */
  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    closeSync(this.#fd);
  }
}

/** Does the action, and has this thread in the namespace that it was in before. */
function comingBack<T>(action: () => T): T {
  const before = openSync(ownNamespace, 'r');
  try {
    return action();
  } finally {
    try {
      check(cSetns(before, CLONE_NEWNET), 'setns', ownNamespace);
    } finally {
      closeSync(before);
    }
  }
}
