/** The soak: rounds of containers in a row, then at once, and whether kilnd grows. Run it by `npm run soak`. */
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { projectRoot } from '../support/paths.ts';
import { Scene } from '../support/scene.ts';
import { type Footprint, footprint, grown, round, settledFootprint } from '../support/soak.ts';
import { summary, table } from './statistics.ts';

const { values } = parseArgs({
  options: {
    rounds: { type: 'string', default: '1000' },
    parallel: { type: 'string', default: '20' },
    version: { type: 'string', default: '2.1' },
  },
});
const rounds = Number(values.rounds);
const parallel = Number(values.parallel);
const version = (['1.6', '1.7', '2.1'] as const).find((known) => known === values.version);
if (version === undefined || !(rounds > 0) || !(parallel >= 0)) {
  throw new Error('usage: npm run soak -- [--rounds N] [--parallel N] [--version 1.6|1.7|2.1]');
}

/**
 * Growth of kilnd's memory in MiB that is no leak, from the first tenth of the rounds to the end: the heap is collected
 * when V8 likes, and its code is compiled as it becomes hot.
 */
const rssMayGrow = 16;

const say = (text: string): void => void process.stdout.write(`${text}\n`);
const samples: (Footprint & { readonly round: number })[] = [];
const failures: string[] = [];
const tookMs: number[] = [];

const attempt = async (scene: Scene, name: string): Promise<void> => {
  const began = performance.now();
  try {
    await round(scene);
    tookMs.push(performance.now() - began);
  } catch (error) {
    failures.push(`${name}: ${error instanceof Error ? error.message : String(error)}`);
    say(failures.at(-1) ?? '');
  }
};

const startedAt = new Date();
const scene = new Scene({ version });
try {
  await scene.setUp();
  // Starts kilnd and converts the image.
  await round(scene);
  const [kilnd = 0] = scene.kilndPids();
  const before = footprint(scene, kilnd);
  const sample = async (at: number): Promise<void> => {
    samples.push({ round: at, ...(await settledFootprint(scene, kilnd, before)) });
  };
  await sample(0);
  const every = Math.max(1, Math.floor(rounds / 10));
  for (let n = 1; n <= rounds; n += 1) {
    await attempt(scene, `round ${n}`);
    if (n % every === 0 || n === 100 || n === rounds) await sample(n);
  }
  const inARow = [...tookMs];
  await Promise.all(Array.from({ length: parallel }, (_, n) => attempt(scene, `parallel ${n + 1}`)));
  await sample(rounds + parallel);
  const row = ({ round: at, rssMib, descriptors, threads, processes, files }: (typeof samples)[number]): string[] => {
    return [String(at), rssMib.toFixed(1), ...[descriptors, threads, processes, files].map(String)];
  };
  say(`\n${rounds} rounds in a row, then ${parallel} at once, containerd ${version}: ${failures.length} failures`);
  say(table([['rounds', 'RSS of kilnd (MiB)', 'descriptors', 'threads', 'processes', 'files'], ...samples.map(row)]));
  const took = summary(inARow);
  say(`one round: median ${took.median.toFixed(0)} ms, p95 ${took.p95.toFixed(0)} ms`);
  const first = samples[1] ?? samples[0];
  const last = samples.at(-1);
  if (first !== undefined && last !== undefined) {
    failures.push(...grown(before, last));
    const growth = last.rssMib - first.rssMib;
    if (growth > rssMayGrow) failures.push(`kilnd grew by ${growth.toFixed(1)} MiB since round ${first.round}`);
  }
  const folder = join(projectRoot, 'dist', 'bench');
  const file = join(folder, `soak-${startedAt.toISOString().slice(0, 19).replaceAll(':', '-')}Z.json`);
  await mkdir(folder, { recursive: true });
  await writeFile(
    file,
    `${JSON.stringify({ startedAt, version, rounds, parallel, took, samples, failures }, null, 2)}\n`,
  );
  say(`written to ${file}`);
} catch (error) {
  failures.push(String(error));
  process.stderr.write(`${await scene.logs()}\n`);
} finally {
  await scene.tearDown();
}
if (failures.length > 0) {
  process.exitCode = 1;
  process.stderr.write(`the soak failed:\n${failures.map((failure) => `  ${failure}\n`).join('')}`);
}
