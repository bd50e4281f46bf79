import path from 'node:path';
import { applyAnnotations } from '../config/annotations.ts';
import type { LoadedConfig } from '../config/config.ts';
import { readBundle } from '../oci/bundle.ts';
import { toGuestSpec } from '../oci/guest-spec.ts';
import { hostHooks } from '../oci/hooks.ts';
import { stringifyJson } from '../oci/json.ts';
import { vmSize } from '../oci/vm-size.ts';
import { guestRootDirectory, planRootfs } from '../rootfs/index.ts';
import { Container } from '../sandbox/container.ts';
import type { HostServices } from '../sandbox/resources.ts';
import { openStdio } from '../shim/stdio.ts';
import type { TaskRequest } from '../shim/task-service.ts';
import type { ContainerContext } from './daemon.ts';
import { guestFiles } from './installation.ts';
import { selectVmm } from './vmm.ts';

/** What belongs to kilnd, not to one container. */
export interface Installation {
  readonly host: HostServices;
  /** Called for each container, so that a change of the configuration needs no restart. */
  readonly load: () => LoadedConfig;
}

/**
 * containerd's request as a container. Everything that can be refused by reading alone is refused here, before
 * anything is acquired.
 */
export async function createContainer(
  { host, load }: Installation,
  request: TaskRequest,
  context: ContainerContext,
  signal: AbortSignal,
): Promise<Container> {
  const { timeline, logger } = context;
  const { id, stdin, stdout, stderr, terminal } = request;
  timeline.mark('request');
  const loaded = load();
  const bundle = await readBundle(request.bundle);
  const config = applyAnnotations(loaded.config, bundle.spec.annotations);
  const guest = toGuestSpec(bundle.spec, { id, rootfsPath: guestRootDirectory(id) });
  for (const warning of guest.warnings) logger.warn(warning);
  if (request.options !== undefined) {
    logger.warn(`runtime options (${request.options.typeUrl}) are not looked at: Kiln is configured by config.toml`);
  }
  const { memoryMib, vcpus } = vmSize(config, bundle.spec);
  const rootfs = planRootfs(request.rootfs, { path: bundle.rootPath, workDirectory: path.join(bundle.dir, 'work') });
  return Container.create(
    host,
    {
      id,
      directory: context.directory,
      config,
      vmm: selectVmm(config, logger),
      spec: stringifyJson(guest.spec),
      rootfs,
      hooks: {
        ...hostHooks(bundle.spec),
        bundle: bundle.dir,
        ociVersion: bundle.spec.ociVersion,
        annotations: bundle.spec.annotations ?? {},
      },
      files: guestFiles(config, loaded.paths),
      memoryMib,
      vcpus,
      openStdio: () =>
        openStdio(
          { stdin, stdout, stderr, terminal },
          { onError: (name, error) => logger.error({ err: error }, `output to ${name} is being lost`) },
        ),
      timeline,
      logger,
    },
    signal,
  );
}
