/**
 * linux.resources of a running container, as containerd's Update hands it over: the files of cgroup v2 to write in the
 * guest. crun does the same for a new container, and the conversions here are those of Debian's crun 1.8.
 */

import { z } from 'zod';
import { KilnError } from '../errors.ts';
import { integer, jsonPath } from './bundle.ts';
import { partialTranslation } from './field-rules.ts';
import { type Integer, parseJson } from './json.ts';
import { translateResources } from './resources.ts';

/** A file of a control group, and what to write into it. */
export interface LimitFile {
  readonly name: string;
  readonly content: string;
}

/** What a container has now; the spec gives some limits as a part of another. */
export interface CurrentLimits {
  readonly memoryUsageBytes: bigint;
  /** Null for no limit. */
  readonly memoryLimitBytes: bigint | null;
  readonly cpuQuotaUs: bigint | null;
  readonly cpuPeriodUs: bigint;
}

const object = z.looseObject;

const schema = object({
  memory: object({
    limit: integer.optional(),
    reservation: integer.optional(),
    swap: integer.optional(),
    checkBeforeUpdate: z.boolean().optional(),
  }).optional(),
  cpu: object({
    shares: integer.optional(),
    quota: integer.optional(),
    period: integer.optional(),
    idle: integer.optional(),
    cpus: z.string().optional(),
    mems: z.string().optional(),
  }).optional(),
  pids: object({ limit: integer.optional() }).optional(),
  blockIO: object({ weight: integer.optional() }).optional(),
  hugepageLimits: z.array(object({ pageSize: z.string(), limit: integer })).optional(),
  unified: z.record(z.string(), z.string()).optional(),
});

export type LimitResources = z.infer<typeof schema>;

/** @throws KilnError invalid-argument for what is no LinuxResources, with the JSON path of what is wrong */
export function parseLimitResources(json: string): LimitResources {
  let parsed: unknown;
  try {
    parsed = parseJson(json);
  } catch (error) {
    throw new KilnError('invalid-argument', `the resources are not valid JSON: ${String(error)}`, { cause: error });
  }
  const result = schema.safeParse(parsed);
  if (result.success) return result.data;
  const issue = result.error.issues[0];
  throw new KilnError('invalid-argument', `resources: ${jsonPath(issue?.path ?? [])}: ${issue?.message}`, {
    cause: result.error,
  });
}

/**
 * What to write, in this order. Fields that are absent, 0 or empty ask for no change.
 *
 * @param id the container's, for messages
 * @throws KilnError unimplemented for a limit that cgroup v2 does not know, invalid-argument for one that contradicts
 * another, failed-precondition for a memory limit below the use where that is to be checked
 */
export function toLimitFiles(
  id: string,
  resources: LimitResources,
  current: CurrentLimits,
): { files: LimitFile[]; warnings: string[] } {
  // Its rules are those of a new container, except that processors are the guest's here. Rules for devices are in force
  // since the container was made; containerd sends them along, and runc does not look at them either.
  const { devices, ...others } = resources;
  const { cpus, mems, ...cpu } = resources.cpu ?? {};
  const translation = partialTranslation(id, '');
  const { warnings } = translation;
  const known = translateResources({ ...others, cpu }, 'resources', translation);
  const { unified = {}, hugepageLimits = [] } = known as LimitResources;
  const files = [
    ...memoryFiles(resources.memory ?? {}, current),
    ...cpuFiles(resources.cpu ?? {}, current),
    ...file('pids.max', maxIfNegative(resources.pids?.limit)),
    ...blockIoFiles(resources.blockIO?.weight),
    ...hugepageLimits.map(({ pageSize, limit }) => ({ name: `hugetlb.${pageSize}.max`, content: String(limit) })),
    ...Object.entries(unified).map(([name, content]) => ({ name: requireLimitName(name), content })),
  ];
  return { files: files.filter((wanted) => !isCurrent(wanted, current)), warnings };
}

/** True for what needs no change. containerd's CRI repeats all limits, also those that a small VM has made meaningless. */
function isCurrent(
  { name, content }: LimitFile,
  { memoryLimitBytes, cpuQuotaUs, cpuPeriodUs }: CurrentLimits,
): boolean {
  if (name === 'memory.max') return content === String(memoryLimitBytes ?? 'max');
  return name === 'cpu.max' && content === `${cpuQuotaUs ?? 'max'} ${cpuPeriodUs}`;
}

