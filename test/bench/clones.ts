/** Idle containers from one template, one more each time: how long its start takes, and what it has of the host's memory. */
import { setTimeout as sleep } from 'node:timers/promises';
import type { Scene } from '../support/scene.ts';
import { idleContainer } from './exec.ts';
import { lines } from './plot.ts';
import { availableMib, exactCpuOf, findProcesses, memoryOf, writtenTo } from './processes.ts';
import { type Summary, summary, table } from './statistics.ts';
import { configOf, kiln, timedRun } from './ways.ts';

/** What the host keeps in any case. */
const leastAvailableMib = 3 * 1024;

/** The container that was started last. */
export interface Clone {
  /** With this one. */
  readonly running: number;
  readonly startMs: number;
  readonly vmm: {
    readonly pssMib: number;
    readonly privateMib: number;
    /** Pages of the guest's memory that are no longer the template's. */
    readonly writtenMib: number;
  };
  readonly relayMib: number;
  readonly standInMib: number;
  /** PSS of kilnd, by the containers that run. */
  readonly kilndShareMib: number;
  /** On the host, with this one running. */
  readonly availableMib: number;
}

/** What the VMMs of all of them take when they have been left alone for a while. */
export interface Settled {
  readonly privateMib: Summary;
  readonly writtenMib: Summary;
  /** CPU time in ms, each second. */
  readonly cpuMsPerS: Summary;
}

export interface ClonesUse {
  readonly kernel: string;
  readonly wanted: number;
  readonly clones: readonly Clone[];
  readonly settled: Settled;
  /** Why there are no more. */
  readonly stopped?: string;
}

export async function measureClones(scene: Scene, kernel: string, wanted: number): Promise<ClonesUse> {
  await scene.configure(configOf({ way: 'template', kernel }));
  await timedRun(scene, kiln);
  const clones: Clone[] = [];
  let stopped: string | undefined;
  while (clones.length < wanted && stopped === undefined) {
    const available = availableMib();
    if (available < leastAvailableMib) stopped = `the host has only ${available.toFixed(0)} MiB left`;
    else {
      try {
        clones.push(await addClone(scene, clones.length + 1));
      } catch (error) {
        stopped = String(error);
      }
    }
  }
  const settled = await measureSettled(scene);
  await scene.purge();
  return { kernel, wanted, clones, settled, ...(stopped === undefined ? {} : { stopped }) };
}

/**
 * How long they are left alone, which has the minute in it after which an idle guest gives memory back (`vm.translation_idle_s`), and for how
 * long their CPU time is counted then, in seconds.
 */
const restS = 130;
const countedS = 30;

async function measureSettled(scene: Scene): Promise<Settled> {
  await sleep(restS * 1000);
  const vmms = findProcesses(scene.stateDir, 'qemu-system');
  const before = vmms.map(exactCpuOf);
  await sleep(countedS * 1000);
  return {
    privateMib: summary(vmms.map((vmm) => memoryOf(vmm).privateMib)),
    writtenMib: summary(vmms.map((vmm) => writtenTo(vmm, guestMemory) ?? 0)),
    cpuMsPerS: summary(vmms.map((vmm, n) => (exactCpuOf(vmm) - (before[n] ?? 0)) / countedS)),
  };
}

/** The file of a template of which a clone's memory is a private copy. */
const guestMemory = /\/templates\/[^/]+\/memory$/;

async function addClone(scene: Scene, running: number): Promise<Clone> {
  const began = performance.now();
  const id = await idleContainer(scene, kiln);
  const startMs = performance.now() - began;
  const only = (...texts: string[]): number => {
    const [pid, ...others] = findProcesses(scene.stateDir, ...texts);
    if (pid === undefined || others.length > 0) throw new Error(`not one process of ${id} has ${texts.join(', ')}`);
    return pid;
  };
  const vmm = only('qemu-system', `kiln-${id},`);
  const { pssMib, privateMib } = memoryOf(vmm);
  const writtenMib = writtenTo(vmm, guestMemory);
  if (writtenMib === undefined) throw new Error(`the virtual machine of ${id} is no clone of a template`);
  const [kilnd = 0] = scene.kilndPids();
  return {
    running,
    startMs,
    vmm: { pssMib, privateMib, writtenMib },
    relayMib: memoryOf(only('kiln-relay', ` ${id} `)).pssMib,
    standInMib: memoryOf(only('kiln-standin', ` ${id} `)).pssMib,
    kilndShareMib: memoryOf(kilnd).pssMib / running,
    availableMib: availableMib(),
  };
}

/** Numbers of running containers whose memory the table shows, beside the last. */
const shown = [1, 10, 50, 100];
/** Starts are put together by so many. */
const tens = 10;

export function describeClones({ kernel, wanted, clones, settled, stopped }: ClonesUse): string {
  const mib = (value: number): string => value.toFixed(1);
  const ms = (value: number): string => value.toFixed(0);
  const rows = clones.filter(({ running }) => shown.includes(running) || running === clones.length);
  const steps = Array.from({ length: Math.ceil(clones.length / tens) }, (_, n) => {
    const some = clones.slice(n * tens, (n + 1) * tens);
    const { median, p95, max } = summary(some.map(({ startMs }) => startMs));
    return [`${n * tens} to ${n * tens + some.length - 1}`, ms(median), ms(p95), ms(max)];
  });
  return [
    `\nstart of one more idle container from the template, ${kernel} kernel, in ms`,
    table([['already running', 'median', 'p95', 'most'], ...steps]),
    '\nmemory of the container that was started last, in MiB (PSS, but for what its VMM alone has and has written)',
    table([
      ['running', 'VMM', 'alone', 'guest memory written', 'relay', 'stand-in', 'share of kilnd', 'left on the host'],
      ...rows.map(({ running, vmm, relayMib, standInMib, kilndShareMib, availableMib: left }) => [
        String(running),
        ...[vmm.pssMib, vmm.privateMib, vmm.writtenMib, relayMib, standInMib, kilndShareMib].map(mib),
        ms(left),
      ]),
    ]),
    '  with one running, the pages of the template count as its alone',
    `\nthe VMM of each when all have been left alone for ${restS} s`,
    table([
      ['', 'median', 'p95', 'most'],
      ...(
        [
          ['alone (MiB)', settled.privateMib],
          ['guest memory written (MiB)', settled.writtenMib],
          ['CPU (ms each second)', settled.cpuMsPerS],
        ] as const
      ).map(([name, { median, p95, max }]) => [name, mib(median), mib(p95), mib(max)]),
    ]),
    ...(stopped === undefined ? [] : [`  stopped at ${clones.length} of ${wanted}: ${stopped}`]),
  ].join('\n');
}

export function plotClones({ kernel, clones }: ClonesUse): string {
  const over = (name: string, value: (clone: Clone) => number) => ({
    name,
    points: clones.map((clone) => [clone.running, value(clone)] as const),
  });
  const x = 'running containers, each in a virtual machine of its own';
  return lines([
    {
      title: `start of one more idle container from a template, ${kernel} kernel`,
      x,
      y: 'ms',
      lines: [over('start', ({ startMs }) => startMs)],
    },
    {
      title: 'memory of the container that was started last',
      x,
      y: 'MiB',
      lines: [
        over('VMM (PSS)', ({ vmm }) => vmm.pssMib),
        over('VMM alone (private)', ({ vmm }) => vmm.privateMib),
        over('guest memory written', ({ vmm }) => vmm.writtenMib),
        over('share of kilnd (PSS)', ({ kilndShareMib }) => kilndShareMib),
      ],
    },
  ]);
}
