/**
 * What `containerd-shim-kiln-v2 -info` prints: a containerd.types.RuntimeInfo, made once at build time.
 *
 * containerd asks for it at its own start and with the first container of a runtime. The launcher copies the file, so
 * the answer needs no kilnd. To make the file: `node src/shim/control/runtime-info.ts OUT`.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { RuntimeInfo } from '../../../gen/containerd/types.ts';
import { mountOptions } from '../../oci/mount-options.ts';

const featuresTypeUrl = 'types.containerd.io/opencontainers/runtime-spec/1/features/Features';

/**
 * The OCI "features" structure (runtime-spec features.md). What is left out means "unknown"; what is false is refused.
 * It speaks of the container as it runs in the guest, under crun.
 */
export const features = {
  ociVersionMin: '1.0.0',
  ociVersionMax: '1.1.0',
  // Where it asks at all (2.1: runtimes of runc's type only), containerd's CRI looks for "rro" in it.
  mountOptions,
  linux: {
    cgroup: { v1: false, v2: true, systemd: false, systemdUser: false },
    seccomp: { enabled: true },
    // These belong to the host's kernel, which the container does not run on.
    apparmor: { enabled: false },
    selinux: { enabled: false },
    intelRdt: { enabled: false },
    // containerd refuses idmapped mounts, and Kubernetes user namespaces, by this line.
    mountExtensions: { idmap: { enabled: false } },
  },
} as const;

/**
 * @param version of Kiln, as in package.json
 *
 * No annotations: the one that containerd reads, `containerd.io/runtime-allow-mounts`, would promise that we take
 * mounts which containerd has not activated on the host.
 */
export function encodeRuntimeInfo(version: string): Uint8Array {
  return RuntimeInfo.encode({
    name: 'io.containerd.kiln.v2',
    version: { version, revision: '' },
    options: undefined,
    features: { typeUrl: featuresTypeUrl, value: Buffer.from(JSON.stringify(features)) },
    annotations: {},
  }).finish();
}

function packageVersion(): string {
  const manifest: unknown = JSON.parse(readFileSync(new URL('../../../package.json', import.meta.url), 'utf8'));
  const version = (manifest as { version?: unknown }).version;
  if (typeof version !== 'string') throw new Error('package.json has no version');
  return version;
}

// By name: in a bundle, import.meta says "main" for every module.
if (path.basename(process.argv[1] ?? '') === 'runtime-info.ts') {
  const [, , out] = process.argv;
  if (out === undefined) {
    process.stderr.write('usage: node src/shim/control/runtime-info.ts OUT\n');
    process.exitCode = 2;
  } else {
    writeFileSync(out, encodeRuntimeInfo(packageVersion()));
  }
}
