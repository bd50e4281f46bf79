import { type FSWatcher, readFileSync, watch } from 'node:fs';
import { rm } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { KilnError } from '../../errors.ts';
import { describeExit, type HelperProcess, startHelper } from '../../host/helper-process.ts';
import { requireSocketPath } from '../../host/unix-socket.ts';
import { abortable } from '../abortable.ts';

/** The guest's own CID. Each VM has a backend process of its own, so the number need not differ between VMs. */
const guestCid = 3;

/** In the sandbox's directory: what the backend makes and QEMU connects to, and what the backend says. */
export const vsockSocketName = 'vu.sock';
export const vsockLogName = 'vsock.log';

/** How long the backend may take to make its socket: milliseconds in fact, so this only bounds a wrong program. */
const startLimitMs = 30_000;

export interface VsockBackendOptions {
  /** The vhost-device-vsock program. */
  readonly program: string;
  readonly directory: string;
  /** Hybrid vsock path; see hybrid-vsock.ts. */
  readonly udsPath: string;
}

/** A running backend. Disposing ends it and removes its sockets. */
export interface VsockBackend extends AsyncDisposable {
  readonly process: HelperProcess;
  /** Where QEMU connects (vhost-user). */
  readonly socket: string;
}

/**
 * Starts `vhost-device-vsock`, which gives QEMU a vsock device whose other end is Unix sockets, so that no kernel
 * module is needed. Resolves once its vhost-user socket exists.
 * Throws `failed-precondition` when the program cannot be run, `internal` with its last words when it ends at once.
 */
export async function startVsockBackend(options: VsockBackendOptions, signal: AbortSignal): Promise<VsockBackend> {
  const { program, directory, udsPath } = options;
  const socket = path.join(directory, vsockSocketName);
  requireSocketPath(socket);
  signal.throwIfAborted();
  await using stack = new AsyncDisposableStack();
  using created = awaitFile(socket);
  // Registered before the process, so removed after its end: a killed process leaves its sockets.
  for (const file of [socket, udsPath]) stack.defer(() => rm(file, { force: true }));
  const process = stack.use(
    await startHelper({
      program,
      args: ['--guest-cid', String(guestCid), '--socket', socket, '--uds-path', udsPath],
      directory,
      logName: vsockLogName,
      title: 'the vsock backend',
      hint: 'run `npm run setup`, or install the package vhost-device-vsock',
    }),
  );
  const ended = process.exited.then((exit) => {
    throw new KilnError('internal', `the vsock backend ended at start ${describeExit(exit)}: ${process.lastWords()}`);
  });
  const limit = AbortSignal.timeout(startLimitMs);
  try {
    const either = AbortSignal.any([signal, limit]);
    await abortable(Promise.race([created.promise, ended]), either);
    await Promise.race([untilListening(socket, either), ended]);
  } catch (error) {
    if (signal.aborted || !limit.aborted) throw error;
    const words = `made no socket within ${startLimitMs / 1000} s: ${process.lastWords()}`;
    throw new KilnError('deadline-exceeded', `the vsock backend "${program}" ${words}`);
  }
  const resources = stack.move();
  return { process, socket, [Symbol.asyncDispose]: () => resources.disposeAsync() };
}

/**
 * Resolves when somebody listens on a Unix socket whose file is there. Between bind(2), which makes the file, and
 * listen(2) lie microseconds, or more where the backend was just then put aside; of the second there is no event, and
 * to try it out would take the backend's one connection. proc(5), /proc/net/unix: the flag is __SO_ACCEPTCON.
 */
async function untilListening(socket: string, signal: AbortSignal): Promise<void> {
  const accepts = (line: string) => line.endsWith(` ${socket}`) && line.split(' ')[3] === '00010000';
  while (!readFileSync('/proc/net/unix', 'utf8').split('\n').some(accepts)) await delay(1, undefined, { signal });
}

/** Resolves when the file is made. The backend says nothing when it is ready; that it has bound its socket is the event. */
function awaitFile(file: string): Disposable & { readonly promise: Promise<void> } {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  promise.catch(() => {});
  const watcher = watchDirectory(path.dirname(file));
  watcher.on('error', reject);
  watcher.on('change', (_event, name) => {
    if (name === path.basename(file)) resolve();
  });
  return { promise, [Symbol.dispose]: () => watcher.close() };
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
