import type { Logger } from '../observe/logger.ts';
import { type LimitResources, toLimitFiles } from '../oci/limits.ts';
import { promisedMemory, requireCpus } from '../oci/limits-check.ts';
import type { Sandbox } from './sandbox.ts';

/**
 * Changes a running container's limits: all of them, or none.
 *
 * @throws KilnError resource-exhausted for what its VM cannot keep, and what `toLimitFiles` throws
 */
export async function updateLimits(
  sandbox: Sandbox,
  id: string,
  resources: LimitResources,
  logger: Logger,
): Promise<void> {
  const { memory, cpuMax } = await sandbox.guest.stats(id);
  const { files, warnings } = toLimitFiles(id, resources, {
    memoryUsageBytes: memory.usageBytes,
    memoryLimitBytes: memory.limitBytes,
    cpuQuotaUs: cpuMax.quotaUs,
    cpuPeriodUs: cpuMax.periodUs,
  });
  for (const warning of warnings) logger.warn(warning);
  requireCpus(files, sandbox.guest.facts.vcpus);
  // Last of the checks: from here on something changes.
  await sandbox.provideMemory(promisedMemory(files));
  if (files.length > 0) await sandbox.guest.setLimits(id, files);
}
