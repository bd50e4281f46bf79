/** What a container's output costs: throughput beside runc's, and the memory that a slow reader costs. */
import { setTimeout as sleep } from 'node:timers/promises';
import type { Scene } from '../support/scene.ts';
import type { RunningProgram } from '../support/spawn.ts';
import { findProcesses, memoryOf } from './processes.ts';
import { table } from './statistics.ts';
import { kiln, runc } from './ways.ts';

const mebibyte = 2 ** 20;

interface Range {
  readonly before: number;
  readonly most: number;
  readonly after: number;
}

export interface OutputUse {
  readonly mib: number;
  /** A reader that takes all it gets. */
  readonly mibPerS: { readonly kiln: number; readonly runc: number };
  readonly slow: {
    readonly stalledS: number;
    /** What the reader takes at most. */
    readonly readerMibPerS: number;
    readonly mibPerS: number;
    /** What the container got rid of while the reader took nothing. */
    readonly heldBackMib: number;
    readonly kilndRss: Range;
    readonly vmmPss: Range;
  };
}

/** Long enough that whatever would grow grows to be seen. */
const stalledS = 10;
const sampleMs = 250;

/** `mib` MiB from a container to the one who reads ctr's stdout, three times: kiln, runc, and kiln with a slow reader. */
export async function measureOutput(scene: Scene, mib: number): Promise<OutputUse> {
  await scene.configure('');
  const mibPerS = { kiln: await throughput(scene, kiln, mib), runc: await throughput(scene, runc, mib) };
  return { mib, mibPerS, slow: await slowReader(scene, mib, mibPerS.kiln * 0.75) };
}

/** The container writes when it is told, so that its start is not measured; its progress is on stderr. */
async function writer(scene: Scene, runtime: string, mib: number): Promise<RunningProgram> {
  const script = `echo up >&2; read -r go; i=0
    while [ $i -lt ${mib} ]; do head -c ${mebibyte} /dev/zero; i=$((i+1)); echo $i >&2; done`;
  const program = scene.runStream(scene.id('output'), ['sh', '-c', script], {
    runtime,
    interactive: true,
    timeout: 3_600_000,
  });
  await new Promise((resolve) => program.stderr.once('data', resolve));
  return program;
}

async function throughput(scene: Scene, runtime: string, mib: number): Promise<number> {
  await using program = await writer(scene, runtime, mib);
  program.stderr.resume();
  const began = performance.now();
  program.stdin.end('go\n');
  let read = 0;
  for await (const chunk of program.stdout as AsyncIterable<Buffer>) read += chunk.length;
  const tookS = (performance.now() - began) / 1000;
  if (read !== mib * mebibyte) throw new Error(`${runtime}: ${read} bytes came of ${mib} MiB`);
  return mib / tookS;
}

async function slowReader(scene: Scene, mib: number, readerMibPerS: number): Promise<OutputUse['slow']> {
  await using program = await writer(scene, kiln, mib);
  let written = 0;
  program.stderr.setEncoding('utf8').on('data', (text: string) => {
    written = Number(text.trim().split('\n').at(-1));
  });
  const [kilnd = 0] = scene.kilndPids();
  const [vmm = 0] = findProcesses(scene.stateDir, 'qemu-system');
  const samples = [{ kilnd: memoryOf(kilnd).rssMib, vmm: memoryOf(vmm).pssMib }];
  const sampler = setInterval(() => {
    samples.push({ kilnd: memoryOf(kilnd).rssMib, vmm: memoryOf(vmm).pssMib });
  }, sampleMs);
  try {
    program.stdin.end('go\n');
    await sleep(stalledS * 1000);
    const heldBackMib = written;
    const began = performance.now();
    let read = 0;
    for await (const chunk of program.stdout as AsyncIterable<Buffer>) {
      read += chunk.length;
      if (read === mib * mebibyte) break;
      const early = (read / mebibyte / readerMibPerS) * 1000 - (performance.now() - began);
      if (early > 1) await sleep(early);
    }
    const tookS = (performance.now() - began) / 1000;
    if (read !== mib * mebibyte) throw new Error(`${read} bytes came of ${mib} MiB to the slow reader`);
    const range = (values: readonly number[]): Range => {
      return { before: values[0] ?? 0, most: Math.max(...values), after: values.at(-1) ?? 0 };
    };
    return {
      stalledS,
      readerMibPerS,
      mibPerS: mib / tookS,
      heldBackMib,
      kilndRss: range(samples.map((sample) => sample.kilnd)),
      vmmPss: range(samples.map((sample) => sample.vmm)),
    };
  } finally {
    clearInterval(sampler);
  }
}

export function describeOutput({ mib: size, mibPerS, slow }: OutputUse): string {
  const mib = (value: number): string => value.toFixed(1);
  const { stalledS, readerMibPerS, kilndRss, vmmPss } = slow;
  const row = (name: string, { before, most, after }: Range): string[] => [name, mib(before), mib(most), mib(after)];
  return [
    `\na container that writes ${size} MiB to stdout, through ctr, in MiB/s`,
    table([
      ['kiln', mib(mibPerS.kiln)],
      ['runc', mib(mibPerS.runc)],
    ]),
    `\nthe same with a reader that stalls ${stalledS} s and then takes ${mib(readerMibPerS)} MiB/s, in MiB`,
    table([['', 'before', 'most', 'at the end'], row('kilnd (RSS)', kilndRss), row('VMM (PSS)', vmmPss)]),
    `  the container wrote ${mib(slow.mibPerS)} MiB/s, and ${mib(slow.heldBackMib)} MiB while the reader stalled`,
  ].join('\n');
}
