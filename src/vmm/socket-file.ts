import { type FSWatcher, readFileSync, watch } from 'node:fs';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { KilnError } from '../errors.ts';
import { abortable } from '../host/abortable.ts';
import { socketIsServed } from '../host/unix-socket.ts';

/** A Unix socket that a program is about to make. Watch before the program is started. */
export class AwaitedSocket implements Disposable {
  readonly #socket: string;
  readonly #watcher: FSWatcher;
  readonly #made = Promise.withResolvers<void>();

  /** Throws `resource-exhausted` when there is no inotify watch to be had. */
  constructor(socket: string) {
    this.#socket = socket;
    this.#made.promise.catch(() => {});
    this.#watcher = watchDirectory(path.dirname(socket));
    this.#watcher.on('error', this.#made.reject);
    this.#watcher.on('change', (_event, name) => {
      if (name === path.basename(socket)) this.#made.resolve();
    });
  }

  /** As `listening`, of a program that takes many connections, and may know its socket by another path than ours. */
  async answering(signal: AbortSignal, ended: Promise<never>): Promise<void> {
    await abortable(Promise.race([this.#made.promise, ended]), signal);
    while (!(await Promise.race([socketIsServed(this.#socket), ended]))) await delay(1, undefined, { signal });
  }

  /** Resolves when somebody listens there; rejects with the signal's reason, or with `ended` when that rejects. */
  async listening(signal: AbortSignal, ended: Promise<never>): Promise<void> {
    await abortable(Promise.race([this.#made.promise, ended]), signal);
    await Promise.race([untilListening(this.#socket, signal), ended]);
  }

  [Symbol.dispose](): void {
    this.#watcher.close();
  }
}

/**
 * Resolves when somebody listens on a Unix socket whose file is there. Between bind(2), which makes the file, and
 * listen(2) lie microseconds, or more where the program was just then put aside; of the second there is no event, and
 * to try it out would take the one connection of some. proc(5), /proc/net/unix: the flag is __SO_ACCEPTCON.
 */
async function untilListening(socket: string, signal: AbortSignal): Promise<void> {
  const accepts = (line: string) => line.endsWith(` ${socket}`) && line.split(' ')[3] === '00010000';
  while (!readFileSync('/proc/net/unix', 'utf8').split('\n').some(accepts)) await delay(1, undefined, { signal });
}

function watchDirectory(directory: string): FSWatcher {
  try {
    return watch(directory);
  } catch (cause) {
    // inotify(7): the numbers of instances and watches are limited per user.
    throw new KilnError('resource-exhausted', `cannot watch ${directory}: ${(cause as Error).message}`, {
      hint: 'raise fs.inotify.max_user_instances and fs.inotify.max_user_watches (sysctl)',
      cause,
    });
  }
}
