import { existsSync } from 'node:fs';
import { stat } from 'node:fs/promises';
import path from 'node:path';
import { KilnError } from '../errors.ts';
import { planControlGroup } from '../host/control-group.ts';
import { readBundle } from '../oci/bundle.ts';
import { podPlace } from '../oci/pod.ts';
import { guestPodOf, networkNamespaceOf, withPodResources } from '../oci/pod-spec.ts';
import type { Spec } from '../oci/spec.ts';
import { podVmSize } from '../oci/vm-size.ts';
import { bootPod, type PodRequest } from '../sandbox/create-pod.ts';
import type { Pod } from '../sandbox/pod.ts';
import type { PodContainer } from '../sandbox/pod-container.ts';
import type { Installation } from './containers.ts';

/** What a pod's making needs beside what its sandbox's spec says. */
export type PodMeans = Pick<
  PodRequest,
  | 'id'
  | 'directory'
  | 'config'
  | 'vmm'
  | 'hooks'
  | 'files'
  | 'terminal'
  | 'timeline'
  | 'logger'
  | 'openStdio'
  | 'podFiles'
  | 'standInPid'
>;

/**
 * Makes a pod as its sandbox's spec says, and what stands for it: a container of CRI's, or a sandbox of containerd's sandbox
 * API.
 */
export async function makePod(
  { host, pods }: Installation,
  spec: Spec,
  means: PodMeans,
  signal: AbortSignal,
): Promise<PodContainer> {
  const { id, directory, config } = means;
  await refuseIpcOfHost(spec);
  const size = podVmSize(config, withPodResources(spec));
  const request = {
    ...{ ...means, ...size, guestPod: guestPodOf(spec, id), networkNamespace: networkNamespaceOf(spec) },
    groupPlan: planControlGroup(spec.linux?.cgroupsPath),
  };
  const making = bootPod(host, { ...request, onGone: () => pods.remove(directory) }, signal);
  // Before anything is awaited, so that the pod's containers find it.
  pods.add(
    directory,
    making.then(({ pod }) => pod),
  );
  return (await making).container;
}

/**
 * A container that names a network has to name its pod's. Annotations alone do not make it one of the pod: CRI-O lets them be
 * overwritten by those that a pod's author gives, and a namespace is nothing that he can choose.
 *
 * @param processPid of the process that stands for the container, where the caller has started it: it has joined the namespace
 *   as the caller sees it, whose mounts need not be ours
 * @throws KilnError invalid-argument for another one, not-found for none
 */
export async function requireNetworkOf(pod: Pod, spec: Spec, processPid: number | undefined): Promise<void> {
  const file = networkNamespaceOf(spec);
  if (file === undefined) return;
  const joined = processPid === undefined ? file : networkOf(processPid);
  const [named, ofPod] = await Promise.all([identityOf(joined), identityOf(networkOf(pod.pid))]);
  if (named === ofPod) return;
  throw new KilnError('invalid-argument', `the network namespace ${file} is not that of the container's pod`, {
    hint: "the annotations name another pod's",
  });
}

/**
 * Without an IPC namespace, a pod wants the host's, which the translation of its spec refuses. CRI-O's has one: a name for the
 * host's own.
 *
 * @throws KilnError invalid-argument
 */
async function refuseIpcOfHost({ linux }: Spec): Promise<void> {
  const file = linux?.namespaces?.find(({ type }) => type === 'ipc')?.path || undefined;
  if (file === undefined) return;
  // One that is not seen from here is not the host's: who has made it, has mounted it.
  const named = await identityOf(file).catch(() => undefined);
  if (named !== (await identityOf('/proc/self/ns/ipc'))) return;
  throw new KilnError('invalid-argument', "a pod in a virtual machine cannot share the host's IPC objects", {
    hint: `${file} is the host's IPC namespace, as hostIPC asks for`,
  });
}

function networkOf(pid: number): string {
  return `/proc/${pid}/ns/net`;
}

/** What tells namespaces apart. namespaces(7) */
async function identityOf(namespace: string): Promise<string> {
  try {
    const { dev, ino } = await stat(namespace);
    return `${dev}:${ino}`;
  } catch (cause) {
    throw new KilnError('not-found', `there is no namespace ${namespace}`, { cause });
  }
}

/** Whether a bundle is of what stands for a pod: a container of CRI's, or a sandbox, whose bundle has no config.json. */
export async function isOfPod(bundle: string): Promise<boolean> {
  if (!existsSync(path.join(bundle, 'config.json'))) return true;
  try {
    return podPlace((await readBundle(bundle)).spec).kind === 'sandbox';
  } catch {
    return false; // Create tells what is wrong with it.
  }
}
