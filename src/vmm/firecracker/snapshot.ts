/*
 * Snapshots: docs/snapshotting/snapshot-support.md of Firecracker v1.16, src/vmm/src/persist.rs.
 *
 * A full snapshot is two files: the guest's memory, as long as it is, and the state of the CPUs and devices. Firecracker
 * makes them of a paused VM. They are loaded by a Firecracker of the same version that was told nothing of a VM yet; it maps
 * the memory privately, so that any number of VMs have one file. An error at the load ends Firecracker.
 *
 * A snapshot knows the taps of the saved VM's network cards, and is told others at its load.
 *
 * What a snapshot holds and nobody can change at the load: CPUs, memory, rate limiters, the guest's CID, and the paths of the
 * drives' files, which have to be there. So these paths are the same for every VM: see `portable` in place.ts. A drive's serial
 * is none of it: it is made of the file that is there at the load, and anew when another file is put behind.
 *
 * At a load the guest is told that its vsock connections are gone (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET), so the agent calls again.
 *
 * `clock_realtime` (1.16) is not asked for: the guest's clock is set by Hello anyway, the flag makes the monotonic clock jump
 * by the template's age, and the load fails where the host's clock is not the TSC (ClockRealtimeNotInState).
 */
import { closeSync, openSync } from 'node:fs';
import path from 'node:path';
import { KilnError } from '../../errors.ts';
import type { NetworkCard, VmConfig } from '../vmm.ts';
import type { FirecrackerApi } from './api.ts';
import { interfaceId } from './configure.ts';
import { makeDriveFiles } from './drives.ts';
import type { Place, SnapshotFile } from './place.ts';
import type { Started } from './start.ts';
import { isAtLeast } from './version.ts';

/** The files of a snapshot, in a directory of its own. */
export const snapshotFiles: readonly SnapshotFile[] = ['memory', 'state'];

/** The minor version of Firecracker 1 whose /snapshot/load knows `vsock_override`: CHANGELOG.md, 1.16.0. */
const overrideSince = 16;

/**
 * Pauses the VM for good and saves it into new files that only their owner reads. Firecracker can write them as long as this
 * takes.
 *
 * @throws KilnError internal with Firecracker's words when it refuses, unavailable when it does not answer; EEXIST for files
 *   that are there; the signal's reason
 */
export async function saveSnapshot(
  { api, place }: { readonly api: FirecrackerApi; readonly place: Place },
  directory: string,
  signal: AbortSignal,
): Promise<void> {
  const files = { memory: path.join(directory, 'memory'), state: path.join(directory, 'state') };
  // Made here, since Firecracker would let everybody read them, and writes over what is there.
  for (const name of snapshotFiles) closeSync(openSync(files[name], 'wx', 0o600));
  await api.call('PATCH /vm', { state: 'Paused' }, signal);
  try {
    const snapshot = {
      snapshot_type: 'Full',
      snapshot_path: await place.lend('state', files.state),
      mem_file_path: await place.lend('memory', files.memory),
    } as const;
    await api.call('PUT /snapshot/create', snapshot, signal);
  } finally {
    for (const name of snapshotFiles) place.hide(name);
  }
}

/**
 * Restores a VM from its files and lets it run.
 *
 * @throws KilnError internal with Firecracker's words when it refuses, unavailable when it ends; the signal's reason
 */
export async function loadSnapshot(
  { api, place, nics, version, signal }: Started,
  config: VmConfig,
  directory: string,
): Promise<void> {
  // The snapshot knows the drives.
  await makeDriveFiles(config, place);
  const snapshot = {
    snapshot_path: await place.show('state', path.join(directory, 'state')),
    mem_backend: { backend_type: 'File', backend_path: await place.show('memory', path.join(directory, 'memory')) },
    resume_vm: true,
    // The saved VM's are gone.
    ...(nics.length > 0 ? { network_overrides: nics.map(overrideAt) } : {}),
    // The path that is in there anyway, whatever else that may be one day.
    ...(isAtLeast(version, overrideSince) ? { vsock_override: { uds_path: place.vsock.inside } } : {}),
  } as const;
  await api.call('PUT /snapshot/load', snapshot, signal);
  // One is read, the other mapped.
  for (const name of snapshotFiles) place.hide(name);
}

function overrideAt({ tap }: NetworkCard, index: number) {
  return { iface_id: interfaceId(index), host_dev_name: tap };
}

/** @throws KilnError not-found for a directory that is no snapshot's */
export function requireSnapshot(directory: string): void {
  for (const name of snapshotFiles) {
    const file = path.join(directory, name);
    try {
      closeSync(openSync(file, 'r'));
    } catch (cause) {
      throw new KilnError('not-found', `${file} of the template cannot be read: ${(cause as Error).message}`, {
        cause,
      });
    }
  }
}
