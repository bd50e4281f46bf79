/** How large a container's virtual machine has to be. */
import { availableParallelism, totalmem } from 'node:os';
import { parseAnnotations } from '../config/annotations.ts';
import type { KilnConfig } from '../config/config.ts';
import { KilnError } from '../errors.ts';
import type { Spec } from './spec.ts';

export interface VmSize {
  /** Guest memory in MiB. */
  readonly memoryMib: number;
  readonly vcpus: number;
}

export interface HostSize {
  /** MemTotal in MiB. */
  readonly memoryMib: number;
  /** CPUs that this process may run on. */
  readonly cpus: number;
}

/** What the guest's kernel, agent and page tables need beside the container's own limit. */
export const guestOverheadMib = 128;

/** Of a pod with small limits, so that its containers' programs have some page cache. */
const leastPodMib = 192;

/** Sizes of pods' VMs are multiples of it, so that there are templates for few. The RuntimeClass's overhead allows for it. */
const podStepMib = 64;

const mib = 1024 * 1024;

/** The kernel's default of cpu.max: 100 ms. Documentation/admin-guide/cgroup-v2.rst. */
const defaultPeriodUs = 100_000;

/** Runtimes write "unlimited" as -1 or as a number near 2^63 (v1's PAGE_COUNTER_MAX); no host has 2^60 bytes. */
const unlimitedBytes = 2 ** 60;

/**
 * The VM's memory and CPUs: as the annotation says, else what the configuration says, but at least what the container's
 * own limits allow it to use.
 *
 * @throws KilnError invalid-argument for a bad annotation, resource-exhausted when the host is too small
 */
export function vmSize(config: KilnConfig, spec: Spec, host: HostSize = thisHost()): VmSize {
  const annotations = parseAnnotations(spec.annotations);
  return {
    memoryMib: memory(config, spec, annotations.memoryMib, host),
    vcpus: cpus(config, spec, annotations.vcpus, host),
  };
}

/**
 * As `vmSize`, of a pod's VM. kubelet holds the pod's control group to the limits of its containers and the RuntimeClass's
 * overhead, and a guest comes to touch all the memory that it has. So with a limit the VM is hardly larger than that and what
 * the guest needs, whatever the configuration says.
 */
export function podVmSize(config: KilnConfig, spec: Spec, host: HostSize = thisHost()): VmSize {
  const size = vmSize(config, spec, host);
  const limitMib = memoryLimitMib(spec);
  if (limitMib === undefined || parseAnnotations(spec.annotations).memoryMib !== undefined) return size;
  return {
    ...size,
    memoryMib: Math.max(podStepMib * Math.ceil((limitMib + guestOverheadMib) / podStepMib), leastPodMib),
  };
}

let host: HostSize | undefined;

/** As it was when it was asked for first: each answer is read from several files. */
export function thisHost(): HostSize {
  host ??= { memoryMib: Math.floor(totalmem() / mib), cpus: availableParallelism() };
  return host;
}

function memory(config: KilnConfig, spec: Spec, annotated: number | undefined, host: HostSize): number {
  const limitMib = memoryLimitMib(spec);
  const needed = limitMib === undefined ? 0 : limitMib + guestOverheadMib;
  const forLimit = config.template.enabled ? shapeFor(needed, host.memoryMib) : needed;
  const wanted = annotated ?? Math.max(config.vm.memoryMib, forLimit);
  if (wanted <= host.memoryMib) return wanted;
  let reason: string;
  if (annotated !== undefined) reason = `annotation io.kiln.memory_mib=${annotated}`;
  else if (wanted === config.vm.memoryMib) reason = `vm.memory_mib = ${wanted} in Kiln's configuration`;
  else reason = `the memory limit of ${limitMib} MiB and ${guestOverheadMib} MiB for the guest itself`;
  throw new KilnError('resource-exhausted', `${reason}: more than the host's ${host.memoryMib} MiB of memory`);
}

/**
 * The size of the few that there are templates for: a power of two. What a VM has beyond its container's limit costs the
 * host little, since it takes what the guest touches, and the container's control group is held to the limit.
 */
function shapeFor(neededMib: number, hostMib: number): number {
  if (neededMib === 0) return 0;
  const shape = 2 ** Math.ceil(Math.log2(neededMib));
  return shape <= hostMib ? shape : neededMib;
}

function cpus(config: KilnConfig, spec: Spec, annotated: number | undefined, host: HostSize): number {
  if (annotated !== undefined) {
    if (annotated <= host.cpus) return annotated;
    throw new KilnError('resource-exhausted', `annotation io.kiln.vcpus=${annotated}: the host has ${host.cpus} CPUs`);
  }
  return Math.min(Math.max(config.vm.vcpus, cpuLimit(spec)), host.cpus);
}

/** Bytes of memory that a container's limits let it use; undefined for no limit. */
export function memoryLimitOf(spec: Spec): number | undefined {
  const limit = Number(spec.linux?.resources?.memory?.limit ?? 0);
  return limit > 0 && limit < unlimitedBytes ? limit : undefined;
}

function memoryLimitMib(spec: Spec): number | undefined {
  const limit = memoryLimitOf(spec);
  return limit === undefined ? undefined : Math.ceil(limit / mib);
}

/** CPUs that the quota allows to keep busy; 0 for no quota. */
function cpuLimit(spec: Spec): number {
  const { quota = 0, period = 0 } = spec.linux?.resources?.cpu ?? {};
  if (quota <= 0) return 0;
  return Math.ceil(Number(quota) / (period > 0 ? Number(period) : defaultPeriodUs));
}
