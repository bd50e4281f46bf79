/** The benchmarks; run them by `npm run bench`. Numbers in README come from here. */
import { existsSync } from 'node:fs';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { arch, cpus, release, totalmem } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { projectRoot } from '../support/paths.ts';
import { Scene } from '../support/scene.ts';
import { describeClones, measureClones, plotClones } from './clones.ts';
import { describeExec, measureExec } from './exec.ts';
import { describeLatency, measureLatency } from './latency.ts';
import { describeMemory, measureMemory } from './memory.ts';
import { describeNetwork, measureNetwork } from './network.ts';
import { describeOci, measureOci } from './oci.ts';
import { describeOutput, measureOutput } from './output.ts';
import { describeParallel, measureParallel, plotParallel } from './parallel.ts';
import { describeStart, measureStart, plotStart } from './start.ts';
import { describeVolumes, measureVolumes } from './volumes.ts';
import { type Way, ways } from './ways.ts';

const { values } = parseArgs({
  options: {
    only: { type: 'string', multiple: true },
    runs: { type: 'string', default: '10' },
    way: { type: 'string', multiple: true },
    kernel: { type: 'string' },
    parallel: { type: 'string', multiple: true, default: ['1', '10', '50'] },
    clones: { type: 'string', default: '100' },
    idle: { type: 'string', default: '10' },
    mib: { type: 'string', default: '1024' },
    execs: { type: 'string', default: '50' },
    seconds: { type: 'string', default: '10' },
    rounds: { type: 'string', default: '2' },
    tasks: { type: 'string', default: '10' },
    plots: { type: 'string' },
  },
});
const say = (text: string): void => void process.stdout.write(`${text}\n`);

const containerdVersion = '2.1';
const guestDir = process.env.KILN_GUEST_DIR ?? join(projectRoot, 'dist', 'guest');
const kernels = values.kernel === undefined ? ['default', 'minimal'] : [values.kernel];
const built = kernels.filter((name) => name !== 'minimal' || existsSync(join(guestDir, 'vmlinux-minimal')));
const { kernel = 'default' } = values;
const chosen = values.way?.map((name): Way => {
  const way = ways.find((known) => known === name);
  if (way === undefined) throw new Error(`--way ${name}: it is one of ${ways.join(', ')}`);
  return way;
});

interface Part<T> {
  readonly measure: (scene: Scene) => Promise<T>;
  readonly describe: (use: T) => string;
  readonly plot?: (use: T) => string;
}

/** Measures and tells; what is left is for the files. */
type Run = (scene: Scene) => Promise<{ readonly use: unknown; readonly plot: string | undefined }>;

function part<T>({ measure, describe, plot }: Part<T>): Run {
  return async (scene) => {
    const use = await measure(scene);
    say(describe(use));
    return { use, plot: plot?.(use) };
  };
}

/** In the order in which they run. */
const parts: Readonly<Record<string, Run>> = {
  start: part({
    measure: (scene) => {
      const variants = (chosen ?? ways).flatMap((way) => built.map((name) => ({ way, kernel: name })));
      return measureStart(scene, variants, Number(values.runs));
    },
    describe: describeStart,
    plot: plotStart,
  }),
  parallel: part({
    measure: (scene) => {
      return measureParallel(scene, { ways: chosen ?? ways, kernel, sizes: values.parallel.map(Number) });
    },
    describe: describeParallel,
    plot: plotParallel,
  }),
  clones: part({
    measure: (scene) => measureClones(scene, kernel, Number(values.clones)),
    describe: describeClones,
    plot: plotClones,
  }),
  memory: part({ measure: (scene) => measureMemory(scene, Number(values.idle)), describe: describeMemory }),
  exec: part({ measure: (scene) => measureExec(scene, Number(values.execs)), describe: describeExec }),
  latency: part({ measure: (scene) => measureLatency(scene, Number(values.tasks)), describe: describeLatency }),
  oci: part({ measure: () => measureOci(Number(values.runs)), describe: describeOci }),
  volumes: part({
    measure: (scene) => measureVolumes(scene, Number(values.rounds)),
    describe: describeVolumes,
  }),
  output: part({ measure: (scene) => measureOutput(scene, Number(values.mib)), describe: describeOutput }),
  network: part({ measure: (scene) => measureNetwork(scene, Number(values.seconds)), describe: describeNetwork }),
};
const unknown = values.only?.find((name) => !(name in parts));
if (unknown !== undefined) throw new Error(`--only ${unknown}: it is one of ${Object.keys(parts).join(', ')}`);

async function machine(): Promise<Record<string, unknown>> {
  const load = (await readFile('/proc/loadavg', 'utf8')).trim();
  const [cpu] = cpus();
  return {
    arch: arch(),
    kernel: release(),
    cpu: cpu?.model,
    cpus: cpus().length,
    memoryMib: totalmem() / 2 ** 20,
    load,
  };
}

async function writeTo(folder: string, name: string, text: string): Promise<void> {
  await mkdir(folder, { recursive: true });
  await writeFile(join(folder, name), text);
  say(`\nwritten to ${join(folder, name)}`);
}

const startedAt = new Date();
const facts = await machine();
say(`${facts.cpus} × ${facts.cpu}, kernel ${facts.kernel}, load ${facts.load}, containerd ${containerdVersion}`);
const scene = new Scene({ version: containerdVersion, runInMemory: true });
try {
  await scene.setUp();
  const uses: Record<string, unknown> = {};
  for (const [name, run] of Object.entries(parts)) {
    if (values.only?.includes(name) === false) continue;
    const { use, plot } = await run(scene);
    uses[name] = use;
    if (values.plots !== undefined && plot !== undefined) await writeTo(values.plots, `${name}.svg`, plot);
  }
  const json = `${JSON.stringify({ startedAt, machine: facts, ...uses }, null, 2)}\n`;
  const file = `${startedAt.toISOString().slice(0, 19).replaceAll(':', '-')}Z.json`;
  await writeTo(join(projectRoot, 'dist', 'bench'), file, json);
  // containerd may still be at the end of the last container, for which it would start a kilnd again.
  await scene.purge();
  await scene.assertNothingLeft({ within: 20_000 });
} catch (error) {
  process.exitCode = 1;
  process.stderr.write(`the benchmark failed: ${String(error)}\n${await scene.logs()}\n`);
} finally {
  await scene.tearDown();
}
