import { type FSWatcher, watch } from 'node:fs';
import path from 'node:path';
import { KilnError } from '../../errors.ts';
import { describeExit, type HelperProcess, startHelper } from '../../host/helper-process.ts';
import { abortable } from '../abortable.ts';
import { requireSocketPath } from '../unix-socket.ts';

/** The guest's own CID. Each VM has a backend process of its own, so the number need not differ between VMs. */
const guestCid = 3;

/** How long the backend may take to make its socket: milliseconds in fact, so this only bounds a wrong program. */
const startLimitMs = 30_000;

export interface VsockBackendOptions {
  /** The vhost-device-vsock program. */
  readonly program: string;
  readonly directory: string;
  /** Hybrid vsock path; see hybrid-vsock.ts. */
  readonly udsPath: string;
}

/**
 * Starts `vhost-device-vsock`, which gives QEMU a vsock device whose other end is Unix sockets, so that no kernel
 * module is needed. Resolves with the process and its vhost-user socket once that socket exists.
 * Throws `failed-precondition` when the program cannot be run, `internal` with its last words when it ends at once.
 */
export async function startVsockBackend(
  options: VsockBackendOptions,
  signal: AbortSignal,
): Promise<{ process: HelperProcess; socket: string }> {
  const socket = path.join(options.directory, 'vu.sock');
  requireSocketPath(socket);
  signal.throwIfAborted();
  await using stack = new AsyncDisposableStack();
  const { promise: created, resolve, reject } = Promise.withResolvers<void>();
  created.catch(() => {});
  // The backend says nothing when it is ready; that it has bound its socket is the event.
  const watcher = stack.adopt(watchDirectory(options.directory), (it) => it.close());
  watcher.on('error', reject);
  watcher.on('change', (_event, name) => {
    if (name === path.basename(socket)) resolve();
  });
  const process = await startHelper({
    program: options.program,
    args: ['--guest-cid', String(guestCid), '--socket', socket, '--uds-path', options.udsPath],
    directory: options.directory,
    logName: 'vsock.log',
    title: 'the vsock backend',
    hint: 'run `npm run setup`, or install the package vhost-device-vsock',
  });
  try {
    const ended = process.exited.then((exit) => {
      throw new KilnError('internal', `the vsock backend ended at start ${describeExit(exit)}: ${process.lastWords()}`);
    });
    const limit = AbortSignal.timeout(startLimitMs);
    await abortable(Promise.race([created, ended]), AbortSignal.any([signal, limit])).catch((error: unknown) => {
      if (signal.aborted || !limit.aborted) throw error;
      throw new KilnError(
        'deadline-exceeded',
        `the vsock backend "${options.program}" made no socket within ${startLimitMs / 1000} s: ${process.lastWords()}`,
      );
    });
    return { process, socket };
  } catch (error) {
    await process.kill();
    throw error;
  }
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
