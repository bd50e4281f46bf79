/**
 * A pod as CRI describes it, for containerd's sandbox API: there the runtime gets CRI's words themselves (PodSandboxConfig of
 * kubernetes/cri-api), where else containerd makes of them the spec of a pause container, and files that the pod's containers
 * get mounted. What containerd does then (internal/cri/server/podsandbox, sandbox_run_linux.go) is done here, so that a pod
 * is the same either way.
 */
import { annotationPrefix } from '../config/annotations.ts';
import { KilnError } from '../errors.ts';
import type { Namespace, Spec } from './spec.ts';

/** Whose namespace the pod has. */
export type NamespaceOwner = 'pod' | 'container' | 'node' | 'target';

/** What is heeded of a PodSandboxConfig. */
export interface CriPod {
  /** Empty for the host's. */
  readonly hostname: string;
  readonly annotations: Readonly<Record<string, string>>;
  readonly sysctls: Readonly<Record<string, string>>;
  /** The control group of the pod on the host, or the systemd slice; empty for none. */
  readonly cgroupParent: string;
  readonly namespaces: Readonly<Record<'network' | 'pid' | 'ipc', NamespaceOwner>>;
  readonly userNamespace: boolean;
  /** Limits of all containers together, where kubelet has told them. */
  readonly resources?: CriPodResources | undefined;
  /** Undefined for the host's. */
  readonly dns?: CriDns | undefined;
}

export interface CriPodResources {
  /** Microseconds. */
  readonly cpuPeriod: bigint;
  readonly cpuQuota: bigint;
  readonly cpuShares: bigint;
  /** Bytes. */
  readonly memoryLimit: bigint;
}

export interface CriDns {
  readonly servers: readonly string[];
  readonly searches: readonly string[];
  readonly options: readonly string[];
}

/** What programs that are not root may do on Linux by default since Kubernetes 1.22 (containerd's enable_unprivileged_*). */
const unprivileged = {
  'net.ipv4.ip_unprivileged_port_start': '0',
  'net.ipv4.ping_group_range': '0 2147483647',
};

const hostWords = { network: "the host's network", pid: "the host's processes", ipc: "the host's IPC objects" };
const podWords = { network: 'hostNetwork', pid: 'hostPID', ipc: 'hostIPC' };

/**
 * The spec of the container that stands for the pod, as containerd's CRI plugin would make it.
 *
 * @param networkNamespace undefined for a new one
 * @throws KilnError invalid-argument for what a virtual machine cannot share with the host, unimplemented for a user namespace
 */
export function sandboxSpecOf(
  pod: CriPod,
  { id, networkNamespace }: { readonly id: string; readonly networkNamespace: string | undefined },
): Spec {
  const { hostname, annotations, sysctls, cgroupParent, resources, userNamespace } = pod;
  for (const kind of ['network', 'pid', 'ipc'] as const) {
    if (pod.namespaces[kind] !== 'node') continue;
    throw new KilnError('invalid-argument', `a pod in a virtual machine cannot share ${hostWords[kind]}`, {
      hint: `run pods with ${podWords[kind]} under another RuntimeClass`,
    });
  }
  if (userNamespace) {
    throw new KilnError('unimplemented', 'a user namespace of a pod (hostUsers: false) is not supported', {
      hint: "the users of a virtual machine are not the host's in any case",
    });
  }
  const namespaces: Namespace[] = [
    { type: 'network', path: networkNamespace },
    ...['pid', 'ipc', 'uts', 'mount'].map((type) => ({ type })),
  ];
  return {
    ociVersion: '1.0.2',
    // It has no process.
    process: { args: ['pause'], cwd: '/' },
    root: { path: 'rootfs', readonly: true },
    hostname,
    annotations: { ...ofKiln(annotations), ...resourceAnnotations(resources) },
    linux: {
      namespaces,
      sysctl: { ...unprivileged, ...sysctls },
      ...(cgroupParent === '' ? {} : { cgroupsPath: cgroupsPathOf(cgroupParent, id) }),
    },
  };
}

