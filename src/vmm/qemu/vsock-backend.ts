import { rm } from 'node:fs/promises';
import path from 'node:path';
import { KilnError } from '../../errors.ts';
import type { ControlGroup } from '../../host/control-group.ts';
import { describeExit, type HelperProcess, startHelper } from '../../host/helper-process.ts';
import { TimeLimit } from '../../host/time-limit.ts';
import { requireSocketPath } from '../../host/unix-socket.ts';
import { AwaitedSocket } from '../socket-file.ts';

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
  readonly controlGroup?: ControlGroup | undefined;
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
  const { program, directory, udsPath, controlGroup } = options;
  const socket = path.join(directory, vsockSocketName);
  requireSocketPath(socket);
  signal.throwIfAborted();
  await using stack = new AsyncDisposableStack();
  // The backend says nothing when it is ready; that its socket is served is the event.
  using awaited = new AwaitedSocket(socket);
  // Registered before the process, so removed after its end: a killed process leaves its sockets.
  for (const file of [socket, udsPath]) stack.defer(() => rm(file, { force: true }));
  const process = stack.use(
    await startHelper({
      program,
      args: ['--guest-cid', String(guestCid), '--socket', socket, '--uds-path', udsPath],
      directory,
      logName: vsockLogName,
      controlGroup,
      title: 'the vsock backend',
      hint: 'run `npm run setup`, or install the package vhost-device-vsock',
    }),
  );
  const ended = process.exited.then((exit) => {
    throw new KilnError('internal', `the vsock backend ended at start ${describeExit(exit)}: ${process.lastWords()}`);
  });
  using limit = new TimeLimit(startLimitMs, signal);
  try {
    await awaited.listening(limit.signal, ended);
  } catch (error) {
    if (!limit.expired) throw error;
    const words = `made no socket within ${startLimitMs / 1000} s: ${process.lastWords()}`;
    throw new KilnError('deadline-exceeded', `the vsock backend "${program}" ${words}`);
  }
  const resources = stack.move();
  return { process, socket, [Symbol.asyncDispose]: () => resources.disposeAsync() };
}
