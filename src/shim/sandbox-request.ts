/** CreateSandbox in the words of the domain. */
import type { CreateSandboxRequest } from '../../gen/containerd/sandbox.ts';
import { NamespaceMode, PodSandboxConfig } from '../../gen/kubernetes/pod.ts';
import { KilnError } from '../errors.ts';
import type { CriPod, NamespaceOwner } from '../oci/cri-pod.ts';

/** What containerd asks for with CreateSandbox. */
export interface SandboxRequest {
  readonly id: string;
  readonly bundle: string;
  /** Undefined for a new one. */
  readonly networkNamespace: string | undefined;
  readonly pod: CriPod;
}

/** The type of CRI's options, whatever stands before it. containerd typeurl, kubernetes/cri-api. */
const configType = /(^|\/)runtime\.v1\.PodSandboxConfig$/;

const owners: Readonly<Record<number, NamespaceOwner>> = {
  [NamespaceMode.POD]: 'pod',
  [NamespaceMode.CONTAINER]: 'container',
  [NamespaceMode.NODE]: 'node',
  [NamespaceMode.TARGET]: 'target',
};

/**
 * A client that is not CRI may give no options, for a sandbox with the defaults.
 *
 * @throws KilnError invalid-argument for options that are no PodSandboxConfig
 */
export function readSandboxRequest(request: CreateSandboxRequest): SandboxRequest {
  const { sandboxId: id, bundlePath: bundle, options, netnsPath, annotations } = request;
  const typeUrl = options?.typeUrl ?? '';
  if (typeUrl !== '' && !configType.test(typeUrl)) {
    throw new KilnError(
      'invalid-argument',
      `sandbox ${id}: its options are ${typeUrl}, not runtime.v1.PodSandboxConfig`,
    );
  }
  let config: PodSandboxConfig;
  try {
    config = PodSandboxConfig.decode(options?.value ?? new Uint8Array(0));
  } catch (cause) {
    throw new KilnError('invalid-argument', `sandbox ${id}: its options cannot be read as ${typeUrl}`, { cause });
  }
  return { id, bundle, networkNamespace: netnsPath || undefined, pod: podOf(config, annotations) };
}

function podOf(config: PodSandboxConfig, annotations: Readonly<Record<string, string>>): CriPod {
  const { hostname, linux, dnsConfig: dns } = config;
  const { cgroupParent = '', sysctls = {}, securityContext, resources } = linux ?? {};
  const { network, pid, ipc, usernsOptions } = securityContext?.namespaceOptions ?? {};
  const owner = (mode: NamespaceMode = NamespaceMode.POD) => owners[mode] ?? 'pod';
  return {
    ...{ hostname, cgroupParent, sysctls },
    annotations: { ...annotations, ...config.annotations },
    namespaces: { network: owner(network), pid: owner(pid), ipc: owner(ipc) },
    userNamespace: usernsOptions?.mode === NamespaceMode.POD,
    resources: resources && {
      cpuPeriod: resources.cpuPeriod,
      cpuQuota: resources.cpuQuota,
      cpuShares: resources.cpuShares,
      memoryLimit: resources.memoryLimitInBytes,
    },
    dns,
  };
}
