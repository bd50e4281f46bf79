/** Many containers at once, beside as many of runc's. */
import type { Scene } from '../support/scene.ts';
import { readTimeline } from '../support/timeline.ts';
import { type Bar, bars } from './plot.ts';
import { type Summary, summary, table } from './statistics.ts';
import { colourOfWay, configOf, kiln, poolFull, runc, timedRun, type Way, wayOf } from './ways.ts';

export interface Batch {
  /** From the start of all to the end of the last. */
  readonly wallMs: number;
  /** Of those that ended well. */
  readonly eachMs: Summary;
  readonly failures: readonly string[];
  readonly ids: readonly string[];
}

export interface ParallelUse {
  readonly kernel: string;
  readonly batches: readonly {
    readonly way: Way;
    readonly atOnce: number;
    readonly kiln: Batch;
    readonly runc: Batch;
    /** Kiln's that came to their virtual machine another way. */
    readonly others: number;
  }[];
}

export interface ParallelOptions {
  readonly ways: readonly Way[];
  readonly kernel: string;
  /** How many at once. */
  readonly sizes: readonly number[];
}

/** `ctr run --rm … true`, so many at once. A pool has as many virtual machines, and is full before. */
export async function measureParallel(scene: Scene, { ways, kernel, sizes }: ParallelOptions): Promise<ParallelUse> {
  const batches: ParallelUse['batches'][number][] = [];
  for (const way of ways) {
    for (const atOnce of sizes) {
      await scene.configure(configOf({ way, kernel }, atOnce));
      await timedRun(scene, kiln);
      await timedRun(scene, runc);
      if (way === 'pool') await poolFull(scene, atOnce);
      const ofKiln = await batch(scene, kiln, atOnce);
      const others = await countOthers(scene, way, ofKiln.ids);
      // What has failed may have left something, and runc would run while the pool fills again.
      await scene.purge();
      await scene.configure('');
      batches.push({ way, atOnce, kiln: ofKiln, runc: await batch(scene, runc, atOnce), others });
    }
  }
  return { kernel, batches };
}

async function batch(scene: Scene, runtime: string, atOnce: number): Promise<Batch> {
  const ids = Array.from({ length: atOnce }, () => scene.id('parallel'));
  const began = performance.now();
  const ends = await Promise.allSettled(ids.map((id) => timedRun(scene, runtime, id)));
  const wallMs = performance.now() - began;
  return {
    wallMs,
    eachMs: summary(ends.flatMap((end) => (end.status === 'fulfilled' ? [end.value] : []))),
    failures: ends.flatMap((end) => (end.status === 'rejected' ? [String(end.reason)] : [])),
    ids,
  };
}

async function countOthers(scene: Scene, way: Way, ids: readonly string[]): Promise<number> {
  let others = 0;
  for (const id of ids) {
    // What has failed may have none, and is counted as failed.
    const marks = await readTimeline(scene.kilndLog, id).catch(() => undefined);
    if (marks !== undefined && wayOf(marks.map(({ name }) => name)) !== way) others += 1;
  }
  return others;
}

const s = (ms: number): string => (Number.isFinite(ms) ? (ms / 1000).toFixed(2) : '-');

export function describeParallel({ kernel, batches }: ParallelUse): string {
  const cells = ({ wallMs, eachMs, failures }: Batch): string[] => {
    return [s(wallMs), s(eachMs.median), s(eachMs.p95), String(failures.length)];
  };
  return [
    `\nctr run --rm … true, so many at once, ${kernel} kernel, in s: until all have ended, and each`,
    table([
      ['', 'at once', 'all', 'median', 'p95', 'failed'],
      ...batches.flatMap(({ way, atOnce, ...both }) => [
        [way, String(atOnce), ...cells(both.kiln)],
        ['  runc', String(atOnce), ...cells(both.runc)],
      ]),
    ]),
    ...batches
      .filter(({ others }) => others > 0)
      .map(({ way, atOnce, others }) => `  ${way}, ${atOnce} at once: ${others} came another way`),
    ...batches.flatMap(({ way, atOnce, ...both }) => {
      const failures = [...both.kiln.failures, ...both.runc.failures];
      return failures.slice(0, 1).map((first) => `  ${way}, ${atOnce} at once: the first failure: ${first}`);
    }),
  ].join('\n');
}

export function plotParallel({ kernel, batches }: ParallelUse): string {
  const groups = batches.map(({ way, atOnce, ...both }): Bar[] => [
    { label: `${atOnce} at once, ${way}`, colour: colourOfWay(way), value: both.kiln.wallMs / 1000 },
    { label: 'runc', colour: 0, value: both.runc.wallMs / 1000 },
  ]);
  return bars({ title: `ctr run --rm … true until all have ended, ${kernel} kernel`, unit: 's', groups });
}
