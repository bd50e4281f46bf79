/** The jailer: docs/jailer.md and src/jailer of Firecracker v1.16. */
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { KilnError } from '../../errors.ts';
import { abortable } from '../../host/abortable.ts';
import type { GroupLimits } from '../../host/cgroups.ts';
import { adoptHelper, describeExit, type HelperProcess, startHelper } from '../../host/helper-process.ts';
import { resetOomScore } from '../../host/oom-score.ts';
import { identityOf } from '../../host/process-identity.ts';
import type { Parking } from '../cards.ts';
import { withExitStatus } from './exit-status.ts';
import { cgroupArguments } from './jail-cgroup.ts';
import { logName } from './place.ts';

export interface JailerOptions {
  /** Absolute path of the jailer. */
  readonly jailer: string;
  /** Absolute path of Firecracker, without a link in it. */
  readonly program: string;
  /** 1 to 64 letters, digits and `-`; no other jail's. */
  readonly id: string;
  /** The user to run as, and the group. */
  readonly uid: number;
  /** The folder below which jails lie, --chroot-base-dir, and what the jailer makes of it for this one. */
  readonly base: string;
  readonly root: string;
  readonly limits: GroupLimits;
  /** The host's table of mounts, for its cgroups. */
  readonly mounts: string;
  readonly directory: string;
  /** The network namespace that both run in; it is entered before, so --netns is not needed. */
  readonly network: Parking;
  /** Firecracker's own arguments, with paths in the jail. */
  readonly args: readonly string[];
}

/** Descriptors: 1023 vsock connections (docs/vsock.md), drives and KVM's own, with as many to spare. */
const openFiles = 2048;

/** No file becomes longer: the most that a drive can have, which is what an empty slot shows (drives.ts). In bytes. */
export const longestFileBytes = 2 ** 40;

/**
 * Has the jailer enter the jail and start Firecracker there, as PID 1 of a PID namespace of its own. Firecracker is then
 * nobody's child: it is known by the file that the jailer writes its id to.
 *
 * @throws KilnError failed-precondition when the jailer cannot be run, internal with its words when it fails, the signal's
 *   reason when that aborts; a process may be left in the jail
 */
export async function startJailer(options: JailerOptions, signal: AbortSignal): Promise<HelperProcess> {
  const { jailer, program, id, uid, base, limits, mounts, directory, network, args } = options;
  await using child = await startHelper({
    program: jailer,
    args: [
      ...['--id', id, '--exec-file', program, '--uid', String(uid), '--gid', String(uid)],
      ...['--chroot-base-dir', base, '--new-pid-ns'],
      ...['--resource-limit', `no-file=${openFiles}`, '--resource-limit', `fsize=${longestFileBytes}`],
      ...cgroupArguments(uid, limits, mounts),
      ...['--', ...args],
    ],
    directory,
    network,
    logName,
    title: 'the jailer (vm.jailer in the config file)',
    hint: 'install the jailer of your Firecracker, or set vm.jail = "off"',
  });
  const exit = await abortable(child.exited, signal);
  if (exit.code !== 0) {
    throw new KilnError('internal', `the jailer ended ${describeExit(exit)}: ${child.lastWords()}`);
  }
  const pid = Number(readFileSync(path.join(options.root, `${path.basename(program)}.pid`), 'utf8'));
  const identity = identityOf(pid);
  const firecracker = identity && adoptHelper(identity, { directory, logName });
  if (firecracker === undefined) throw new KilnError('internal', `Firecracker ended at start: ${child.lastWords()}`);
  // It was forked maybe before the jailer's own was reset.
  resetOomScore(pid);
  return withExitStatus(firecracker);
}
