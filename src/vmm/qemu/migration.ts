import { once } from 'node:events';
import { createWriteStream } from 'node:fs';
import net from 'node:net';
import { pipeline } from 'node:stream/promises';
import { KilnError } from '../../errors.ts';
import { abortable } from '../../host/abortable.ts';
import type { QmpClient } from './qmp.ts';

/*
 * A saved VM is what QEMU's migration sends, without the memory, which is in a file of its own: the capability
 * x-ignore-shared leaves out what is mapped shared, as the one that is saved has it. For QEMU a clone is the destination
 * of a migration whose source said no more. docs/devel/migration.rst, qapi/migration.json.
 */

/** Writes the state of a VM to a new file; the VM never runs again. @param socketPath a free place for a Unix socket */
export async function saveState(qmp: QmpClient, file: string, socketPath: string, signal: AbortSignal): Promise<void> {
  const server = net.createServer().listen(socketPath);
  const connected = once(server, 'connection') as Promise<[net.Socket]>;
  connected.catch(() => {});
  try {
    await once(server, 'listening');
    await setCapabilities(qmp);
    await qmp.execute('stop');
    const migrated = migrationEnds(qmp, 'save the VM', signal);
    migrated.catch(() => {});
    await qmp.execute('migrate', { uri: `unix:${socketPath}` });
    const [socket] = await abortable(Promise.race([connected, migrated.then(() => connected)]), signal);
    await pipeline(socket, createWriteStream(file, { flags: 'wx', mode: 0o600 }), { signal });
    await migrated;
  } catch (error) {
    // Not the pipeline's own error.
    signal.throwIfAborted();
    throw error;
  } finally {
    server.close();
    // QEMU may be there although nobody read what it sends.
    connected.then(([socket]) => socket.destroy()).catch(() => {});
  }
}

/** Gives a QEMU that waits for it a saved state, and lets the VM run. @param fd of the state's file, in QEMU */
export async function loadState(qmp: QmpClient, fd: number, signal: AbortSignal): Promise<void> {
  const loaded = migrationEnds(qmp, 'restore the VM', signal, 'QEMU ends when it fails');
  loaded.catch(() => {});
  await Promise.all([
    setCapabilities(qmp),
    // Of network cards that have a MAC which all VMs have.
    qmp.execute('migrate-set-parameters', { 'announce-rounds': 0 }),
  ]);
  // Only now: by its answers QEMU has also seen who has connected with its serial ports, as the guest's state is to find it.
  await qmp.execute('migrate-incoming', { uri: `fd:${fd}` });
  await loaded;
  // As it was saved: stopped.
  await qmp.execute('cont');
}

async function setCapabilities(qmp: QmpClient): Promise<void> {
  const capabilities = ['events', 'x-ignore-shared'].map((capability) => ({ capability, state: true }));
  await qmp.execute('migrate-set-capabilities', { capabilities });
}

/**
 * Resolves when the migration has completed. A destination that fails says so, and ends a moment later with words on its
 * stderr: then that end is what rejects this, with `unavailable`.
 */
async function migrationEnds(
  qmp: QmpClient,
  action: string,
  signal: AbortSignal,
  after?: 'QEMU ends when it fails',
): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  const onEvent = (name: string, { status }: Record<string, unknown>) => {
    if (name !== 'MIGRATION') return;
    if (status === 'completed') resolve();
    else if (status === 'failed' && after === undefined) reject(new KilnError('internal', `QEMU could not ${action}`));
  };
  const onClose = () => reject(new KilnError('unavailable', `QEMU ended before it could ${action}`));
  qmp.on('event', onEvent);
  qmp.on('close', onClose);
  try {
    await abortable(promise, signal);
  } finally {
    qmp.off('event', onEvent);
    qmp.off('close', onClose);
  }
}
