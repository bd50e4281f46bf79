/** What one more process in a running container costs, beside runc's. */
import { busyboxImage } from '../support/images.ts';
import type { Scene } from '../support/scene.ts';
import { cpuOf, findProcesses } from './processes.ts';
import { type Summary, summary, table } from './statistics.ts';
import { kiln, runc } from './ways.ts';

export interface ExecUse {
  readonly kilnMs: Summary;
  readonly runcMs: Summary;
  /** CPU milliseconds for one exec, means. */
  readonly cpu: { readonly kilndMs: number; readonly vmmMs: number };
}

/** Execs before the first that counts: the agent's code is compiled by then. */
const warmUps = 5;

/** A container that sleeps, and answers to its id. */
export async function idleContainer(scene: Scene, runtime: string): Promise<string> {
  const id = scene.id('idle');
  await scene.ctr([
    ...['run', '-d', '--null-io', '--runtime', runtime, '--fifo-dir', scene.fifoDir],
    ...[busyboxImage.name, id, 'sleep', '100000'],
  ]);
  return id;
}

/** `ctr task exec … true` from ctr's start to its end, in a container of Kiln's and one of runc's in turn. */
export async function measureExec(scene: Scene, runs: number): Promise<ExecUse> {
  await scene.configure('');
  const ids = { kiln: await idleContainer(scene, kiln), runc: await idleContainer(scene, runc) };
  let execs = 0;
  const timed = async (id: string): Promise<number> => {
    execs += 1;
    const began = performance.now();
    await scene.ctr(['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', `e${execs}`, id, 'true']);
    return performance.now() - began;
  };
  for (let n = 0; n < warmUps; n += 1) for (const id of Object.values(ids)) await timed(id);
  const [kilnd = 0] = scene.kilndPids();
  const [vmm = 0] = findProcesses(scene.stateDir, 'qemu-system');
  const before = { kilnd: cpuOf(kilnd).ownMs, vmm: cpuOf(vmm).ownMs };
  const kilnMs: number[] = [];
  const runcMs: number[] = [];
  for (let n = 0; n < runs; n += 1) {
    kilnMs.push(await timed(ids.kiln));
    runcMs.push(await timed(ids.runc));
  }
  const cpu = {
    kilndMs: (cpuOf(kilnd).ownMs - before.kilnd) / runs,
    vmmMs: (cpuOf(vmm).ownMs - before.vmm) / runs,
  };
  await scene.purge();
  return { kilnMs: summary(kilnMs), runcMs: summary(runcMs), cpu };
}

export function describeExec({ kilnMs, runcMs, cpu }: ExecUse): string {
  const row = (name: string, { median, p95, min, max }: Summary): string[] => {
    return [name, ...[median, p95, min, max].map((value) => value.toFixed(0))];
  };
  return [
    `\nctr task exec … true in a running container, ${kilnMs.n} times each in turn, in ms`,
    table([['', 'median', 'p95', 'least', 'most'], row('kiln', kilnMs), row('runc', runcMs)]),
    `  CPU for one: kilnd ${cpu.kilndMs.toFixed(0)} ms, VMM ${cpu.vmmMs.toFixed(0)} ms`,
  ].join('\n');
}
