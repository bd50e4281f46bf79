import { killProcessesOf } from '../host/stale.ts';
import { clearJail } from '../vmm/firecracker/jail.ts';

/**
 * Ends whatever an earlier kilnd has started for the container of a directory: helpers, loggers, a jailed VMM with its
 * mounts and cgroups. Afterwards the directory can be removed.
 *
 * @returns the pids of helpers and loggers
 * @throws what the host's kernel answers when something of a jail cannot be removed
 */
export async function endRemains(directory: string): Promise<readonly number[]> {
  const killed = await killProcessesOf(directory);
  await clearJail(directory);
  return killed;
}
