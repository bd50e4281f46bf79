/** The measurements themselves; bench.ts prints them. */
import { busyboxImage } from '../support/images.ts';
import type { Scene } from '../support/scene.ts';
import { readTimeline } from '../support/timeline.ts';
import { cpuOf, findProcesses, memoryOf } from './processes.ts';
import { median, summary } from './statistics.ts';

const kiln = 'io.containerd.kiln.v2';
const runc = 'io.containerd.runc.v2';

export type Summary = ReturnType<typeof summary>;

export interface StartTimes {
  readonly kilnMs: Summary;
  readonly runcMs: Summary;
  readonly ratio: number;
  /** Medians, in the order in which they usually come. */
  readonly timeline: readonly {
    readonly name: string;
    readonly sinceStartMs: number;
    readonly sincePreviousMs: number;
  }[];
  /** CPU milliseconds for one container. */
  readonly cpu: { readonly kilndMs: number; readonly launcherMs: number };
}

async function timed(scene: Scene, id: string, runtime: string): Promise<number> {
  const began = performance.now();
  const result = await scene.run(id, ['true'], { runtime });
  const tookMs = performance.now() - began;
  if (result.code !== 0) throw new Error(`${runtime}: ctr ended with ${result.code}: ${result.stderr}`);
  return tookMs;
}

/**
 * `ctr run --rm … true` from ctr's start to its end, under Kiln and runc in turn, so that what else the machine does
 * meets both. One of each before the first that counts: it starts kilnd and converts the image.
 */
export async function measureStart(scene: Scene, runs: number): Promise<StartTimes> {
  await timed(scene, scene.id('warm-up'), kiln);
  await timed(scene, scene.id('warm-up'), runc);
  const [kilnd = 0] = scene.kilndPids();
  const kilnMs: number[] = [];
  const runcMs: number[] = [];
  const timelines: Map<string, number>[] = [];
  const kilndCpu: number[] = [];
  const launcherCpu: number[] = [];
  for (let n = 0; n < runs; n += 1) {
    const id = scene.id('kiln');
    // containerd waits for no children but the launcher's two calls, start and delete.
    const before = { kilnd: cpuOf(kilnd).ownMs, launcher: cpuOf(scene.containerd.pid).childrenMs };
    kilnMs.push(await timed(scene, id, kiln));
    kilndCpu.push(cpuOf(kilnd).ownMs - before.kilnd);
    launcherCpu.push(cpuOf(scene.containerd.pid).childrenMs - before.launcher);
    const marks = await readTimeline(scene.kilndLog, id);
    timelines.push(new Map(marks.map(({ name, atMs }) => [name, atMs - (marks[0]?.atMs ?? 0)])));
    runcMs.push(await timed(scene, scene.id('runc'), runc));
  }
  const names = [...(timelines[0]?.keys() ?? [])];
  const points = names
    .map((name) => ({ name, sinceStartMs: median(timelines.flatMap((timeline) => timeline.get(name) ?? [])) }))
    .sort((one, other) => one.sinceStartMs - other.sinceStartMs);
  const mean = (values: readonly number[]): number => values.reduce((sum, value) => sum + value, 0) / values.length;
  return {
    kilnMs: summary(kilnMs),
    runcMs: summary(runcMs),
    ratio: median(kilnMs) / median(runcMs),
    timeline: points.map((point, index) => ({
      ...point,
      sincePreviousMs: point.sinceStartMs - (points[index - 1]?.sinceStartMs ?? 0),
    })),
    // Means: the kernel counts in ticks of 10 ms.
    cpu: { kilndMs: mean(kilndCpu), launcherMs: mean(launcherCpu) },
  };
}

export interface MemoryUse {
  /** kilnd with so many idle containers. */
  readonly kilnd: readonly { readonly containers: number; readonly rssMib: number; readonly pssMib: number }[];
  /** Medians for one idle container, with the most containers running. */
  readonly perContainer: Readonly<Record<'vmm' | 'vsockBackend' | 'standIn' | 'relay', number>>;
}

/** Memory of kilnd with 0, 1 and `most` idle containers, and of each container's own processes. */
export async function measureMemory(scene: Scene, most: number): Promise<MemoryUse> {
  await scene.configure('');
  await timed(scene, scene.id('warm-up'), kiln);
  const [kilnd = 0] = scene.kilndPids();
  const use: { containers: number; rssMib: number; pssMib: number }[] = [];
  const note = (containers: number): void => {
    use.push({ containers, ...memoryOf(kilnd) });
  };
  note(0);
  const ids: string[] = [];
  while (ids.length < most) {
    const id = scene.id('idle');
    await scene.ctr([
      ...['run', '-d', '--null-io', '--runtime', kiln, '--fifo-dir', scene.fifoDir],
      ...[busyboxImage.name, id, 'sleep', '100000'],
    ]);
    ids.push(id);
    if (ids.length === 1 || ids.length === most) note(ids.length);
  }
  const pssOf = (...texts: string[]): number =>
    median(findProcesses(scene.stateDir, ...texts).map((pid) => memoryOf(pid).pssMib));
  const perContainer = {
    vmm: pssOf('qemu-system'),
    vsockBackend: pssOf('vhost-device-vsock'),
    standIn: pssOf('kiln-standin'),
    relay: pssOf('kiln-relay'),
  };
  await scene.purge();
  return { kilnd: use, perContainer };
}
