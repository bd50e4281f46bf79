/** Containers and execs, one after the other, and what kilnd has to show afterwards: `npm run soak` and its test. */
import { readdirSync, readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { findProcesses, memoryOf } from '../bench/processes.ts';
import { busyboxImage } from './images.ts';
import type { Scene } from './scene.ts';

const kiln = 'io.containerd.kiln.v2';

/** What must not grow. */
export interface Footprint {
  readonly rssMib: number;
  /** Open in kilnd. */
  readonly descriptors: number;
  readonly threads: number;
  /** Of this Kiln's containers: relays, virtual machines and what belongs to them. */
  readonly processes: number;
  /** In the state folder and the cache, with folders. */
  readonly files: number;
}

/** Of the scene's kilnd, which must be running, and the same one all the time. */
export function footprint(scene: Scene, kilnd: number): Footprint {
  const now = scene.kilndPids();
  if (now.length !== 1 || now[0] !== kilnd) throw new Error(`kilnd ${kilnd} was replaced by ${now.join(', ')}`);
  const count = (folder: string): number => readdirSync(folder, { recursive: true }).length;
  return {
    rssMib: memoryOf(kilnd).rssMib,
    descriptors: readdirSync(`/proc/${kilnd}/fd`).length,
    threads: Number(/^Threads:\s+(\d+)/m.exec(readFileSync(`/proc/${kilnd}/status`, 'utf8'))?.[1]),
    processes: findProcesses(scene.stateDir).length,
    files: count(scene.stateDir) + count(scene.cacheDir),
  };
}

/** Milliseconds that what was deleted last may take to be gone: `ctr` ends before its connections are closed. */
const settleMs = 5_000;

/**
 * The footprint once it is no more than `limit` in everything that is counted, or the last one that was seen. There is no
 * event for a descriptor of another process that is closed.
 */
export async function settledFootprint(scene: Scene, kilnd: number, limit: Footprint): Promise<Footprint> {
  const deadline = performance.now() + settleMs;
  for (;;) {
    const now = footprint(scene, kilnd);
    if (grown(limit, now).length === 0 || performance.now() > deadline) return now;
    await sleep(50);
  }
}

/** What there is more of, in words; memory is judged by the caller. */
export function grown(before: Footprint, after: Footprint): string[] {
  const counted = ['descriptors', 'threads', 'processes', 'files'] as const;
  return counted
    .filter((name) => after[name] > before[name])
    .map((name) => `${name}: ${before[name]} before, ${after[name]} after`);
}

/** Runs `true` in a container, and fails when it does not end with 0. */
export async function execOnce(scene: Scene, id: string, execId: string): Promise<void> {
  await scene.ctr(['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', execId, id, 'true']);
}

/** A container in the background. */
export async function startContainer(scene: Scene): Promise<string> {
  const id = scene.id('soak');
  await scene.ctr([
    ...['run', '-d', '--null-io', '--runtime', kiln, '--fifo-dir', scene.fifoDir],
    ...[busyboxImage.name, id, 'sleep', '100000'],
  ]);
  return id;
}

/** Create, start, exec, kill and delete of one container; fails when any of it does. */
export async function round(scene: Scene): Promise<void> {
  const id = await startContainer(scene);
  const said = await scene.ctr(['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', 'e', id, 'echo', id]);
  if (said.trim() !== id) throw new Error(`the exec of ${id} said ${JSON.stringify(said)}`);
  await scene.ctr(['task', 'rm', '--force', id]);
  await scene.ctr(['container', 'rm', id]);
}
