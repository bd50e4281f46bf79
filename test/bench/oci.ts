/** What a container from a bundle costs: `kiln run`, beside runc's and crun's on the same bundle, and podman with each. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { OciStage } from '../support/oci-stage.ts';
import { crunTree, runcBin } from '../support/paths.ts';
import { Podman } from '../support/podman.ts';
import { mustRun } from '../support/spawn.ts';
import { type Summary, summary, table } from './statistics.ts';

export interface OciUse {
  /** Milliseconds from the command's start to its end, by what was run. */
  readonly times: Readonly<Record<string, Summary>>;
  /** Why there is nothing of crun's. */
  readonly withoutCrun?: string;
}

/** `true`, to its end, in turn. */
export async function measureOci(runs: number): Promise<OciUse> {
  const stage = new OciStage();
  const podman = new Podman(stage);
  const runc = join(runcBin(), 'runc');
  const crun = join(stage.dir, 'crun');
  try {
    await stage.setUp();
    await podman.setUp();
    // conmon passes on nothing of its environment, by which crun would find its library.
    const tree = crunTree();
    const library = join(tree, 'usr/lib/x86_64-linux-gnu');
    writeFileSync(crun, `#!/bin/sh\nLD_LIBRARY_PATH='${library}' exec '${tree}/usr/bin/crun' "$@"\n`, { mode: 0o755 });
    const { directory } = await stage.bundle({ args: ['true'] });
    const runInPodman = (...flags: string[]) => {
      return podman.must([...flags, 'run', '--rm', '--network', 'none', podman.image, 'true']);
    };
    const run = (runtime: string) => {
      const state = join(stage.dir, 'state-of-others');
      return mustRun(runtime, ['--root', state, 'run', '--bundle', directory, stage.id()]);
    };
    // It refuses hosts that have controllers in both versions of control groups.
    const withoutCrun = await run(crun).then(
      () => undefined,
      (error: Error) => error.message,
    );
    const ways: Record<string, () => Promise<unknown>> = {
      'kiln run': () => stage.must(['run', '--bundle', directory, stage.id()]),
      'runc run': () => run(runc),
      ...(withoutCrun === undefined && { 'crun run': () => run(crun) }),
      'podman run, kiln': () => runInPodman(),
      'podman run, runc': () => runInPodman('--runtime', runc),
      ...(withoutCrun === undefined && { 'podman run, crun': () => runInPodman('--runtime', crun) }),
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
    return {
      times: Object.fromEntries(Array.from(times, ([name, values]) => [name, summary(values)])),
      ...(withoutCrun === undefined ? {} : { withoutCrun }),
    };
  } finally {
    await podman.tearDown();
    await stage.tearDown();
  }
}

export function describeOci({ times, withoutCrun }: OciUse): string {
  const rows = Object.entries(times).map(([name, { median, p95, min, max }]) => {
    return [name, ...[median, p95, min, max].map((value) => value.toFixed(0))];
  });
  return [
    '\na bundle and an image with `true`, from the command to its end, in ms',
    table([['', 'median', 'p95', 'least', 'most'], ...rows]),
    ...(withoutCrun === undefined ? [] : [`  without crun: ${withoutCrun}`]),
  ].join('\n');
}