function file(name: string, content: Integer | string | undefined): LimitFile[] {
  return content === undefined || isNothing(content) ? [] : [{ name, content: String(content) }];
}

function isNothing(value: Integer | string): boolean {
  return value === '' || value === 0 || value === 0n;
}

/** The spec's -1 is the kernel's max. */
function maxIfNegative(value: Integer | undefined): Integer | string | undefined {
  return value !== undefined && value < 0 ? 'max' : value;
}

function memoryFiles(memory: NonNullable<LimitResources['memory']>, current: CurrentLimits): LimitFile[] {
  const { limit, reservation, swap, checkBeforeUpdate } = memory;
  if (checkBeforeUpdate && limit !== undefined && limit > 0 && BigInt(limit) < current.memoryUsageBytes) {
    throw new KilnError(
      'failed-precondition',
      `a memory limit of ${limit} bytes is less than the ${current.memoryUsageBytes} bytes in use`,
    );
  }
  return [
    ...file('memory.max', maxIfNegative(limit)),
    ...swapFile(swap, limit, current),
    ...file('memory.low', maxIfNegative(reservation)),
  ];
}

/** The spec's swap is memory and swap together, cgroup v2's is swap alone. */
function swapFile(swap: Integer | undefined, limit: Integer | undefined, current: CurrentLimits): LimitFile[] {
  if (swap === undefined || Number(swap) === 0) return [];
  if (swap < 0) return [{ name: 'memory.swap.max', content: 'max' }];
  const given = limit === undefined || Number(limit) === 0 ? current.memoryLimitBytes : BigInt(limit);
  if (given === null || given < 0n) {
    throw new KilnError('invalid-argument', `a limit of ${swap} bytes for memory and swap needs a limit of memory`);
  }
  const swapBytes = BigInt(swap) - given;
  if (swapBytes < 0n) {
    throw new KilnError(
      'invalid-argument',
      `a limit of ${swap} bytes for memory and swap is less than the memory limit of ${given} bytes`,
    );
  }
  return [{ name: 'memory.swap.max', content: String(swapBytes) }];
}

function cpuFiles(cpu: NonNullable<LimitResources['cpu']>, current: CurrentLimits): LimitFile[] {
  const { shares, quota, period, idle, cpus, mems } = cpu;
  return [
    ...(idle === undefined ? [] : [{ name: 'cpu.idle', content: String(idle) }]),
    ...(shares === undefined || Number(shares) === 0 ? [] : [{ name: 'cpu.weight', content: weightOfShares(shares) }]),
    ...cpuMax(quota, period, current),
    ...file('cpuset.cpus', cpus),
    ...file('cpuset.mems', mems),
  ];
}

/** 2 to 262144 shares as a weight of 1 to 10000. */
function weightOfShares(shares: Integer): string {
  const within = Math.min(Math.max(Number(shares), 2), 262_144);
  return String(1 + Math.floor(((within - 2) * 9999) / 262_142));
}

/** One file has both: what is not given stays as it is. */
function cpuMax(quota: Integer | undefined, period: Integer | undefined, current: CurrentLimits): LimitFile[] {
  const newQuota = Number(quota ?? 0) === 0 ? (current.cpuQuotaUs ?? 'max') : maxIfNegative(quota);
  const newPeriod = Number(period ?? 0) === 0 ? current.cpuPeriodUs : period;
  if (Number(quota ?? 0) === 0 && Number(period ?? 0) === 0) return [];
  return [{ name: 'cpu.max', content: `${newQuota} ${newPeriod}` }];
}

/** 10 to 1000, as io.weight's 1 to 10000. */
function blockIoFiles(weight: Integer | undefined): LimitFile[] {
  if (weight === undefined || Number(weight) === 0) return [];
  return [{ name: 'io.weight', content: String(1 + Math.floor(((Number(weight) - 10) * 9999) / 990)) }];
}

/** `cgroup.*` moves, freezes and kills processes: no limits. */
function requireLimitName(name: string): string {
  if (/^(?!cgroup\.)[a-z0-9]+(\.[A-Za-z0-9_]+)+$/.test(name)) return name;
  throw new KilnError('invalid-argument', `resources.unified: "${name}" is no limit of cgroup v2`);
}
