/** What the spec of a pod's sandbox says of the pod. */
import { KilnError } from '../errors.ts';
import { partialTranslation } from './field-rules.ts';
import { translateNamespaces } from './namespaces.ts';
import type { Spec } from './spec.ts';
import { translateSysctl } from './sysctl.ts';

const sizes = {
  memory: 'io.kubernetes.cri.sandbox-memory',
  quota: 'io.kubernetes.cri.sandbox-cpu-quota',
  period: 'io.kubernetes.cri.sandbox-cpu-period',
};

/**
 * A sandbox's spec with the limits of all the pod's containers together, as kubelet counts them, in place of its own: what
 * its virtual machine has to be sized for.
 *
 * @throws KilnError invalid-argument for an annotation that is no number
 */
export function withPodResources(spec: Spec): Spec {
  const number = (name: string): number => {
    const value = spec.annotations?.[name] ?? '0';
    if (/^-?\d{1,15}$/.test(value)) return Number(value);
    throw new KilnError('invalid-argument', `annotation ${name}=${JSON.stringify(value)}: must be a number`);
  };
  const cpu = { quota: number(sizes.quota), period: number(sizes.period) };
  const resources = { memory: { limit: number(sizes.memory) }, cpu };
  return { ...spec, linux: { ...spec.linux, resources } };
}

/** Size of /dev/shm, as CRI has it: defaultShmSize of containerd. */
const shmBytes = 64 * 1024 * 1024;

/** What a sandbox's spec says of what its containers share. Throws what the translation of a container's spec throws. */
export function guestPodOf(spec: Spec, id: string) {
  const translation = { ...partialTranslation(id, ''), domainname: spec.domainname, pod: { pid: 0 } };
  translateNamespaces(spec.linux?.namespaces ?? [], 'linux.namespaces', translation);
  const sysctl = spec.linux?.sysctl ?? {};
  translateSysctl(sysctl, 'linux.sysctl', translation);
  return { hostname: spec.hostname ?? '', domainname: spec.domainname ?? '', sysctl, shmBytes };
}

/** The path of the network namespace that a spec joins; undefined for a new one. */
export function networkNamespaceOf({ linux }: Spec): string | undefined {
  return linux?.namespaces?.find(({ type }) => type === 'network')?.path || undefined;
}
