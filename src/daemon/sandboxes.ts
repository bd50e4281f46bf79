import { access, readFile, realpath } from 'node:fs/promises';
import { hostname } from 'node:os';
import path from 'node:path';
import { applyAnnotations } from '../config/annotations.ts';
import type { KilnConfig } from '../config/config.ts';
import { KilnError } from '../errors.ts';
import { type PodFiles, podFilesOf, sandboxSpecOf } from '../oci/cri-pod.ts';
import { hostHooks } from '../oci/hooks.ts';
import type { SandboxRequest } from '../shim/sandbox-request.ts';
import type { SandboxContainer } from '../shim/sandbox-service.ts';
import { noStdio } from '../shim/stdio.ts';
import { type Installation, openStdioOf } from './containers.ts';
import type { ContainerContext } from './endpoints.ts';
import { guestFiles } from './installation.ts';
import { makePod } from './pods.ts';
import { selectVmm } from './vmm.ts';

/** containerd's request for a sandbox as a pod. What can be refused by reading alone is refused before anything is acquired. */
export async function createSandbox(
  installation: Installation,
  { id, bundle, networkNamespace, pod }: SandboxRequest,
  context: ContainerContext,
  signal: AbortSignal,
): Promise<SandboxContainer> {
  const { directory, timeline, logger } = context;
  timeline.mark('request');
  const { config: ofHost, paths } = installation.load();
  const spec = sandboxSpecOf(pod, { id, networkNamespace });
  const config: KilnConfig = applyAnnotations(ofHost, spec.annotations);
  const texts = podFilesOf(pod, await filesOfHost());
  if (networkNamespace !== undefined) await requireNamespace(id, networkNamespace);
  const { ociVersion, annotations = {} } = spec;
  const means = {
    ...{ id, directory, config, timeline, logger },
    podFiles: { directory: await placeOfFiles(bundle, directory), texts },
    vmm: await selectVmm(config, { logger, parking: installation.host.parking }),
    hooks: { ...hostHooks(spec), bundle, ociVersion, annotations },
    files: guestFiles(config, paths),
    terminal: false,
    openStdio: () => openStdioOf(noStdio, context),
  };
  return makePod(installation, spec, means, signal);
}

async function requireNamespace(id: string, file: string): Promise<void> {
  try {
    await access(file);
  } catch (cause) {
    throw new KilnError('not-found', `sandbox ${id}: its network namespace ${file} does not exist`, { cause });
  }
}

/**
 * A guest can make its files as large as it likes. So they lie in the folder on a disk that containerd has for a sandbox beside
 * its bundle, and removes with it; kilnd's own is in memory.
 */
async function placeOfFiles(bundle: string, directory: string): Promise<string> {
  try {
    return path.join(await realpath(path.join(bundle, 'work')), 'etc');
  } catch {
    return path.join(directory, 'etc'); // containerd makes one always.
  }
}

/** What a pod gets whose own names nothing else. A host without one of the files has nothing to say there. */
async function filesOfHost(): Promise<PodFiles> {
  const [hosts, resolvConf] = await Promise.all([textOf('/etc/hosts'), textOf('/etc/resolv.conf')]);
  return { hostname: `${hostname()}\n`, hosts, 'resolv.conf': resolvConf };
}

async function textOf(file: string): Promise<string> {
  try {
    return await readFile(file, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return '';
    throw error;
  }
}
