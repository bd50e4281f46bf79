import { expect, it } from 'vitest';
import { execOnce, footprint, grown, round, settledFootprint, startContainer } from '../support/soak.ts';
import { useScene } from '../support/use-scene.ts';

/** MiB that kilnd may differ between two moments without a leak: its heap is collected when V8 likes. */
const noise = 12;

// The long form is `npm run soak`.
const scene = useScene({ version: '2.1' });

it('kilnd keeps nothing of the containers and execs that are gone', async () => {
  await round(scene);
  const [kilnd = 0] = scene.kilndPids();
  const before = footprint(scene, kilnd);
  for (let n = 0; n < 2; n += 1) await round(scene);
  await Promise.all([round(scene), round(scene), round(scene)]);
  const containersGone = await settledFootprint(scene, kilnd, before);
  expect(grown(before, containersGone)).toEqual([]);

  const id = await startContainer(scene);
  for (let n = 0; n < 30; n += 1) await execOnce(scene, id, `warm-${n}`);
  const warm = footprint(scene, kilnd);
  for (let n = 0; n < 60; n += 1) await execOnce(scene, id, `e${n}`);
  const execsGone = await settledFootprint(scene, kilnd, warm);
  expect(grown(warm, execsGone)).toEqual([]);
  expect(execsGone.rssMib - warm.rssMib).toBeLessThan(noise);
  await scene.remove(id);
}, 180_000);
