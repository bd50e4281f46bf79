/** Memory of kilnd and of each container's own processes, while containers are idle. */
import type { Scene } from '../support/scene.ts';
import { idleContainer } from './exec.ts';
import { findProcesses, memoryOf } from './processes.ts';
import { median, table } from './statistics.ts';
import { kiln, timedRun } from './ways.ts';

export interface MemoryUse {
  /** kilnd with so many idle containers. */
  readonly kilnd: readonly { readonly containers: number; readonly rssMib: number; readonly pssMib: number }[];
  /** Medians for one idle container, with the most containers running; null for what it does not have. */
  readonly perContainer: Readonly<Record<'vmm' | 'vsockBackend' | 'standIn' | 'relay', number | null>>;
}

/** Memory of kilnd with 0, 1 and `most` idle containers, and of each container's own processes. */
export async function measureMemory(scene: Scene, most: number): Promise<MemoryUse> {
  await scene.configure('');
  await timedRun(scene, kiln);
  const [kilnd = 0] = scene.kilndPids();
  const use: { containers: number; rssMib: number; pssMib: number }[] = [];
  const note = (containers: number): void => {
    use.push({ containers, ...memoryOf(kilnd) });
  };
  note(0);
  const ids: string[] = [];
  while (ids.length < most) {
    ids.push(await idleContainer(scene, kiln));
    if (ids.length === 1 || ids.length === most) note(ids.length);
  }
  const pssOf = (text: string): number | null => {
    const all = findProcesses(scene.stateDir, text).map((pid) => memoryOf(pid).pssMib);
    return all.length === 0 ? null : median(all);
  };
  const perContainer = {
    vmm: pssOf('qemu-system'),
    vsockBackend: pssOf('vhost-device-vsock'),
    standIn: pssOf('kiln-standin'),
    relay: pssOf('kiln-relay'),
  };
  await scene.purge();
  return { kilnd: use, perContainer };
}

export function describeMemory({ kilnd, perContainer }: MemoryUse): string {
  const mib = (value: number): string => value.toFixed(1);
  const { vmm, vsockBackend, standIn, relay } = perContainer;
  const processes = { VMM: vmm, 'vsock backend': vsockBackend, 'stand-in': standIn, relay };
  return [
    '\nmemory of kilnd, in MiB',
    table([
      ['idle containers', 'RSS', 'PSS'],
      ...kilnd.map(({ containers, rssMib, pssMib }) => [String(containers), mib(rssMib), mib(pssMib)]),
    ]),
    '\nmemory of one idle container on the host (PSS, median, in MiB)',
    table(Object.entries(processes).flatMap(([name, pss]) => (pss === null ? [] : [[name, mib(pss)]]))),
  ].join('\n');
}
