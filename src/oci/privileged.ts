import { isGuestDevice } from './devices.ts';
import type { DeviceRule, Spec } from './spec.ts';

/** How many devices a warning names. */
const named = 5;

/**
 * `--privileged` is a list of all devices that the host has, and a rule that allows every device. A virtual machine has
 * devices of its own, which the rule allows as well; the host's are taken from the list. Without that rule somebody has asked for
 * each device of the list, and what is missing is refused (devices.ts).
 */
export function withoutDevicesOfPrivileged(spec: Spec): { readonly spec: Spec; readonly warnings: readonly string[] } {
  const { linux } = spec;
  const devices = linux?.devices ?? [];
  if (!(linux?.resources?.devices ?? []).some(allowsAll)) return { spec, warnings: [] };
  const leftOut = devices.filter((device) => !isGuestDevice(device)).map(({ path }) => path);
  if (leftOut.length === 0) return { spec, warnings: [] };
  const names = leftOut.slice(0, named).join(', ') + (leftOut.length > named ? ', …' : '');
  return {
    spec: { ...spec, linux: { ...linux, devices: devices.filter(isGuestDevice) } },
    warnings: [`privileged in the virtual machine, without the host's ${leftOut.length} devices of its own: ${names}`],
  };
}

function allowsAll({ allow, type, major, minor, access }: DeviceRule): boolean {
  const isAny = (number: DeviceRule['major']) => number === undefined || Number(number) === -1;
  const isAnyType = type === undefined || type === '' || type === 'a';
  return (
    allow === true &&
    isAnyType &&
    isAny(major) &&
    isAny(minor) &&
    ['r', 'w', 'm'].every((letter) => access?.includes(letter))
  );
}
