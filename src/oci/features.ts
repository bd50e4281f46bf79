/**
 * What Kiln can do of the OCI runtime-spec, as features.md of the spec has it. It says what a container gets: what crun in the
 * guest could do, but Kiln refuses, is not in it. Lists are those that specs are checked by.
 */
import { memoryPolicyModes } from './guest-spec.ts';
import { mountOptions } from './mount-options.ts';
import { namespaceTypes } from './namespaces.ts';
import { capabilities } from './process.ts';
import { seccompFeatures } from './seccomp.ts';
import { hookMoments } from './spec.ts';

/** @param version Kiln's */
export function features(version: string) {
  return {
    ociVersionMin: '1.0.0',
    ociVersionMax: '1.3.0',
    hooks: hookMoments,
    mountOptions,
    linux: {
      namespaces: namespaceTypes,
      capabilities: [...capabilities],
      // Where the virtual machine is counted on the host. The container's limits hold in the guest, which has v2.
      cgroup: { v1: true, v2: true, systemd: true, systemdUser: false, rdma: false },
      seccomp: seccompFeatures,
      apparmor: { enabled: false },
      selinux: { enabled: false },
      intelRdt: { enabled: false, schemata: false, monitoring: false },
      memoryPolicy: { modes: memoryPolicyModes, flags: [] },
      mountExtensions: { idmap: { enabled: false } },
      netDevices: { enabled: false },
    },
    annotations: { 'io.kiln.version': version, 'org.opencontainers.runc.checkpoint.enabled': 'false' },
    // They size the virtual machine and choose its kernel, and whose it is.
    potentiallyUnsafeConfigAnnotations: ['io.kiln.', 'io.kubernetes.cri.', 'io.kubernetes.cri-o.'],
  };
}
