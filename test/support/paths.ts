/**
 * Where the tests find things, and which runtime they drive.
 *
 * Developer aid: `KILN_TEST_RUNTIME=io.containerd.runc.v2 scripts/test e2e` runs the end-to-end suite against runc. What
 * fails there is a wrong test (or one that is about virtual machines, and says so by `kilnOnly`); what passes there and
 * fails with Kiln is a defect of Kiln.
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';

export const projectRoot = join(import.meta.dirname, '..', '..');
export const distBin = join(projectRoot, 'dist', 'bin');

const trees = join(projectRoot, '.cache', 'test');

/**
 * Oldest first. What depends on containerd itself (a task's life, its events, a restart, what `ctr` says) is tested on all
 * of them; everything else on 2.1, since every virtual machine costs seconds.
 */
export const containerdVersions = ['1.6', '1.7', '2.1'] as const;
export type ContainerdVersion = (typeof containerdVersions)[number];

/** The runtime type under test, as `ctr run --runtime` takes it. */
export const runtime = process.env.KILN_TEST_RUNTIME ?? 'io.containerd.kiln.v2';
export const underKiln = runtime === 'io.containerd.kiln.v2';

/** The shim binary that containerd derives from a runtime type: its last two parts. */
export function shimBinary(runtimeType: string): string {
  return `containerd-shim-${runtimeType.split('.').slice(-2).join('-')}`;
}

function inTree(...parts: string[]): string {
  const path = join(trees, ...parts);
  if (!existsSync(path)) throw new Error(`${path} is missing: run scripts/setup --test`);
  return path;
}

export const containerdBin = (version: ContainerdVersion): string => inTree(`containerd-${version}`, 'usr', 'bin');
export const runcBin = (): string => inTree('runc', 'usr', 'sbin');
/** Debian's crun, with a library that it needs, unpacked. */
export const crunTree = (): string => inTree('crun');
export const cniPlugins = (): string => inTree('cni', 'usr', 'lib', 'cni');
/** Debian's podman, with conmon and what else it needs, unpacked. */
export const podmanTree = (): string => inTree('podman');
export const iperf3Tree = (): string => inTree('iperf3');
export const busyboxBinary = (): string => inTree('busybox', 'bin', 'busybox');
