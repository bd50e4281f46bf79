/**
 * What a spec says of pods. CRI makes of a pod one container of the type "sandbox", and then any number of the type
 * "container", each naming the sandbox's id. The annotations are containerd's (internal/cri/annotations) and CRI-O's
 * (pkg/annotations); containerd's specs of a pod's containers name the namespaces of the sandbox's process.
 */
import { KilnError } from '../errors.ts';
import type { Spec } from './spec.ts';

/** What a container is in a pod. */
export type PodPlace =
  /** It belongs to none, and has a virtual machine of its own. */
  | { readonly kind: 'alone' }
  /** It stands for the pod: its virtual machine is the pod's. */
  | { readonly kind: 'sandbox' }
  /** It runs in the virtual machine of that container. */
  | { readonly kind: 'member'; readonly sandboxId: string };

const dialects = [
  // First: CRI-O hands on what a pod's author has annotated, which may be the other's words.
  { type: 'io.kubernetes.cri-o.ContainerType', sandbox: 'io.kubernetes.cri-o.SandboxID' },
  { type: 'io.kubernetes.cri.container-type', sandbox: 'io.kubernetes.cri.sandbox-id' },
];

/**
 * The cgroup of a container of a pod of podman's, which has the pod's id in it: with cgroupfs, with systemd.
 * containers/podman libpod/container_internal_linux.go, getOCICgroupPath.
 */
const cgroupInPodOfPodman = /\/[0-9a-f]{64}\/libpod-[0-9a-f]{64}$|libpod_pod_[0-9a-f]{64}\.slice:libpod:/;

/** Podman tells of a pod's containers as CRI-O does, but says nothing of the one that stands for the pod. */
function standsForPodOfPodman({ annotations = {}, linux }: PodSpec): boolean {
  return annotations['io.container.manager'] === 'libpod' && cgroupInPodOfPodman.test(linux?.cgroupsPath ?? '');
}

type PodSpec = Pick<Spec, 'annotations' | 'linux'>;

/** @throws KilnError invalid-argument for annotations that contradict themselves or each other, naming them */
export function podPlace(spec: PodSpec): PodPlace {
  const { annotations = {} } = spec;
  const dialect = dialects.find(({ type }) => annotations[type] !== undefined);
  if (dialect === undefined) return { kind: standsForPodOfPodman(spec) ? 'sandbox' : 'alone' };
  const type = annotations[dialect.type];
  if (type === 'sandbox') return { kind: 'sandbox' };
  if (type !== 'container') {
    throw new KilnError(
      'invalid-argument',
      `annotation ${dialect.type}=${JSON.stringify(type)}: must be "sandbox" or "container"`,
    );
  }
  const sandboxId = annotations[dialect.sandbox] ?? '';
  if (sandboxId !== '') return { kind: 'member', sandboxId };
  throw new KilnError('invalid-argument', `annotation ${dialect.type}="container" needs ${dialect.sandbox}`);
}

/** Where the guest keeps what the containers of a pod share: namespaces by their type, and `shm` for /dev/shm. */
export const guestPodDirectory = '/run/kiln/pod';

/** What the translation of a container's spec has to know of its pod. */
export interface PodOfSpec {
  /** Of the process that stands for the pod on the host. */
  readonly pid: number;
  /** The id of the pod's container for which a process of the host stands; undefined where it stands for none. */
  readonly containerAt?: (pid: number) => string | undefined;
}

/** The names of namespaces in /proc/<pid>/ns, by the spec's. namespaces(7) */
const shared: Readonly<Record<string, string>> = { ipc: 'ipc', uts: 'uts', pid: 'pid' };

/**
 * The guest's path of a pod's namespace, or of one of its containers', that a spec names by the host's; undefined for any
 * other.
 *
 * A path outside of /proc is one that CRI-O has given the namespace of a pod. Of processes that is one of a container
 * (CRI's NamespaceMode TARGET), and does not tell which: of it the host has but its own.
 */
export function podNamespace(type: string, path: string, { pid, containerAt }: PodOfSpec): string | undefined {
  const name = shared[type];
  if (name === undefined) return undefined;
  // CRI's NamespaceMode TARGET, by which `kubectl debug --target` sees the processes of a container.
  const ofProcess = type === 'pid' ? /^\/proc\/(\d+)\/ns\/pid$/.exec(path)?.[1] : undefined;
  const container = ofProcess === undefined ? undefined : containerAt?.(Number(ofProcess));
  if (container !== undefined) return `${guestPodDirectory}/pid-of/${container}`;
  const named = !path.startsWith('/proc/') && type !== 'pid';
  if (path !== `/proc/${pid}/ns/${name}` && !named) return undefined;
  return `${guestPodDirectory}/${type}`;
}
