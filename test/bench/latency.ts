/**
 * How long containerd's small questions take, State and Stats, and how long a container is silent when kilnd is killed.
 * They are asked over ttrpc on the socket that containerd uses, so that ctr's own start is not measured.
 */
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import { connect } from 'node:net';
import { join } from 'node:path';
import type { Scene } from '../support/scene.ts';
import { signal, waitForEnd } from '../support/wait-for-end.ts';
import { TaskClient } from '../unit/shim/task-client.ts';
import { idleContainer } from './exec.ts';
import { type Summary, summary, table } from './statistics.ts';
import { kiln } from './ways.ts';

/** Questions to each task. */
const rounds = 20;
/** Tasks without a virtual machine, for the number that does not fit under emulation. */
const scriptedTasks = 50;

export interface Answers {
  readonly stateMs: Summary;
  readonly statsMs: Summary;
}

export interface LatencyUse {
  readonly tasks: number;
  /** One question at a time, to each task in turn. */
  readonly idle: Answers;
  /** The same while one of the tasks writes all it can to stdout, and another is given one exec after the other. */
  readonly loaded: Answers;
  /** `scripted.tasks` tasks whose containers are scripted, in a process of their own: what kilnd's part of it costs. */
  readonly scripted: Answers & { readonly tasks: number };
  /** From SIGKILL of kilnd to each task's next answer; a task that answers with an error is lost. */
  readonly killed: Answers & { readonly lost: readonly string[] };
}

/** containerd's connection to a task of this scene. */
async function dial(scene: Scene, id: string): Promise<TaskClient> {
  const bundle = join(scene.containerd.dir, 'state', 'io.containerd.runtime.v2.task', 'default', id);
  const { address } = JSON.parse(await readFile(join(bundle, 'bootstrap.json'), 'utf8')) as { address: string };
  return clientOf(address.replace(/^unix:\/\//, ''), id);
}

async function clientOf(path: string, id: string): Promise<TaskClient> {
  const socket = connect(path);
  await once(socket, 'connect');
  return new TaskClient(socket, id);
}

async function timed(question: () => Promise<unknown>): Promise<number> {
  const began = performance.now();
  await question();
  return performance.now() - began;
}

async function ask(clients: readonly TaskClient[]): Promise<Answers> {
  const stateMs: number[] = [];
  const statsMs: number[] = [];
  for (let round = 0; round < rounds; round += 1) {
    for (const client of clients) {
      stateMs.push(await timed(() => client.state()));
      statsMs.push(await timed(() => client.stats()));
    }
  }
  return { stateMs: summary(stateMs), statsMs: summary(statsMs) };
}

/** Asks while `busy` writes all it can, and `worked` is given execs. */
async function askUnderLoad(
  scene: Scene,
  clients: readonly TaskClient[],
  [busy, worked]: readonly [string, string],
): Promise<Answers> {
  const exec = (id: string, name: string, ...command: string[]): string[] => {
    return ['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', name, id, ...command];
  };
  await using writer = scene.containerd.ctrStream(exec(busy, 'load', 'dd', 'if=/dev/zero', 'bs=64k'), {
    timeout: 600_000,
  });
  writer.stderr.resume();
  await once(writer.stdout, 'data');
  writer.stdout.resume();
  let asking = true;
  const execs = (async () => {
    for (let n = 0; asking; n += 1) await scene.ctr(exec(worked, `load-${n}`, 'true'));
  })();
  try {
    return await ask(clients);
  } finally {
    asking = false;
    await execs;
    await scene.ctr(['task', 'kill', '--signal', 'SIGKILL', '--exec-id', 'load', busy]);
    await writer.exit;
  }
}

/** See scripted-tasks.ts. */
async function askScripted(scene: Scene): Promise<LatencyUse['scripted']> {
  const child = fork(join(import.meta.dirname, 'scripted-tasks.ts'), [scene.dir, String(scriptedTasks)]);
  try {
    const [paths] = (await once(child, 'message')) as [string[]];
    const clients = await Promise.all(paths.map((path) => clientOf(path, 'c1')));
    for (const client of clients) {
      await client.create();
      await client.start();
    }
    const answers = await ask(clients);
    for (const client of clients) client.ttrpc.close();
    return { tasks: scriptedTasks, ...answers };
  } finally {
    child.kill();
  }
}

/** Kills kilnd and asks every task at once. */
async function askWhenKilled(scene: Scene, clients: ReadonlyMap<string, TaskClient>): Promise<LatencyUse['killed']> {
  const [kilnd = 0] = scene.kilndPids();
  signal(kilnd, 'SIGKILL');
  const lost: string[] = [];
  const times = async (question: (client: TaskClient) => Promise<unknown>): Promise<number[]> => {
    const answers = Array.from(clients, async ([id, client]) => {
      try {
        return [await timed(() => question(client))];
      } catch (error) {
        lost.push(`${id}: ${error instanceof Error ? error.message : String(error)}`);
        return [];
      }
    });
    return (await Promise.all(answers)).flat();
  };
  const [stateMs, statsMs] = await Promise.all([times((client) => client.state()), times((client) => client.stats())]);
  await waitForEnd(kilnd, 20_000);
  return { stateMs: summary(stateMs), statsMs: summary(statsMs), lost };
}

export async function measureLatency(scene: Scene, tasks: number): Promise<LatencyUse> {
  await scene.configure('');
  const ids: string[] = [];
  while (ids.length < tasks) ids.push(await idleContainer(scene, kiln));
  const byId = new Map<string, TaskClient>();
  for (const id of ids) byId.set(id, await dial(scene, id));
  const clients = [...byId.values()];
  const [first = '', second = first] = ids;
  const idle = await ask(clients);
  const loaded = await askUnderLoad(scene, clients, [first, second]);
  const killed = await askWhenKilled(scene, byId);
  for (const client of clients) client.ttrpc.close();
  await scene.purge();
  return { tasks, idle, loaded, scripted: await askScripted(scene), killed };
}

export function describeLatency({ tasks, idle, loaded, scripted, killed }: LatencyUse): string {
  const row = (name: string, { median, p95, max }: Summary): string[] => {
    return [name, ...[median, p95, max].map((value) => value.toFixed(1))];
  };
  const head = ['', 'median', 'p95', 'most'];
  const both = (name: string, { stateMs, statsMs }: Answers): string[][] => {
    return [row(`State, ${name}`, stateMs), row(`Stats, ${name}`, statsMs)];
  };
  return [
    `\nanswers over ttrpc with ${tasks} tasks, in ms`,
    table([head, ...both('idle', idle), ...both('under load', loaded)]),
    `\n${scripted.tasks} tasks without virtual machines (kilnd's part alone), in ms`,
    table([head, ...both('idle', scripted)]),
    `\nfrom SIGKILL of kilnd to the answer of each of ${tasks} tasks, in ms`,
    table([head, ...both('killed', killed)]),
    ...killed.lost.map((task) => `  lost: ${task}`),
  ].join('\n');
}
