/** What a container from a bundle costs: `kiln run`, beside `runc run` on the same bundle, and podman with both. */
import { join } from 'node:path';
import { OciStage } from '../support/oci-stage.ts';
import { runcBin } from '../support/paths.ts';
import { Podman } from '../support/podman.ts';
import { mustRun } from '../support/spawn.ts';
import { type Summary, summary, table } from './statistics.ts';

/** Milliseconds from the command's start to its end. */
export type OciUse = Readonly<Record<string, Summary>>;

/** `true`, to its end, in turn. */
export async function measureOci(runs: number): Promise<OciUse> {
  const stage = new OciStage();
  const podman = new Podman(stage);
  const runc = join(runcBin(), 'runc');
  try {
    await stage.setUp();
    await podman.setUp();
    const { directory } = await stage.bundle({ args: ['true'] });
    const flags = ['run', '--rm', '--network', 'none'];
    const ways: Record<string, () => Promise<unknown>> = {
      'kiln run': () => stage.must(['run', '--bundle', directory, stage.id()]),
      'runc run': () => mustRun(runc, ['--root', join(stage.dir, 'runc'), 'run', '--bundle', directory, stage.id()]),
      'podman run, kiln': () => podman.must([...flags, podman.image, 'true']),
      'podman run, runc': () => podman.must(['--runtime', runc, ...flags, podman.image, 'true']),
    };
    const times = new Map(Object.keys(ways).map((name): [string, number[]] => [name, []]));
    // The first of each makes what the others find: a template, caches.
    for (let n = -1; n < runs; n += 1) {
      for (const [name, start] of Object.entries(ways)) {
        const began = performance.now();
        await start();
        if (n >= 0) times.get(name)?.push(performance.now() - began);
      }
    }
    return Object.fromEntries(Array.from(times, ([name, values]) => [name, summary(values)]));
  } finally {
    await podman.tearDown();
    await stage.tearDown();
  }
}

export function describeOci(use: OciUse): string {
  const rows = Object.entries(use).map(([name, { median, p95, min, max }]) => {
    return [name, ...[median, p95, min, max].map((value) => value.toFixed(0))];
  });
  return [
    '\na bundle and an image with `true`, from the command to its end, in ms',
    table([['', 'median', 'p95', 'least', 'most'], ...rows]),
  ].join('\n');
}
