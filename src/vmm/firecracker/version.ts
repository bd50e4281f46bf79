import { KilnError } from '../../errors.ts';

/** The oldest release that Kiln speaks to, as `[major, minor]`. */
const oldestVersion = [1, 13] as const;

/** Throws `failed-precondition` for a Firecracker that is too old, or of another major version. */
export function requireSupportedVersion(version: string): void {
  const [, major, minor] = /^v?(\d+)\.(\d+)\./.exec(version) ?? [];
  if (Number(major) === oldestVersion[0] && Number(minor) >= oldestVersion[1]) return;
  throw new KilnError('failed-precondition', `Firecracker ${version} is not supported`, {
    hint: `install version ${oldestVersion.join('.')} or newer, or set vm.vmm = "qemu" in the config file`,
  });
}
