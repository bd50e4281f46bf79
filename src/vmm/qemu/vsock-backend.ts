import { watch } from 'node:fs';
import path from 'node:path';
import { KilnError } from '../../errors.ts';
import { type HelperProcess, startHelper } from '../../host/helper-process.ts';
import { abortable } from '../hybrid-vsock.ts';

/** The guest's own CID. Each VM has a backend process of its own, so the number need not differ between VMs. */
const guestCid = 3;

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
 */
export async function startVsockBackend(
  options: VsockBackendOptions,
  signal: AbortSignal,
): Promise<{ process: HelperProcess; socket: string }> {
  const socket = path.join(options.directory, 'vu.sock');
  const created = Promise.withResolvers<void>();
  // The backend says nothing when it is ready; that it has bound its socket is the event.
  const watcher = watch(options.directory, (_event, name) => {
    if (name === path.basename(socket)) created.resolve();
  });
  watcher.on('error', created.reject);
  try {
    const process = await startHelper({
      program: options.program,
      args: ['--guest-cid', String(guestCid), '--socket', socket, '--uds-path', options.udsPath],
      logFile: path.join(options.directory, 'vsock.log'),
      title: 'the vsock backend',
      hint: 'run `npm run setup`, or install the package vhost-device-vsock',
    });
    try {
      const ended = process.exited.then(({ code, signal: by }) => {
        throw new KilnError(
          'internal',
          `the vsock backend ended at start (${by ?? `exit code ${code}`}): ${process.lastWords()}`,
        );
      });
      await abortable(Promise.race([created.promise, ended]), signal);
      return { process, socket };
    } catch (error) {
      await process.kill();
      throw error;
    }
  } finally {
    watcher.close();
  }
}
