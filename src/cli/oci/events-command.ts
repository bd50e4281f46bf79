/**
 * `events`: what a container uses, as a stream of JSON objects, and when its memory ran out. runc(8) events.
 *
 * runc is told of an OOM by the kernel; here the count of kills is looked at with each statistics, and at the end, so an OOM
 * is told with the next of them.
 */
import { setTimeout as delay } from 'node:timers/promises';
import { type Command, InvalidArgumentError } from 'commander';
import { KilnError } from '../../errors.ts';
import { stringifyJson } from '../../oci/json.ts';
import type { RuntimeStats, TaskStats } from '../../shim/runtime-stats.ts';
import type { TaskClient } from '../../shim/task-client.ts';
import type { OciRuntime } from './runtime.ts';

interface EventsOptions {
  /** In ms. */
  readonly interval: number;
  readonly stats?: boolean;
}

export function addEvents(program: Command, runtime: () => OciRuntime): void {
  program
    .command('events <id>')
    .description('print what a container uses, again and again, and when its memory ran out')
    .option('--interval <duration>', 'time between statistics, as 5s, 500ms or 1m30s', durationMs, 5000)
    .option('--stats', 'print its statistics once')
    .action(async (id: string, { interval, stats = false }: EventsOptions) => {
      const found = runtime();
      const state = found.states.read(id);
      if (interval <= 0) throw new KilnError('invalid-argument', 'duration interval must be greater than 0');
      if ((await found.status(state)) === 'stopped') {
        throw new KilnError('failed-precondition', `container with id ${id} is not running`);
      }
      await found.withTask(id, async (task, kilndId) => {
        if (stats) print(id, 'stats', (await task.stats(kilndId)).stats);
        else await follow(id, interval, task, kilndId);
      });
    });
}

async function follow(id: string, intervalMs: number, task: TaskClient, kilndId: string): Promise<void> {
  let kills = 0n;
  const tellOom = ({ oomKills }: TaskStats) => {
    if (oomKills > kills) print(id, 'oom');
    kills = oomKills;
  };
  let ended = false;
  // One that nobody knows of any more has ended, too.
  const end = task.wait(kilndId).then(
    () => {
      ended = true;
    },
    () => {
      ended = true;
    },
  );
  ({ oomKills: kills } = await task.stats(kilndId));
  while (!ended) {
    await Promise.race([end, delay(intervalMs, undefined, { ref: false })]);
    const current = await statsIfThere(task, kilndId);
    if (current === undefined) return;
    tellOom(current);
    if (!ended) print(id, 'stats', current.stats);
  }
}

/** Undefined for one that has been deleted meanwhile. */
async function statsIfThere(task: TaskClient, kilndId: string): Promise<TaskStats | undefined> {
  try {
    return await task.stats(kilndId);
  } catch (error) {
    const { code } = KilnError.from(error);
    if (code === 'not-found' || code === 'unavailable') return undefined;
    throw error;
  }
}

function print(id: string, type: 'stats' | 'oom', data?: RuntimeStats): void {
  process.stdout.write(`${stringifyJson({ type, id, ...(data === undefined ? {} : { data }) })}\n`);
}

const unitsMs: Readonly<Record<string, number>> = {
  ns: 1e-6,
  us: 1e-3,
  µs: 1e-3,
  ms: 1,
  s: 1000,
  m: 60_000,
  h: 3_600_000,
};

/** As Go's time.ParseDuration. */
export function durationMs(text: string): number {
  if (text === '0') return 0;
  const parts = [...text.matchAll(/(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)/g)];
  if (parts.length === 0 || parts.map(([part]) => part).join('') !== text) {
    throw new InvalidArgumentError('must be a duration, such as 5s');
  }
  return parts.reduce((sum, [, count, unit = '']) => sum + Number(count) * (unitsMs[unit] ?? 0), 0);
}
