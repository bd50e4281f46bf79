/** One stage for end-to-end tests, demo and benchmarks: a private containerd, a Kiln of its own, a busybox image. */
import { randomBytes } from 'node:crypto';
import { mkdir, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { type Containerd, type CriOptions, startContainerd } from './containerd.ts';
import { EventLog } from './event-log.ts';
import { busyboxImage, type Image, importImage } from './images.ts';
import { assertNothingLeft, findLeft, type HostSnapshot, kilndPids, snapshotHost } from './leftovers.ts';
import type { TestNetwork } from './network.ts';
import { type ContainerdVersion, runtime, shimBinary } from './paths.ts';
import { sharedTemplatesVariable } from './shared-templates.ts';
import { mustRun, type RunningProgram, type RunOptions, type RunResult, run } from './spawn.ts';
import { signal, waitForEnd } from './wait-for-end.ts';

export interface SceneOptions {
  readonly version: ContainerdVersion;
  /** Text of kiln.toml; without it the file is empty and the defaults hold. */
  readonly config?: string;
  /** Images beside busybox. */
  readonly images?: readonly Image[];
  /** Templates of the scene's own, which its first start has to make; else the test run's. */
  readonly ownTemplates?: boolean;
  /** What an installed Kiln and containerd have in /run lies in memory here, too, and not on the disk of /tmp. */
  readonly runInMemory?: boolean;
  /** More environment for containerd, and so for the launcher and kilnd. */
  readonly env?: Readonly<Record<string, string>>;
  /** With containerd's CRI plugin. */
  readonly cri?: CriOptions;
  /** containerd, and all that it starts, lives in this network; it must have been set up. */
  readonly network?: TestNetwork;
}

export interface RunContainerOptions extends RunOptions {
  /** Default: busybox. */
  readonly image?: string;
  /** Flags of `ctr run` before the image: `['--rm', '--env', 'A=b']`. Default: `['--rm']`. */
  readonly flags?: readonly string[];
  readonly snapshotter?: string;
  readonly runtime?: string;
  readonly namespace?: string;
}

/** What the tests read and change of an OCI spec. */
export interface EditableSpec {
  ociVersion: string;
  root: { path: string; readonly?: boolean };
  hostname?: string;
  process: {
    args: string[];
    env: string[];
    cwd: string;
    user: { uid: number; gid: number; additionalGids?: number[]; umask?: number };
    capabilities?: Record<string, string[]>;
    rlimits?: { type: string; hard: number; soft: number }[];
    noNewPrivileges?: boolean;
    oomScoreAdj?: number;
  };
  mounts: { destination: string; type?: string; source?: string; options?: string[] }[];
  annotations?: Record<string, string>;
  linux: {
    resources?: Record<string, unknown>;
    maskedPaths?: string[];
    readonlyPaths?: string[];
    seccomp?: unknown;
    sysctl?: Record<string, string>;
    namespaces: { type: string; path?: string }[];
    cgroupsPath?: string;
  };
}

/** Runs the real shim after laying a test's own config.json into the bundle (the working directory of `start`). */
const editingShim = `#!/bin/sh
for argument; do
  [ "$previous" = -id ] && id=$argument
  previous=$argument
done
if [ "$previous" = start ] && [ -e "$KT_SPECS/$id" ]; then
  cp "$KT_SPECS/$id" config.json
fi
if [ "$previous" = start ] && [ -e "$KT_SPECS/$id.missing" ]; then
  rm config.json
fi
exec ${shimBinary(runtime)} "$@"
`;
const editingRuntime = 'io.containerd.kilnedit.v2';

export class Scene {
  readonly version: ContainerdVersion;
  readonly dir: string;
  readonly stateDir: string;
  readonly cacheDir: string;
  readonly configFile: string;
  readonly #options: SceneOptions;
  #containerd: Containerd | undefined;
  #before: HostSnapshot | undefined;
  /** Of this scene's container ids. */
  readonly #mark = randomBytes(2).toString('hex');
  #counter = 0;

  constructor(options: SceneOptions) {
    this.#options = options;
    this.version = options.version;
    // Only a name: a scene whose tests are all skipped is never set up.
    this.dir = join('/tmp', `kt-${randomBytes(4).toString('hex')}`);
    this.stateDir = join(this.dir, 'k');
    this.cacheDir = join(this.dir, 'c');
    this.configFile = join(this.dir, 'kiln.toml');
  }

  get containerd(): Containerd {
    if (this.#containerd === undefined) throw new Error('the scene is not set up yet');
    return this.#containerd;
  }

  get templatesDir(): string {
    return join(this.cacheDir, 'templates');
  }

  get kilndLog(): string {
    return join(this.stateDir, 'kilnd.log');
  }

  /** What tells the launcher, kilnd and `kiln` which Kiln this is. */
  get kilnEnv(): Record<string, string> {
    const guest = process.env.KILN_GUEST_DIR;
    return {
      KILN_STATE_DIR: this.stateDir,
      KILN_CACHE_DIR: this.cacheDir,
      KILN_CONFIG: this.configFile,
      KT_SPECS: join(this.dir, 'specs'),
      ...(guest === undefined ? {} : { KILN_GUEST_DIR: guest }),
    };
  }

  get #snapshot(): HostSnapshot {
    if (this.#before === undefined) throw new Error('the scene is not set up yet');
    return this.#before;
  }

  async setUp(): Promise<void> {
    await mkdir(this.dir, { mode: 0o755 });
    for (const name of ['k', 'c', 'd', 'd/state', 'shims', 'specs']) await mkdir(join(this.dir, name));
    if (this.#options.runInMemory === true) {
      for (const name of ['k', 'd/state']) {
        await mustRun('mount', ['-t', 'tmpfs', '-o', 'mode=0755', 'kiln-test', join(this.dir, name)]);
      }
    }
    await writeFile(join(this.dir, 'shims', shimBinary(editingRuntime)), editingShim, { mode: 0o755 });
    const shared = process.env[sharedTemplatesVariable];
    if (shared !== undefined && this.#options.ownTemplates !== true) await symlink(shared, this.templatesDir);
    this.#before = snapshotHost({
      stateDir: this.stateDir,
      cacheDir: this.cacheDir,
      containerdDir: join(this.dir, 'd'),
      idMark: this.#mark,
      ownPids: () => (this.#containerd === undefined ? [] : [this.#containerd.pid]),
    });
    await this.configure(this.#options.config ?? '');
    this.#containerd = await startContainerd({
      version: this.version,
      dir: join(this.dir, 'd'),
      kilnEnv: { ...this.kilnEnv, ...this.#options.env },
      pathBefore: [join(this.dir, 'shims')],
      ...(this.#options.cri && { cri: this.#options.cri }),
      ...(this.#options.network && { within: this.#options.network.commands }),
    });
    for (const image of [busyboxImage, ...(this.#options.images ?? [])]) await importImage(this.#containerd, image);
  }

  /** Ends everything, removes every trace, and fails when there was one that should not have been. */
  async tearDown(): Promise<void> {
    if (this.#before === undefined) return;
    try {
      await this.purge();
      await this.stopKilnd();
      await this.#containerd?.stop();
      await assertNothingLeft(this.#snapshot);
    } finally {
      await this.#endByForce();
      await this.#containerd?.[Symbol.asyncDispose]();
      await rm(this.dir, { recursive: true, force: true });
    }
  }

  /** The check after every test: no task, and nothing on the machine but an idle kilnd. */
  async checkClean(): Promise<void> {
    const problems: unknown[] = [];
    try {
      const tasks = await this.purge();
      if (tasks.length > 0) problems.push(new Error(`the test left tasks: ${tasks.join(' ')}`));
      await assertNothingLeft(this.#snapshot, { daemonMayRun: true, within: 5_000 });
    } catch (error) {
      problems.push(error);
      await this.stopKilnd().catch(() => undefined);
      await this.#endByForce();
    }
    if (problems.length > 0) throw problems[0];
  }

  /** Fails when anything is on the machine besides an idle kilnd; for checks in the middle of a test. */
  assertNothingLeft(options: { within?: number; daemonMayRun?: boolean } = {}): Promise<void> {
    return assertNothingLeft(this.#snapshot, { daemonMayRun: true, within: 5_000, ...options });
  }

  /** A container id that no other test of this scene has, and no other scene on the machine: it names a control group there. */
  id(hint = 'c'): string {
    this.#counter += 1;
    return `${hint}-${this.#mark}-${this.#counter}`;
  }

  #runArguments(id: string, command: readonly string[], options: RunContainerOptions): string[] {
    return [
      ...['run', '--runtime', options.runtime ?? runtime, '--fifo-dir', this.fifoDir],
      ...(options.snapshotter === undefined ? [] : ['--snapshotter', options.snapshotter]),
      ...(options.flags ?? ['--rm']),
      ...[options.image ?? busyboxImage.name, id, ...command],
    ];
  }

  /** For `ctr`, which else makes its FIFOs in a folder that all containerds share. */
  get fifoDir(): string {
    return join(this.containerd.dir, 'fifo');
  }

  /** `ctr run`, to its end. */
  async run(id: string, command: readonly string[], options: RunContainerOptions = {}): Promise<RunResult> {
    return this.containerd.ctr(this.#runArguments(id, command, options), options);
  }

  /** `ctr run --detach`, which must succeed. */
  async start(id: string, command: readonly string[], options: RunContainerOptions = {}): Promise<void> {
    const flags = ['--detach', ...(options.flags ?? [])];
    await this.ctr(this.#runArguments(id, command, { ...options, flags }), options);
  }

  /** `ctr run`, while it runs; its stdin stays open with `interactive`. */
  runStream(
    id: string,
    command: readonly string[],
    options: RunContainerOptions & { interactive?: boolean } = {},
  ): RunningProgram {
    return this.containerd.ctrStream(this.#runArguments(id, command, options), options);
  }

  /** `ctr` with these arguments, which must succeed; its stdout. */
  async ctr(args: readonly string[], options: RunOptions & { namespace?: string } = {}): Promise<string> {
    const result = await this.containerd.ctr(args, options);
    if (result.code !== 0) throw new Error(`ctr ${args.join(' ')} ended with ${result.code}: ${result.stderr}`);
    return result.stdout.toString();
  }

  /** The rows of `ctr task ls`. */
  async tasks(namespace = 'default'): Promise<{ id: string; pid: number; status: string }[]> {
    const rows = (await this.ctr(['task', 'ls'], { namespace })).trim().split('\n').slice(1);
    return rows.map((row) => {
      const [id = '', pid = '', status = ''] = row.trim().split(/\s+/);
      return { id, pid: Number(pid), status };
    });
  }

  /** Kills and deletes a task, and removes its container. */
  async remove(id: string): Promise<void> {
    await this.containerd.ctr(['task', 'rm', '--force', id]);
    await this.ctr(['container', 'rm', id]);
  }

  /**
   * `ctr run` of a container whose config.json was changed by the test. `edit` changes the spec that ctr made, returns
   * another text for the file, or null to remove it. The shim reads the result as if containerd had written it.
   */
  async runWithSpec(
    id: string,
    command: readonly string[],
    edit: (spec: EditableSpec) => string | null | undefined,
    options: RunContainerOptions = {},
  ): Promise<RunResult> {
    await this.createWithSpec(id, command, edit, options);
    try {
      return await this.containerd.ctr(['task', 'start', '--fifo-dir', this.fifoDir, id], options);
    } finally {
      await this.containerd.ctr(['container', 'rm', id]);
    }
  }

  /** The first half of `runWithSpec`: the container, ready for `ctr task start`. */
  async createWithSpec(
    id: string,
    command: readonly string[],
    edit: (spec: EditableSpec) => string | null | undefined,
    options: RunContainerOptions = {},
  ): Promise<void> {
    const flags = [...(options.flags ?? []), '--runtime', editingRuntime];
    const snapshotter = options.snapshotter === undefined ? [] : ['--snapshotter', options.snapshotter];
    await this.ctr([...['container', 'create', ...snapshotter, ...flags], ...[options.image ?? busyboxImage.name, id]]);
    const spec = JSON.parse(await this.ctr(['container', 'info', '--spec', id])) as EditableSpec;
    // Not by ctr: before 2.0 its `container create` takes the command's flags for its own.
    spec.process.args = [...command];
    const edited = edit(spec);
    const file = join(this.dir, 'specs', id);
    if (edited === null) await writeFile(`${file}.missing`, '');
    else await writeFile(file, edited ?? JSON.stringify(spec));
  }

  /** Collects containerd's events from now on, until it is disposed. */
  async events(): Promise<EventLog> {
    const program = this.containerd.ctrStream(['events'], { timeout: 600_000 });
    const log = new EventLog(program);
    // `ctr events` does not say when it listens, so events are made until the first is seen.
    for (let attempt = 0; !log.lines.all.some((line) => line.includes('/namespaces/')); attempt += 1) {
      if (attempt > 200) throw new Error('ctr events shows nothing');
      await this.ctr(['namespaces', 'label', 'default', `kt=${attempt}`]);
    }
    return log;
  }

  /** Writes kiln.toml and ends kilnd, so that the next task's kilnd reads it. */
  async configure(toml: string): Promise<void> {
    await writeFile(this.configFile, toml);
    await this.stopKilnd();
  }

  /** Restarts containerd with more environment for the launcher and the next kilnd. */
  async restartWith(env: Readonly<Record<string, string>>): Promise<void> {
    await this.stopKilnd();
    await this.containerd.restart({ ...this.kilnEnv, ...this.#options.env, ...env });
  }

  kilndPids(): number[] {
    return kilndPids(this.stateDir);
  }

  /** SIGTERM to this scene's kilnd; returns when it is gone. */
  async stopKilnd(): Promise<void> {
    const pids = this.kilndPids();
    for (const pid of pids) signal(pid, 'SIGTERM');
    for (const pid of pids) await waitForEnd(pid, 20_000);
  }

  /** Removes all tasks and containers of all namespaces; returns the tasks that were there. */
  async purge(): Promise<string[]> {
    if (this.#containerd === undefined) return [];
    const containerd = this.#containerd;
    const names = async (args: string[], namespace?: string): Promise<string[]> => {
      const result = await containerd.ctr(args, namespace === undefined ? {} : { namespace });
      return result.stdout.toString().split('\n').filter(Boolean);
    };
    const found: string[] = [];
    for (const namespace of await names(['namespaces', 'ls', '-q'])) {
      for (const task of await names(['task', 'ls', '-q'], namespace)) {
        found.push(`${namespace}/${task}`);
        await containerd.ctr(['task', 'rm', '--force', task], { namespace });
      }
      for (const container of await names(['container', 'ls', '-q'], namespace)) {
        await containerd.ctr(['container', 'rm', container], { namespace });
      }
    }
    return found;
  }

  /** The last lines of all logs, for a failed test. */
  async logs(): Promise<string> {
    const files = [this.kilndLog, join(this.dir, 'd', 'containerd.log')];
    const parts: string[] = [];
    for (const file of files) {
      const text = await readFile(file, 'utf8').catch(() => '(none)\n');
      const lines = text.split('\n').filter((line) => !line.includes('loading plugin'));
      parts.push(`--- ${file}\n${lines.slice(-30).join('\n')}`);
    }
    return parts.join('');
  }

  async #endByForce(): Promise<void> {
    for (const { pid } of findLeft(this.#snapshot, false)) {
      if (pid !== undefined) signal(pid, 'SIGKILL');
    }
    const { stdout } = await run('sh', ['-c', `tac /proc/mounts | cut -d' ' -f2 | grep "^$1/"`, 'sh', this.dir]);
    const mine = stdout.toString().split('\n').filter(Boolean);
    // containerd's own mounts live as long as it does.
    for (const point of mine) await run('umount', ['--lazy', point]);
    for (const name of await readdir(this.stateDir).catch(() => [])) {
      if (!/\.(log|lock|stderr)$/.test(name)) await rm(join(this.stateDir, name), { recursive: true, force: true });
    }
  }
}
