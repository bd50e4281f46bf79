/** The ways in which a container comes to its virtual machine, for the parts that compare them. */
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { PoolStatus } from '../../src/cli/pool.ts';
import { distBin } from '../support/paths.ts';
import type { Scene } from '../support/scene.ts';
import { mustRun } from '../support/spawn.ts';

export const kiln = 'io.containerd.kiln.v2';
export const runc = 'io.containerd.runc.v2';

/** It boots; it is a template's clone; it is a clone that waited. */
export const ways = ['cold', 'template', 'pool'] as const;
export type Way = (typeof ways)[number];

/** The same in every plot; runc's is 0. */
export const colourOfWay = (way: Way): number => ways.indexOf(way) + 1;

export interface Variant {
  readonly way: Way;
  /** As in `vm.kernel`. */
  readonly kernel: string;
}

/** kiln.toml for it; so many virtual machines wait where there is a pool. */
export function configOf({ way, kernel }: Variant, pooled = 1): string {
  const vm = `[vm]\nkernel = ${JSON.stringify(kernel)}\n`;
  switch (way) {
    case 'cold':
      return `${vm}[template]\nenabled = false\n`;
    case 'template':
      return vm;
    case 'pool':
      return `${vm}[pool]\nmin = ${pooled}\nmax = ${pooled}\n`;
  }
}

/** The way that a container came, by the moments in its timeline. */
export function wayOf(moments: Iterable<string>): Way {
  const names = new Set(moments);
  if (names.has('vm-taken')) return 'pool';
  // After a restore that failed, it boots.
  return names.has('kernel-up') ? 'cold' : 'template';
}

/** How long no virtual machine may come to the pool before it counts as broken, in ms: emulated ones take seconds. */
const patienceMs = 60_000;
const askEveryMs = 100;

/**
 * Returns when so many virtual machines wait; kilnd must run. It tells of them only when it is asked.
 * @throws when none has come for a minute
 */
export async function poolFull(scene: Scene, pooled: number): Promise<void> {
  const env = { ...process.env, ...scene.kilnEnv };
  let most = -1;
  let deadline = 0;
  for (;;) {
    const { stdout } = await mustRun(join(distBin, 'kiln'), ['pool', '--json'], { env });
    const { pool } = JSON.parse(stdout.toString()) as PoolStatus;
    const waiting = pool.reduce((sum, shelf) => sum + shelf.waiting, 0);
    if (waiting >= pooled) return;
    if (waiting > most) deadline = performance.now() + patienceMs;
    most = Math.max(most, waiting);
    if (performance.now() > deadline) throw new Error(`the pool has ${waiting} of ${pooled} virtual machines`);
    await sleep(askEveryMs);
  }
}

/** `ctr run --rm … true` from ctr's start to its end, in ms. */
export async function timedRun(scene: Scene, runtime: string, id = scene.id('run')): Promise<number> {
  const began = performance.now();
  // Many at once wait for each other.
  const { code, stderr } = await scene.run(id, ['true'], { runtime, timeout: 900_000 });
  const tookMs = performance.now() - began;
  if (code !== 0) throw new Error(`${runtime}: ctr ended with ${code}: ${stderr.trim()}`);
  return tookMs;
}
