/**
 * linux.resources: limits, set by crun in the guest on the container's cgroup.
 *
 * The spec was written for cgroup v1. Of its limits, cgroup v2 (the only one in the guest) knows most under other names;
 * crun translates them. What v2 does not know crun 1.8 refuses half way through `create`; it is refused here, before a
 * virtual machine is started, and left out where it asks for nothing.
 */
import { KilnError } from '../errors.ts';
import {
  applyRules,
  drop,
  isEmpty,
  keep,
  nested,
  type Rules,
  refuse,
  type Translation,
  translate,
} from './field-rules.ts';
import type { Integer } from './json.ts';
import type { DeviceRule, Resources } from './spec.ts';

const notInV2 = 'cgroup v2, which the guest uses, has no such limit';
/** Of an x86-64 kernel. */
const pageSizes = ['2MB', '1GB'];
const hostNumbers = "device numbers are the host's and name other devices in the guest";

/** A limit that v2 does not know; not positive is how the spec says "no limit". */
const refuseLimit = translate<Integer>((limit, path, translation) => {
  return limit > 0 ? refuse(notInV2).apply(limit, path, translation) : undefined;
});

const memoryRules: Rules = {
  limit: keep,
  reservation: keep,
  swap: keep,
  kernel: refuseLimit,
  kernelTCP: refuseLimit,
  swappiness: drop('not applied: the guest has no swap'),
  disableOOMKiller: refuse('cgroup v2, which the guest uses, cannot switch off the OOM killer'),
  // v2 always accounts by hierarchy, and a container's cgroup is a leaf.
  useHierarchy: drop(),
  checkBeforeUpdate: keep,
};

const cpuRules: Rules = {
  shares: keep,
  quota: keep,
  // Becomes unified["cpu.max.burst"]: crun 1.8 does not know the field.
  burst: translate(() => undefined),
  period: keep,
  realtimeRuntime: refuseLimit,
  realtimePeriod: refuseLimit,
  cpus: refuse("pinning to the host's CPUs is not supported yet"),
  mems: refuse("pinning to the host's memory nodes is not supported yet"),
  idle: keep,
};

const blockIoRules: Rules = {
  weight: keep,
  leafWeight: refuse(notInV2),
  weightDevice: refuse(hostNumbers),
  throttleReadBpsDevice: refuse(hostNumbers),
  throttleWriteBpsDevice: refuse(hostNumbers),
  throttleReadIOPSDevice: refuse(hostNumbers),
  throttleWriteIOPSDevice: refuse(hostNumbers),
};

const rules: Rules = {
  devices: translate<readonly DeviceRule[]>((list, _path, { blockDevices }) => blockDevices.translateRules(list)),
  memory: nested(memoryRules),
  cpu: nested(cpuRules),
  pids: keep,
  blockIO: nested(blockIoRules),
  hugepageLimits: translate<readonly { readonly pageSize: string; readonly limit: Integer }[]>((limits, path) => {
    for (const [index, { pageSize, limit }] of limits.entries()) {
      if (limit <= 0 || pageSizes.includes(pageSize)) continue;
      const at = `${path}[${index}].pageSize`;
      throw new KilnError('invalid-argument', `${at}: the guest has no huge pages of ${pageSize}`);
    }
    // Kubernetes sets a limit of 0 for every page size; the guest, which has no huge pages unless the container asks
    // its kernel for some, need not know each size for that.
    const positive = limits.filter(({ limit }) => limit > 0);
    return positive.length === 0 ? undefined : positive;
  }),
  network: refuse(notInV2),
  rdma: refuse('the guest has no RDMA devices'),
  unified: keep,
};

/** The rules by the JSON path of their object. */
export const resourceRules: Readonly<Record<string, Rules>> = {
  'linux.resources': rules,
  'linux.resources.memory': memoryRules,
  'linux.resources.cpu': cpuRules,
  'linux.resources.blockIO': blockIoRules,
};

/** @throws KilnError unimplemented for a limit that the guest cannot keep */
export function translateResources(resources: Resources, path: string, translation: Translation): object {
  return applyRules(rules, withBurstAsFile(resources), path, translation);
}

function withBurstAsFile(resources: Resources): Resources {
  const burst = (resources.cpu as { burst?: unknown } | undefined)?.burst;
  if (isEmpty(burst)) return resources;
  return { ...resources, unified: { 'cpu.max.burst': String(burst), ...resources.unified } };
}
