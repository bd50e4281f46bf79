/**
 * What a container uses: the files of its control group, as they are. Which of them means what to whom is the host's
 * business.
 *
 * Everything here is synchronous. The files are in the kernel's memory, so reading them takes some milliseconds at most,
 * and an asynchronous read would queue behind a slow unmount or flush in libuv's few threads.
 */
import { join } from 'node:path';
import type { IoStat, ReadStatsResponse } from '../gen/kiln/agent/v1/agent.ts';
import { parseFlatKeyed, parseNestedKeyed, parseValue, readIfThere } from './cgroup-file.ts';

const valueFiles = [
  'memory.current',
  'memory.max',
  'memory.peak',
  'memory.swap.current',
  'memory.swap.max',
  'pids.current',
  'pids.max',
];

/** @param cgroup the group's directory */
export function readStats(cgroup: string): ReadStatsResponse {
  const read = (name: string) => readIfThere(join(cgroup, name)) ?? '';
  const values = valueFiles.map((name) => [name, parseValue(read(name))] as const);
  const [quota = '', period = ''] = read('cpu.max').trim().split(' ');
  return {
    cpu: parseFlatKeyed(read('cpu.stat')),
    memory: parseFlatKeyed(read('memory.stat')),
    memoryEvents: parseFlatKeyed(read('memory.events')),
    values: Object.fromEntries(values.filter((entry): entry is [string, bigint] => entry[1] !== undefined)),
    io: parseIoStat(read('io.stat')),
    cpuQuotaUs: parseValue(quota),
    cpuPeriodUs: parseValue(period) ?? 0n,
  };
}

/** io.stat: `MAJOR:MINOR rbytes=N wbytes=N …`; a device without any traffic has a line without numbers, or none. */
export function parseIoStat(text: string): IoStat[] {
  return parseNestedKeyed(text).flatMap(([device, numbers]) => {
    const [, major, minor] = /^(\d+):(\d+)$/.exec(device) ?? [];
    if (major === undefined || minor === undefined || Object.keys(numbers).length === 0) return [];
    const { rbytes = 0n, wbytes = 0n, rios = 0n, wios = 0n } = numbers;
    return [{ major: Number(major), minor: Number(minor), rbytes, wbytes, rios, wios }];
  });
}
