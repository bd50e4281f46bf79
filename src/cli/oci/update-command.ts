/**
 * `update`: limits of a container that is there. Docker gives them as JSON on stdin, podman in a file, people by flags.
 * What its virtual machine cannot keep is refused by kilnd, and nothing is changed then.
 */
import { readFileSync } from 'node:fs';
import type { Command } from 'commander';
import { KilnError } from '../../errors.ts';
import { parseLimitResources } from '../../oci/limits.ts';
import type { OciRuntime } from './runtime.ts';

/** runc's flags, and the field of linux.resources that each sets. */
const flags: Readonly<Record<string, { readonly field: string; readonly read: 'number' | 'bytes' | 'text' }>> = {
  blkioWeight: { field: 'blockIO.weight', read: 'number' },
  cpuPeriod: { field: 'cpu.period', read: 'number' },
  cpuQuota: { field: 'cpu.quota', read: 'number' },
  cpuBurst: { field: 'cpu.burst', read: 'number' },
  cpuShare: { field: 'cpu.shares', read: 'number' },
  cpuRtPeriod: { field: 'cpu.realtimePeriod', read: 'number' },
  cpuRtRuntime: { field: 'cpu.realtimeRuntime', read: 'number' },
  cpuIdle: { field: 'cpu.idle', read: 'number' },
  cpusetCpus: { field: 'cpu.cpus', read: 'text' },
  cpusetMems: { field: 'cpu.mems', read: 'text' },
  memory: { field: 'memory.limit', read: 'bytes' },
  memoryReservation: { field: 'memory.reservation', read: 'bytes' },
  memorySwap: { field: 'memory.swap', read: 'bytes' },
  pidsLimit: { field: 'pids.limit', read: 'number' },
};

type UpdateOptions = Readonly<Record<string, string | undefined>>;

export function addUpdate(program: Command, runtime: () => OciRuntime): void {
  program
    .command('update <id>')
    .description('change the limits of a container')
    .option(
      '-r, --resources <file>',
      'linux.resources as JSON, from a file or "-" for stdin; other flags do not count then',
    )
    .option('--blkio-weight <n>', 'weight of its disk traffic, 10 to 1000')
    .option('--cpu-period <us>', 'period of its CPU quota, in microseconds')
    .option('--cpu-quota <us>', 'CPU time in each period, in microseconds; -1 for no limit')
    .option('--cpu-burst <us>', 'CPU time that may be saved up, in microseconds')
    .option('--cpu-share <n>', 'weight of its CPU time, 2 to 262144')
    .option('--cpu-rt-period <us>', 'refused: the guest’s cgroup v2 has no such limit')
    .option('--cpu-rt-runtime <us>', 'refused: the guest’s cgroup v2 has no such limit')
    .option('--cpu-idle <n>', '1: it runs only when nothing else does')
    .option('--cpuset-cpus <list>', 'CPUs of its virtual machine, as 0-2,5')
    .option('--cpuset-mems <list>', 'memory nodes of its virtual machine, which has one: 0')
    .option('--memory <bytes>', 'limit of memory, with b, k, m or g; -1 for no limit')
    .option('--memory-reservation <bytes>', 'memory that is not taken from it')
    .option('--memory-swap <bytes>', 'limit of memory and swap together')
    .option('--kernel-memory <bytes>', 'accepted, and ignored as by runc')
    .option('--kernel-memory-tcp <bytes>', 'accepted, and ignored as by runc')
    .option('--pids-limit <n>', 'most processes that it may have; -1 for no limit')
    .option('--l3-cache-schema <schema>', 'refused: caches are shared out by the host, not in the guest')
    .option('--mem-bw-schema <schema>', 'refused: memory bandwidth is shared out by the host, not in the guest')
    .action(async (id: string, options: UpdateOptions) => {
      const found = runtime();
      found.states.read(id);
      const resources = options.resources === undefined ? resourcesOf(options) : readResources(options.resources);
      await found.withTask(id, (task, kilndId) => task.update(kilndId, resources));
    });
}

/** linux.resources, as JSON, of the flags. @throws KilnError invalid-argument, in runc's words */
export function resourcesOf(options: UpdateOptions): string {
  for (const [flag, name] of [
    ['l3CacheSchema', 'l3-cache-schema'],
    ['memBwSchema', 'mem-bw-schema'],
  ] as const) {
    if (options[flag] === undefined) continue;
    throw new KilnError(
      'unimplemented',
      `--${name}: caches and memory bandwidth are shared out by the host, not in the guest`,
    );
  }
  const resources: Record<string, Record<string, string | number>> = {};
  for (const [flag, { field, read }] of Object.entries(flags)) {
    const given = options[flag];
    if (given === undefined || given === '') continue;
    const [group = '', name = ''] = field.split('.');
    const value = read === 'text' ? given : read === 'bytes' ? bytesOf(given) : integerOf(given);
    if (value === undefined) throw new KilnError('invalid-argument', `invalid value for ${dashed(flag)}: ${given}`);
    resources[group] = { ...resources[group], [name]: value };
  }
  return JSON.stringify(resources);
}

function readResources(from: string): string {
  let text: string;
  try {
    text = readFileSync(from === '-' ? 0 : from, 'utf8');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    throw new KilnError('invalid-argument', `cannot read the resources from ${from}: ${code}`, { cause: error });
  }
  // kilnd would find it, too; here it names the file.
  try {
    parseLimitResources(text);
  } catch (error) {
    const { code, message } = KilnError.from(error);
    throw new KilnError(code, `${from === '-' ? 'stdin' : from}: ${message}`, { cause: error });
  }
  return text;
}

function integerOf(text: string): number | undefined {
  return /^-?\d+$/.test(text) && Number.isSafeInteger(Number(text)) ? Number(text) : undefined;
}

/** As docker/go-units RAMInBytes: units are powers of 1024, and -1 is no limit. */
function bytesOf(text: string): number | undefined {
  if (text === '-1') return -1;
  const [, count = '', unit = ''] = /^(\d+(?:\.\d+)?) ?([kmgtp]?)(?:i?b)?$/i.exec(text) ?? [];
  if (count === '') return undefined;
  const bytes = Math.floor(Number(count) * 1024 ** ' kmgtp'.indexOf(unit === '' ? ' ' : unit.toLowerCase()));
  return Number.isSafeInteger(bytes) ? bytes : undefined;
}

function dashed(flag: string): string {
  return flag.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
}
