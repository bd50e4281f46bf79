/** Containers that a test lets come into a phase of their life, and the processes of theirs that it makes fail there. */
import { existsSync, readFileSync } from 'node:fs';
import { mkdir, readdir, readFile, writeFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { expect } from 'vitest';
import type { EventLog } from './event-log.ts';
import { ask, writeSaboteurInitrd } from './saboteur.ts';
import type { EditableSpec, Scene } from './scene.ts';
import { bytes, Lines, type RunningProgram } from './spawn.ts';

const env = ['PATH=/usr/sbin:/usr/bin:/sbin:/bin'];
const hook = (script: string) => ({ path: '/bin/sh', args: ['sh', '-c', script], env });

/** Waits for a file: the kernel has no event for a name in a folder that need not be there yet. */
export async function waitForFile(path: string, timeout = 60_000): Promise<void> {
  const deadline = performance.now() + timeout;
  while (!existsSync(path)) {
    if (performance.now() > deadline) throw new Error(`${path} does not appear within ${timeout} ms`);
    await sleep(10);
  }
}

/**
 * A step of a container's life that lasts until the test lets it go on, by a hook on the host: Create by
 * `createRuntime` (the virtual machine runs, its container is not made yet), Delete by `poststop` (all is released but
 * the task).
 */
export class Gate {
  readonly #folder: string;

  constructor(folder: string) {
    this.#folder = folder;
  }

  static async make(scene: Scene, id: string): Promise<Gate> {
    const folder = join(scene.dir, `gate-${id}`);
    await mkdir(folder);
    return new Gate(folder);
  }

  /** Ends by itself with the folder, which ends with the test. */
  get hook(): object {
    const dir = this.#folder;
    return hook(`: > ${dir}/reached; while [ -d ${dir} ] && ! [ -e ${dir}/go ]; do sleep 0.05; done`);
  }

  reached(): Promise<void> {
    return waitForFile(join(this.#folder, 'reached'));
  }

  async open(): Promise<void> {
    await writeFile(join(this.#folder, 'go'), '');
  }
}

/** A running container that counts up from 1 into a file on the host, a number a line. */
export class Counter {
  readonly id: string;
  readonly #file: string;

  private constructor(id: string, file: string) {
    this.id = id;
    this.#file = file;
  }

  static async start(scene: Scene): Promise<Counter> {
    const id = scene.id();
    const file = join(scene.dir, `out-${id}`);
    const script = 'trap "echo end; exit 7" TERM; i=0; while :; do i=$((i+1)); echo $i; usleep 2000; done';
    await scene.start(id, ['sh', '-c', script], { flags: ['--log-uri', `file://${file}`] });
    return new Counter(id, file);
  }

  /** Waits for ten numbers more: how long they take depends on how many other virtual machines share the processors. */
  async goesOn(timeout = 60_000): Promise<void> {
    const wanted = (await this.#last()) + 10;
    await expect.poll(() => this.#last(), { timeout, message: this.id }).toBeGreaterThanOrEqual(wanted);
  }

  /** Ends it by SIGTERM, removes it, and checks that no number is missing. One that came twice is none. */
  async end(scene: Scene, events: EventLog): Promise<void> {
    await scene.ctr(['task', 'kill', '--signal', 'SIGTERM', this.id]);
    expect((await events.waitFor('/tasks/exit', this.id)).event.exit_status).toBe(7);
    await scene.remove(this.id);
    const lines = (await readFile(this.#file, 'utf8')).trimEnd().split('\n');
    expect(lines.pop()).toBe('end');
    const numbers = new Set(lines.map(Number));
    expect([this.id, numbers.size]).toEqual([this.id, Math.max(...numbers)]);
  }

  /** The last number that is in the file with its line's end, 0 without one. */
  async #last(): Promise<number> {
    const lines = (await readFile(this.#file, 'utf8').catch(() => '')).split('\n');
    return Number(lines.at(-2) ?? 0);
  }
}

/** Gives the scene's virtual machines the saboteur. */
export async function letSaboteurIn(scene: Scene): Promise<void> {
  const initrd = join(scene.dir, 'initrd');
  writeSaboteurInitrd(initrd);
  // Which is reached by vsock.
  await scene.configure(`[vm]\nchannel = "hybrid-vsock"\ninitrd = ${JSON.stringify(initrd)}\n`);
}

export interface VictimOptions {
  readonly command: readonly string[];
  readonly hooks?: Readonly<Record<string, readonly object[]>>;
}

/** `ctr task start` of a container with these hooks, attached; its stdin stays open. */
export async function startVictim(scene: Scene, id: string, options: VictimOptions): Promise<RunningProgram> {
  await createVictim(scene, id, options);
  return scene.containerd.ctrStream(['task', 'start', '--fifo-dir', scene.fifoDir, id], { interactive: true });
}

export function createVictim(scene: Scene, id: string, options: VictimOptions): Promise<void> {
  const edit = (spec: EditableSpec): undefined => {
    Object.assign(spec, { hooks: options.hooks ?? {} });
  };
  return scene.createWithSpec(id, options.command, edit);
}

/** What a program that is attached has said and how it ended. */
export class Watched {
  readonly lines: Lines;
  readonly #program: RunningProgram;
  readonly #stderr: Promise<Buffer>;

  constructor(program: RunningProgram) {
    this.#program = program;
    this.lines = new Lines(program.stdout);
    this.#stderr = bytes(program.stderr);
  }

  /** A line for the container's shell, if that is what it runs. */
  say(line: string): void {
    this.#program.stdin.write(`${line}\n`);
  }

  close(): void {
    this.#program.stdin.end();
  }

  async end(): Promise<{ code: number; said: string }> {
    const code = await this.#program.exit;
    return { code, said: (await this.#stderr).toString().trim() };
  }
}

/** The private folder of a container, whose name its helper processes carry. */
export async function directoryOf(scene: Scene, id: string): Promise<string> {
  const address = await readFile(join(scene.containerd.bundles, 'default', id, 'address'), 'utf8');
  return join(scene.stateDir, 'c', basename(address));
}

/** The processes of one container by their program. */
export async function helpersOf(scene: Scene, id: string, program: string): Promise<number[]> {
  const directory = await directoryOf(scene, id);
  const found: number[] = [];
  for (const entry of await readdir('/proc')) {
    if (!/^\d+$/.test(entry)) continue;
    let commandLine = '';
    try {
      commandLine = readFileSync(`/proc/${entry}/cmdline`, 'utf8');
    } catch {
      // It has ended since the folder was read.
    }
    if (commandLine.includes(program) && commandLine.includes(directory)) found.push(Number(entry));
  }
  return found;
}

/** How long the hook of `startIntoStart` in the guest takes, in seconds; also what the saboteur knows it by. */
const hookSeconds = '2.5';

/**
 * A container that is starting, until `letGo`: Start is held up by a `poststart` hook on the host, and when this resolves
 * the program does not run yet, because of a hook in the guest that takes a while (crun does not wait for that one). Its
 * virtual machine needs the saboteur, who sees the hook in the guest begin.
 */
export async function startIntoStart(
  scene: Scene,
  id: string,
  command: readonly string[],
): Promise<{ watched: Watched; letGo(): Promise<void> }> {
  const [create, start] = [await Gate.make(scene, `${id}-create`), await Gate.make(scene, `${id}-start`)];
  const slow = { path: '/bin/sleep', args: ['sleep', hookSeconds], env };
  const hooks = { createRuntime: [create.hook], startContainer: [slow], poststart: [start.hook] };
  const watched = new Watched(await startVictim(scene, id, { command, hooks }));
  await create.reached();
  const { hit } = await ask(await directoryOf(scene, id), `SIGNAL 0 sleep ${hookSeconds} 0`);
  await create.open();
  await Promise.all([hit, start.reached()]);
  return { watched, letGo: () => start.open() };
}
