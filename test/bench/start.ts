/** How long a container takes, by each way to its virtual machine, beside runc's. */
import type { Scene } from '../support/scene.ts';
import { readTimeline } from '../support/timeline.ts';
import { bars } from './plot.ts';
import { cpuOf, exactCpuOf } from './processes.ts';
import { mean, median, type Summary, summary, table } from './statistics.ts';
import { colourOfWay, configOf, kiln, poolFull, runc, timedRun, type Variant, wayOf } from './ways.ts';

export interface StartTimes extends Variant {
  readonly kilnMs: Summary;
  /** Of the runs of runc in turn with these. */
  readonly runcMs: Summary;
  readonly ratio: number;
  /** Containers that came to their virtual machine another way. */
  readonly others: number;
  /** Medians, in the order in which they usually come. */
  readonly timeline: readonly {
    readonly name: string;
    readonly sinceStartMs: number;
    readonly sincePreviousMs: number;
  }[];
  /** CPU milliseconds for one container: a median and a mean. */
  readonly cpu: { readonly kilndMs: number; readonly launcherMs: number };
}

export interface StartUse {
  /** Of all of its runs. */
  readonly runcMs: Summary;
  readonly variants: readonly StartTimes[];
}

export async function measureStart(scene: Scene, variants: readonly Variant[], runs: number): Promise<StartUse> {
  const runcMs: number[] = [];
  const measured: StartTimes[] = [];
  for (const variant of variants) measured.push(await measureVariant(scene, variant, { runs, runcMs }));
  await scene.configure('');
  return { runcMs: summary(runcMs), variants: measured };
}

/**
 * `ctr run --rm … true` from ctr's start to its end, under Kiln and runc in turn, so that what else the machine does
 * meets both. One of each before the first that counts: it starts kilnd, converts the image and makes the template.
 */
async function measureVariant(
  scene: Scene,
  variant: Variant,
  { runs, runcMs: allOfRunc }: { runs: number; runcMs: number[] },
): Promise<StartTimes> {
  await scene.configure(configOf(variant));
  const ready = async (): Promise<void> => {
    if (variant.way === 'pool') await poolFull(scene, 1);
  };
  await timedRun(scene, kiln);
  await timedRun(scene, runc);
  const [kilnd = 0] = scene.kilndPids();
  const kilnMs: number[] = [];
  const runcMs: number[] = [];
  const timelines: Map<string, number>[] = [];
  const kilndCpu: number[] = [];
  const launcherCpu: number[] = [];
  for (let n = 0; n < runs; n += 1) {
    await ready();
    const id = scene.id('kiln');
    // containerd waits for no children but the launcher's two calls, start and delete.
    const before = { kilnd: exactCpuOf(kilnd), launcher: cpuOf(scene.containerd.pid).childrenMs };
    kilnMs.push(await timedRun(scene, kiln, id));
    kilndCpu.push(exactCpuOf(kilnd) - before.kilnd);
    launcherCpu.push(cpuOf(scene.containerd.pid).childrenMs - before.launcher);
    const marks = await readTimeline(scene.kilndLog, id);
    timelines.push(new Map(marks.map(({ name, atMs }) => [name, atMs - (marks[0]?.atMs ?? 0)])));
    // Else runc would run beside the making of the pool's next virtual machine.
    await ready();
    runcMs.push(await timedRun(scene, runc));
  }
  allOfRunc.push(...runcMs);
  return {
    ...variant,
    kilnMs: summary(kilnMs),
    runcMs: summary(runcMs),
    ratio: median(kilnMs) / median(runcMs),
    others: timelines.filter((timeline) => wayOf(timeline.keys()) !== variant.way).length,
    timeline: medianTimeline(timelines),
    // A mean of what the kernel counts in ticks of 10 ms.
    cpu: { kilndMs: median(kilndCpu), launcherMs: mean(launcherCpu) },
  };
}

function medianTimeline(timelines: readonly ReadonlyMap<string, number>[]): StartTimes['timeline'] {
  const names = [...(timelines[0]?.keys() ?? [])];
  const points = names
    .map((name) => ({ name, sinceStartMs: median(timelines.flatMap((timeline) => timeline.get(name) ?? [])) }))
    .sort((one, other) => one.sinceStartMs - other.sinceStartMs);
  return points.map((point, index) => ({
    ...point,
    sincePreviousMs: point.sinceStartMs - (points[index - 1]?.sinceStartMs ?? 0),
  }));
}

const nameOf = ({ way, kernel }: Variant): string => `${way}, ${kernel} kernel`;
const ms = (value: number): string => value.toFixed(0);

export function describeStart({ runcMs, variants }: StartUse): string {
  const times = ({ median, p95, min, max }: Summary): string[] => [median, p95, min, max].map(ms);
  const rows = variants.map((variant) => {
    const { kilndMs, launcherMs } = variant.cpu;
    return [nameOf(variant), ...times(variant.kilnMs), variant.ratio.toFixed(1), ms(kilndMs), ms(launcherMs)];
  });
  return [
    `\nctr run --rm … true, ${variants[0]?.kilnMs.n} times each in turn with runc, in ms; CPU on the host for one, in ms`,
    table([
      ['', 'median', 'p95', 'least', 'most', ': runc', 'kilnd CPU', 'launcher CPU'],
      ['runc', ...times(runcMs), '1.0', '-', '-'],
      ...rows,
    ]),
    '  ": runc" is to those runs of runc that were in turn with it',
    ...variants
      .filter(({ others }) => others > 0)
      .map((variant) => `  ${nameOf(variant)}: ${variant.others} of ${variant.kilnMs.n} came another way`),
    ...variants.flatMap((variant) => [
      `\nwhere the time goes: ${nameOf(variant)} (medians, in ms)`,
      table([
        ['', 'at', '+'],
        ...variant.timeline.map(({ name, sinceStartMs, sincePreviousMs }) => {
          return [name, ms(sinceStartMs), ms(sincePreviousMs)];
        }),
      ]),
    ]),
  ].join('\n');
}

export function plotStart({ runcMs, variants }: StartUse): string {
  return bars({
    title: 'ctr run --rm … true, median',
    unit: 'ms',
    groups: [
      [{ label: 'runc', colour: 0, value: runcMs.median }],
      ...Object.values(Object.groupBy(variants, ({ way }) => way)).map((group = []) =>
        group.map((variant) => ({
          label: nameOf(variant),
          colour: colourOfWay(variant.way),
          value: variant.kilnMs.median,
        })),
      ),
    ],
  });
}
