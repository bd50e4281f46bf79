/*
 * The control groups of a jailed VM. The jailer makes them, enters them and writes the limits before Firecracker runs
 * (docs/jailer.md, --cgroup); to remove them is our part. It speaks to one version of cgroups at a time.
 */
import path from 'node:path';
import { type GroupLimits, hierarchiesIn, hostMounts, limitFiles, removeGroup } from '../../host/cgroups.ts';

/** The group that is the parent of the VM's own, which is named as its --id. */
function parentGroup(uid: number): string {
  return `kiln-${uid}`;
}

/**
 * The jailer's arguments: the version that has more of the controllers (on a hybrid host that is v1), and a limit for each
 * that it has. None on a host without cgroups.
 */
export function cgroupArguments(uid: number, limits: GroupLimits, mounts = hostMounts): string[] {
  const hierarchies = hierarchiesIn(mounts);
  const settings = (version: 1 | 2): string[] => {
    const controllers = hierarchies.filter((each) => each.version === version).flatMap((each) => each.controllers);
    const files = Object.entries(limitFiles[version](limits));
    return files
      .filter(([file]) => controllers.includes(file.split('.', 1)[0] ?? ''))
      .map(([file, value]) => `${file}=${value}`);
  };
  const [v1, v2] = [settings(1), settings(2)];
  const [version, chosen] = v1.length > v2.length ? (['1', v1] as const) : (['2', v2] as const);
  if (chosen.length === 0) return [];
  const args = ['--cgroup-version', version, '--parent-cgroup', parentGroup(uid)];
  return [...args, ...chosen.flatMap((setting) => ['--cgroup', setting])];
}

/** Removes a VM's groups, whose processes have ended. @throws Error of rmdir(2) for one that stays in use */
export async function removeCgroups(uid: number, mounts = hostMounts): Promise<void> {
  for (const { directory } of hierarchiesIn(mounts)) await removeGroup(path.join(directory, parentGroup(uid)));
}
