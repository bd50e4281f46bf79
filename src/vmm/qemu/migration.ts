import { once } from 'node:events';
import { createWriteStream } from 'node:fs';
import net from 'node:net';
import { pipeline } from 'node:stream/promises';
import { KilnError } from '../../errors.ts';
import { abortable } from '../../host/abortable.ts';
import type { QmpClient } from './qmp.ts';

/** The state of a VM that was saved. */
export interface SavedState {
  readonly file: string;
  /** A descriptor of it, here or in QEMU. */
  readonly fd: number;
}

/*
 * A saved VM is what QEMU's migration sends, without the memory, which is in a file of its own: the capability
 * x-ignore-shared leaves out what is mapped shared, as the one that is saved has it. For QEMU a clone is the destination
 * of a migration whose source said no more. docs/devel/migration.rst, qapi/migration.json.
 */

/**
 * Writes the state of a running VM to a new file; the VM never runs again. That it ran when QEMU stopped it for this is
 * part of its state: a clone runs as soon as it has that (migration/global_state.c).
 *
 * @param socketPath a free place for a Unix socket
 */
export async function saveState(qmp: QmpClient, file: string, socketPath: string, signal: AbortSignal): Promise<void> {
  const server = net.createServer().listen(socketPath);
  const connected = once(server, 'connection') as Promise<[net.Socket]>;
  connected.catch(() => {});
  try {
    await once(server, 'listening');
    await setCapabilities(qmp);
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

/**
 * Gives a QEMU that waits for it a saved state. Resolves when the VM runs with it. All commands go out in this turn.
 *
 * @param state its file, and that file's descriptor in QEMU
 * @throws KilnError internal when QEMU refuses a command, or does not let the VM run; unavailable when it ends, as it does
 *   when it cannot read the state
 */
export async function loadState(qmp: QmpClient, state: SavedState, signal: AbortSignal): Promise<void> {
  let running = false;
  const onEvent = (name: string) => {
    running ||= name === 'RESUME';
  };
  qmp.on('event', onEvent);
  try {
    await Promise.all([
      // Said when the VM runs already (migration/migration.c, process_incoming_migration_bh).
      migrationEnds(qmp, 'restore the VM', signal, 'QEMU ends when it fails'),
      setCapabilities(qmp),
      // Of network cards that have a MAC which all VMs have.
      qmp.execute('migrate-set-parameters', { 'announce-rounds': 0 }),
      loadFrom(qmp, state),
    ]);
  } finally {
    qmp.off('event', onEvent);
  }
  if (!running) throw new KilnError('internal', 'QEMU has restored the VM, but does not let it run');
}

/**
 * QEMU takes files by name from 8.2 on, and by descriptor no more in 11. It is told both, and refuses one; the name first, since a
 * QEMU that has refused a descriptor loads nothing any more.
 */
async function loadFrom(qmp: QmpClient, { fd, file }: SavedState): Promise<void> {
  const uris = [`file:${file}`, `fd:${fd}`];
  const [byName, byFd] = await Promise.allSettled(uris.map((uri) => qmp.execute('migrate-incoming', { uri })));
  if (byName?.status === 'rejected' && byFd?.status === 'rejected') throw byFd.reason;
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
