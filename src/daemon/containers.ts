import path from 'node:path';
import { applyAnnotations } from '../config/annotations.ts';
import type { LoadedConfig } from '../config/config.ts';
import type { Logger } from '../observe/logger.ts';
import type { Timeline } from '../observe/timeline.ts';
import { readBundle } from '../oci/bundle.ts';
import { toGuestSpec } from '../oci/guest-spec.ts';
import { stringifyJson } from '../oci/json.ts';
import { vmSize } from '../oci/vm-size.ts';
import { guestRootDirectory, planRootfs } from '../rootfs/index.ts';
import { Container } from '../sandbox/container.ts';
import type { HostServices } from '../sandbox/resources.ts';
import { openStdio } from '../shim/stdio.ts';
import type { TaskRequest } from '../shim/task-service.ts';
import { guestFiles } from './installation.ts';
import { selectVmm } from './vmm.ts';

export interface CreateContext {
  readonly host: HostServices;
  /** Read afresh for each container, so that a change needs no restart. */
  readonly loaded: LoadedConfig;
  /** A directory for the container alone; not yet existing. */
  readonly directory: string;
  readonly timeline: Timeline;
  readonly logger: Logger;
}

/**
 * containerd's request as a container. Everything that can be refused by reading alone is refused here, before
 * anything is acquired.
 */
export async function createContainer(
  request: TaskRequest,
  context: CreateContext,
  signal: AbortSignal,
): Promise<Container> {
  const { loaded, timeline, logger } = context;
  const { id, stdin, stdout, stderr, terminal } = request;
  timeline.mark('request');
  const bundle = await readBundle(request.bundle);
  const config = applyAnnotations(loaded.config, bundle.spec.annotations);
  const guest = toGuestSpec(bundle.spec, { id, rootfsPath: guestRootDirectory(id) });
  for (const warning of guest.warnings) logger.warn(warning);
  const { memoryMib, vcpus } = vmSize(config, bundle.spec);
  const rootfs = planRootfs(request.rootfs, { path: bundle.rootPath, workDirectory: path.join(bundle.dir, 'work') });
  return Container.create(
    context.host,
    {
      id,
      directory: context.directory,
      config,
      vmm: selectVmm(config, logger),
      spec: stringifyJson(guest.spec),
      rootfs,
      files: guestFiles(config, loaded.paths),
      memoryMib,
      vcpus,
      openStdio: () => openStdio({ stdin, stdout, stderr, terminal }),
      timeline,
      logger,
    },
    signal,
  );
}
