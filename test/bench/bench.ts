/** The benchmarks; run them by `npm run bench`. Numbers in README come from here. */
import { existsSync } from 'node:fs';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { arch, cpus, release, totalmem } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { projectRoot } from '../support/paths.ts';
import { Scene } from '../support/scene.ts';
import { describeExec, measureExec } from './exec.ts';
import { describeLatency, measureLatency } from './latency.ts';
import { type MemoryUse, measureMemory, measureStart, type StartTimes } from './measure.ts';
import { measureOutput, type OutputUse } from './output.ts';
import { table } from './statistics.ts';

const { values } = parseArgs({
  options: {
    runs: { type: 'string', default: '10' },
    idle: { type: 'string', default: '10' },
    kernel: { type: 'string' },
    only: { type: 'string', multiple: true, default: ['start', 'memory', 'exec', 'latency', 'output'] },
    mib: { type: 'string', default: '1024' },
    execs: { type: 'string', default: '50' },
    tasks: { type: 'string', default: '10' },
  },
});
const say = (text: string): void => void process.stdout.write(`${text}\n`);
const ms = (value: number): string => value.toFixed(0);
const mib = (value: number): string => value.toFixed(1);

const containerdVersion = '2.1';
const guestDir = process.env.KILN_GUEST_DIR ?? join(projectRoot, 'dist', 'guest');
const kernels = values.kernel === undefined ? ['default', 'minimal'] : [values.kernel];
const built = kernels.filter((name) => name !== 'minimal' || existsSync(join(guestDir, 'vmlinux-minimal')));

function printStart(kernel: string, start: StartTimes): void {
  say(`\nctr run --rm … true, ${start.kilnMs.n} times each in turn, guest kernel "${kernel}", in ms`);
  const row = (name: string, { median, p95, min, max }: StartTimes['kilnMs']): string[] => {
    return [name, ms(median), ms(p95), ms(min), ms(max)];
  };
  say(table([['', 'median', 'p95', 'least', 'most'], row('kiln', start.kilnMs), row('runc', start.runcMs)]));
  say(`  kiln : runc = ${start.ratio.toFixed(1)}`);
  say('\nwhere the time goes (medians, in ms)');
  say(
    table([
      ['', 'at', '+'],
      ...start.timeline.map(({ name, sinceStartMs, sincePreviousMs }) => [name, ms(sinceStartMs), ms(sincePreviousMs)]),
    ]),
  );
  const { kilndMs, launcherMs } = start.cpu;
  say(`\nCPU on the host for one container: kilnd ${ms(kilndMs)} ms, launcher ${ms(launcherMs)} ms`);
}

function printMemory({ kilnd, perContainer }: MemoryUse): void {
  say('\nmemory of kilnd, in MiB');
  say(
    table([
      ['idle containers', 'RSS', 'PSS'],
      ...kilnd.map(({ containers, rssMib, pssMib }) => [String(containers), mib(rssMib), mib(pssMib)]),
    ]),
  );
  say('\nmemory of one idle container on the host (PSS, median, in MiB)');
  const { vmm, vsockBackend, standIn, relay } = perContainer;
  say(
    table([
      ['VMM', mib(vmm)],
      ['vsock backend', mib(vsockBackend)],
      ['stand-in', mib(standIn)],
      ['relay', mib(relay)],
    ]),
  );
}

function printOutput({ mib: size, mibPerS, slow }: OutputUse): void {
  say(`\na container that writes ${size} MiB to stdout, through ctr, in MiB/s`);
  say(
    table([
      ['kiln', mib(mibPerS.kiln)],
      ['runc', mib(mibPerS.runc)],
    ]),
  );
  const { stalledS, readerMibPerS, kilndRss, vmmPss } = slow;
  say(`\nthe same with a reader that stalls ${stalledS} s and then takes ${mib(readerMibPerS)} MiB/s, in MiB`);
  const row = (name: string, { before, most, after }: OutputUse['slow']['kilndRss']): string[] => {
    return [name, mib(before), mib(most), mib(after)];
  };
  say(table([['', 'before', 'most', 'at the end'], row('kilnd (RSS)', kilndRss), row('VMM (PSS)', vmmPss)]));
  say(`  the container wrote ${mib(slow.mibPerS)} MiB/s, and ${mib(slow.heldBackMib)} MiB while the reader stalled`);
}

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

const startedAt = new Date();
const facts = await machine();
say(`${facts.cpus} × ${facts.cpu}, kernel ${facts.kernel}, load ${facts.load}, containerd ${containerdVersion}`);
const scene = new Scene({ version: containerdVersion });
try {
  await scene.setUp();
  const start: Record<string, StartTimes> = {};
  for (const kernel of values.only.includes('start') ? built : []) {
    await scene.configure(`[vm]\nkernel = "${kernel}"\n`);
    start[kernel] = await measureStart(scene, Number(values.runs));
    printStart(kernel, start[kernel]);
  }
  const memory = values.only.includes('memory') ? await measureMemory(scene, Number(values.idle)) : undefined;
  if (memory !== undefined) printMemory(memory);
  const exec = values.only.includes('exec') ? await measureExec(scene, Number(values.execs)) : undefined;
  if (exec !== undefined) say(describeExec(exec));
  const latency = values.only.includes('latency') ? await measureLatency(scene, Number(values.tasks)) : undefined;
  if (latency !== undefined) say(describeLatency(latency));
  const output = values.only.includes('output') ? await measureOutput(scene, Number(values.mib)) : undefined;
  if (output !== undefined) printOutput(output);
  const folder = join(projectRoot, 'dist', 'bench');
  const file = join(folder, `${startedAt.toISOString().slice(0, 19).replaceAll(':', '-')}Z.json`);
  await mkdir(folder, { recursive: true });
  await writeFile(
    file,
    `${JSON.stringify({ startedAt, machine: facts, start, memory, exec, latency, output }, null, 2)}\n`,
  );
  say(`\nwritten to ${file}`);
} catch (error) {
  process.exitCode = 1;
  process.stderr.write(`the benchmark failed: ${String(error)}\n${await scene.logs()}\n`);
} finally {
  await scene.tearDown();
}