/** CRI's own are never the pod author's. */
function ofKiln(annotations: Readonly<Record<string, string>>): Record<string, string> {
  return Object.fromEntries(Object.entries(annotations).filter(([name]) => name.startsWith(annotationPrefix)));
}

function resourceAnnotations(resources: CriPodResources | undefined): Record<string, string> {
  if (resources === undefined) return {};
  return {
    'io.kubernetes.cri.sandbox-cpu-period': String(resources.cpuPeriod),
    'io.kubernetes.cri.sandbox-cpu-quota': String(resources.cpuQuota),
    'io.kubernetes.cri.sandbox-cpu-shares': String(resources.cpuShares),
    'io.kubernetes.cri.sandbox-memory': String(resources.memoryLimit),
  };
}

/** A slice is systemd's name for one. containerd internal/cri/server/helpers.go, getCgroupsPath */
function cgroupsPathOf(parent: string, id: string): string {
  const name = parent.slice(parent.lastIndexOf('/') + 1);
  return name.endsWith('.slice') ? `${name}:cri-containerd:${id}` : `${parent.replace(/\/+$/, '')}/${id}`;
}

/** Texts of the files in /etc that each container of a pod gets. */
export interface PodFiles {
  readonly hostname: string;
  readonly hosts: string;
  readonly 'resolv.conf': string;
}

/** @param host the host's own files */
export function podFilesOf({ hostname, dns }: CriPod, host: PodFiles): PodFiles {
  return {
    hostname: hostname === '' ? host.hostname : `${hostname}\n`,
    hosts: host.hosts,
    'resolv.conf': dns === undefined ? host['resolv.conf'] : resolvConf(dns),
  };
}

/** resolv.conf(5) */
function resolvConf({ servers, searches, options }: CriDns): string {
  const lines = [
    ...(searches.length === 0 ? [] : [`search ${searches.join(' ')}`]),
    ...servers.map((server) => `nameserver ${server}`),
    ...(options.length === 0 ? [] : [`options ${options.join(' ')}`]),
  ];
  const broken = lines.find((line) => line.includes('\n'));
  if (broken !== undefined) {
    throw new KilnError('invalid-argument', `dns_config: ${JSON.stringify(broken)} has more than one line`);
  }
  return lines.map((line) => `${line}\n`).join('');
}

const podFileNames = ['hostname', 'hosts', 'resolv.conf'] as const;

/**
 * The spec of a pod's container with the pod's files in /etc and its /dev/shm, where it has nothing else there: containerd
 * leaves both to the runtime that makes the sandbox.
 *
 * @param directory where the files are on the host
 */
export function withPodFiles(spec: Spec, directory: string): Spec {
  const { mounts = [], root, linux } = spec;
  const taken = new Set(mounts.map(({ destination }) => destination));
  const added = podFileNames
    .map((name) => ({ name, destination: `/etc/${name}` }))
    .filter(({ destination }) => !taken.has(destination))
    .map(({ name, destination }) => ({
      ...{ destination, type: 'bind', source: `${directory}/${name}` },
      options: ['rbind', 'rprivate', root.readonly === true ? 'ro' : 'rw'],
    }));
  const joinsIpc = linux?.namespaces?.some(({ type, path = '' }) => type === 'ipc' && path !== '');
  const others = joinsIpc === true ? mounts.filter((mount) => !isOwnShm(mount)) : mounts;
  // Its translation makes the pod's of it, whatever the source.
  const shm = { destination: '/dev/shm', type: 'bind', source: '/dev/shm', options: ['rbind', 'rprivate'] };
  return { ...spec, mounts: [...others, ...(others.length === mounts.length ? [] : [shm]), ...added] };
}

/** What a spec has there by default. */
function isOwnShm({
  destination,
  type,
}: {
  readonly destination: string;
  readonly type?: string | undefined;
}): boolean {
  return destination === '/dev/shm' && type === 'tmpfs';
}
