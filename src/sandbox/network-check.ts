import { readFileSync } from 'node:fs';
import { KilnError } from '../errors.ts';

/**
 * Refuses to start a container in whose network namespace somebody has put an interface since Create (`ctr --cni`
 * does): Kiln cannot connect it to the guest yet, and a container that silently has no network would be worse.
 * Source of the format: proc(5), /proc/pid/net/dev.
 */
export function assertNoInterfaces(id: string, pid: number): void {
  const lines = devices(id, pid).split('\n').slice(2);
  const names = lines.map((line) => line.split(':')[0]?.trim() ?? '').filter((name) => name !== '' && name !== 'lo');
  // Kernels with sit, ip6tnl or gre built in give every new namespace these fallback devices.
  const added = names.filter(
    (name) => !/^(sit0|ip6tnl0|tunl0|gre0|gretap0|erspan0|ip_vti0|ip6_vti0|ip6gre0)$/.test(name),
  );
  if (added.length === 0) return;
  throw new KilnError(
    'unimplemented',
    `container ${id}: network interface ${added.join(', ')} cannot be connected to the VM: networks are not supported yet`,
    { hint: 'start the container without --cni' },
  );
}

function devices(id: string, pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/net/dev`, 'utf8');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    // EINVAL is what a zombie gives.
    if (code !== 'ENOENT' && code !== 'EINVAL' && code !== 'ESRCH') throw error;
    throw new KilnError('failed-precondition', `cannot start container ${id}: it has ended`, { cause: error });
  }
}
