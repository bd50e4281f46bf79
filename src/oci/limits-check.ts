/** Whether a virtual machine can keep what limits promise. A limit above it would be no limit, and promise too much. */
import { KilnError } from '../errors.ts';
import type { LimitFile } from './limits.ts';

const mib = 1024 * 1024;

/** The most memory that the limits promise, in bytes; 0 when they promise none. */
export function promisedMemory(files: readonly LimitFile[]): number {
  const promises = files.filter(({ name }) => name === 'memory.max' || name === 'memory.low' || name === 'memory.min');
  return Math.max(0, ...promises.map(({ content }) => Number(content.trim())).filter(Number.isFinite));
}

/** The error for more memory than there is. */
export function tooMuchMemory(bytes: number, haveBytes: number): KilnError {
  const [wanted, have] = [Math.ceil(bytes / mib), Math.floor(haveBytes / mib)];
  return new KilnError(
    'resource-exhausted',
    `a memory limit of ${wanted} MiB is more than the ${have} MiB that the container's virtual machine has`,
    { hint: 'its size is fixed when the container is created; see docs/resources.md' },
  );
}

/**
 * @param vcpus CPUs of the virtual machine; it has one memory node
 * @throws KilnError resource-exhausted, with both numbers
 */
export function requireCpus(files: readonly LimitFile[], vcpus: number): void {
  for (const { name, content } of files) {
    if (name === 'cpu.max') requireQuota(content, vcpus);
    if (name === 'cpuset.cpus') requireInList('CPU', content, vcpus);
    if (name === 'cpuset.mems') requireInList('memory node', content, 1);
  }
}

function requireQuota(content: string, vcpus: number): void {
  const [quota = '', period = '100000'] = content.trim().split(' ');
  const cpus = Number(quota) / Number(period);
  // "max", and what the kernel will refuse.
  if (!Number.isFinite(cpus) || cpus <= vcpus) return;
  throw new KilnError(
    'resource-exhausted',
    `a CPU quota of ${quota} µs in each ${period} µs is ${Number(cpus.toFixed(2))} CPUs, more than the ${vcpus} that the ` +
      "container's virtual machine has",
    { hint: 'its size is fixed when the container is created; see docs/resources.md' },
  );
}

/** A list such as `0-2,5` (cpuset(7), "List format"), of things numbered from 0. */
function requireInList(what: string, list: string, count: number): void {
  for (const range of list.trim().split(',').filter(Boolean)) {
    const [, first = '', last = first] = /^\s*(\d+)(?:-(\d+))?\s*$/.exec(range) ?? [];
    if (first === '') throw new KilnError('invalid-argument', `"${list}" is no list of ${what}s: write it as 0-2,5`);
    if (Math.max(Number(first), Number(last)) < count) continue;
    throw new KilnError(
      'resource-exhausted',
      `${what} ${range.trim()} of "${list}" does not exist: the container's virtual machine has ${count} ${what}${count === 1 ? '' : 's'}, numbered from 0`,
    );
  }
}
