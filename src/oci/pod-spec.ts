/** What the spec of a pod's sandbox says of the pod. */
import { KilnError } from '../errors.ts';
import { partialTranslation } from './field-rules.ts';
import { translateNamespaces } from './namespaces.ts';
import type { Spec } from './spec.ts';
import { translateSysctl } from './sysctl.ts';

/** containerd internal/cri/annotations, by the names that CRI itself has. */
const sizesOfContainerd = {
  memory_limit_in_bytes: 'io.kubernetes.cri.sandbox-memory',
  cpu_quota: 'io.kubernetes.cri.sandbox-cpu-quota',
  cpu_period: 'io.kubernetes.cri.sandbox-cpu-period',
};

/** CRI-O has all of it in one, as CRI's LinuxContainerResources in JSON, under this name from 1.35 on, before under that. */
const sizesOfCrio = ['pod-linux-resources.crio.io', 'io.kubernetes.cri-o.PodLinuxResources'];

/**
 * A sandbox's spec with the limits of all the pod's containers together, as kubelet counts them, in place of its own: what
 * its virtual machine has to be sized for.
 *
 * @throws KilnError invalid-argument for an annotation that holds no numbers
 */
export function withPodResources(spec: Spec): Spec {
  const number = sizesOf(spec.annotations ?? {});
  const cpu = { quota: number('cpu_quota'), period: number('cpu_period') };
  const resources = { memory: { limit: number('memory_limit_in_bytes') }, cpu };
  return { ...spec, linux: { ...spec.linux, resources } };
}

/** 0 for what is not said, as CRI has it. */
function sizesOf(annotations: Readonly<Record<string, string>>): (name: keyof typeof sizesOfContainerd) => number {
  const ofCrio = sizesOfCrio.find((name) => annotations[name] !== undefined);
  if (ofCrio === undefined) {
    return (name) => integerOf(annotations[sizesOfContainerd[name]] ?? '0', sizesOfContainerd[name]);
  }
  const text = annotations[ofCrio] ?? '';
  const object = objectOf(text);
  if (object === undefined) throw badAnnotation(ofCrio, text, 'must be an object in JSON');
  return (name) => integerOf(String(object[name] ?? 0), `${ofCrio}: ${name}`);
}

/** `null` says nothing. */
function objectOf(text: string): Readonly<Record<string, unknown>> | undefined {
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === 'object' && !Array.isArray(value) ? { ...value } : undefined;
  } catch {
    return undefined;
  }
}

function integerOf(text: string, name: string): number {
  if (/^-?\d{1,15}$/.test(text)) return Number(text);
  throw badAnnotation(name, text, 'must be a number');
}

function badAnnotation(name: string, value: string, rule: string): KilnError {
  return new KilnError('invalid-argument', `annotation ${name}=${JSON.stringify(value)}: ${rule}`);
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
