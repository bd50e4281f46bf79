/** A stage for `kiln` as an OCI runtime: a Kiln of its own, bundles with busybox, no containerd. */
import { randomBytes } from 'node:crypto';
import { mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll } from 'vitest';
import { busyboxLayer, layerTar } from './images.ts';
import { assertNothingLeft, findLeft, type HostSnapshot, kilndPids, snapshotHost } from './leftovers.ts';
import { distBin, projectRoot } from './paths.ts';
import { sharedTemplatesVariable } from './shared-templates.ts';
import { mustRun, type RunningProgram, type RunOptions, type RunResult, run, stream, takeLine } from './spawn.ts';
import { signal, waitForEnd } from './wait-for-end.ts';

/** A config.json as tests write it. */
export interface BundleSpec {
  readonly args: readonly string[];
  readonly terminal?: boolean;
  readonly readonlyRoot?: boolean;
  readonly networkNamespace?: string;
  readonly cgroupsPath?: string;
  readonly annotations?: Readonly<Record<string, string>>;
  readonly mounts?: readonly object[];
  /** Put over the whole config.json. */
  readonly over?: Readonly<Record<string, unknown>>;
}

export interface Bundle {
  readonly directory: string;
  readonly rootfs: string;
}

export class OciStage {
  readonly dir = join('/tmp', `kt-${randomBytes(4).toString('hex')}`);
  readonly stateDir = join(this.dir, 'k');
  readonly root = join(this.stateDir, 'oci');
  readonly subreaper = join(this.dir, 'subreaper');
  readonly kiln = join(distBin, 'kiln');
  readonly env: NodeJS.ProcessEnv;
  #before: HostSnapshot | undefined;
  #busybox: Buffer = Buffer.alloc(0);
  #counter = 0;

  constructor() {
    const guest = process.env.KILN_GUEST_DIR;
    this.env = {
      PATH: process.env.PATH,
      KILN_STATE_DIR: this.stateDir,
      KILN_CACHE_DIR: join(this.dir, 'c'),
      ...(guest === undefined ? {} : { KILN_GUEST_DIR: guest }),
    };
  }

  get kilndLog(): string {
    return join(this.stateDir, 'kilnd.log');
  }

  async setUp(): Promise<void> {
    mkdirSync(join(this.dir, 'c'), { recursive: true });
    const shared = process.env[sharedTemplatesVariable];
    if (shared !== undefined) symlinkSync(shared, join(this.dir, 'c', 'templates'));
    this.#busybox = await layerTar(busyboxLayer());
    await mustRun('gcc', ['-O1', '-o', this.subreaper, join(projectRoot, 'test', 'support', 'subreaper.c')]);
    this.#before = snapshotHost({ stateDir: this.stateDir, cacheDir: join(this.dir, 'c') });
  }

  async tearDown(): Promise<void> {
    try {
      await this.#stopKilnd();
      if (this.#before !== undefined) await assertNothingLeft(this.#before);
    } finally {
      rmSync(this.dir, { recursive: true, force: true });
    }
  }

  /** After each test: no container, and nothing on the machine but an idle kilnd. */
  async checkClean(): Promise<void> {
    const ids = (await this.run(['list', '-q'])).stdout.toString().split('\n').filter(Boolean);
    for (const id of ids) await this.run(['delete', '--force', id]);
    if (this.#before === undefined) return;
    if (ids.length > 0) throw new Error(`the test left containers: ${ids.join(' ')}`);
    try {
      await assertNothingLeft(this.#before, { daemonMayRun: true, within: 10_000 });
    } catch (error) {
      for (const { pid } of findLeft(this.#before)) if (pid !== undefined) signal(pid, 'SIGKILL');
      throw error;
    }
  }

  id(): string {
    this.#counter += 1;
    return `c${this.#counter}`;
  }

  /** A new bundle whose root filesystem nobody else has. */
  async bundle(spec: BundleSpec): Promise<Bundle> {
    this.#counter += 1;
    const directory = join(this.dir, `bundle-${this.#counter}`);
    const rootfs = join(directory, 'rootfs');
    mkdirSync(rootfs, { recursive: true });
    await mustRun('tar', ['-x', '-C', rootfs], { stdin: this.#busybox });
    writeFileSync(join(directory, 'config.json'), JSON.stringify(configOf(spec)));
    return { directory, rootfs };
  }

  /** Changes a bundle's config.json. */
  write({ directory }: Bundle, config: object): void {
    writeFileSync(join(directory, 'config.json'), JSON.stringify(config));
  }

  /** `kiln` with these arguments, to its end. */
  run(args: readonly string[], options: RunOptions = {}): Promise<RunResult> {
    return run(this.kiln, args, { env: this.env, ...options });
  }

  /** The same, which must succeed; its stdout. */
  async must(args: readonly string[], options: RunOptions = {}): Promise<string> {
    const result = await mustRun(this.kiln, args, { env: this.env, ...options });
    return result.stdout.toString();
  }

  stream(args: readonly string[], options: RunOptions & { interactive?: boolean } = {}): RunningProgram {
    return stream(this.kiln, args, { env: this.env, ...options });
  }

  /** `kiln create` below a subreaper, which ends as the container does. Resolves when the container is created. */
  async create(
    id: string,
    bundle: Bundle,
    options: { interactive?: boolean; timeout?: number } = {},
  ): Promise<{ program: RunningProgram; pid: number }> {
    const [pidFile, log] = [join(this.dir, `${id}.pid`), join(this.dir, `${id}.log`)];
    const create = [this.kiln, '--log', log, 'create', '--bundle', bundle.directory, '--pid-file', pidFile, id];
    // The container is silent before its start, so this line comes first.
    const program = stream(this.subreaper, [pidFile, '/bin/sh', '-c', '"$0" "$@" && echo created', ...create], {
      env: this.env,
      ...options,
    });
    if ((await takeLine(program.stdout)) !== 'created') {
      program.stderr.resume();
      throw new Error(`kiln create ended with ${await program.exit}: ${readFileSync(log, 'utf8')}`);
    }
    return { program, pid: Number(readFileSync(pidFile, 'utf8')) };
  }

  async state(id: string): Promise<{ status: string; pid: number }> {
    return JSON.parse(await this.must(['state', id])) as { status: string; pid: number };
  }

  get kilndPid(): number {
    const [pid] = kilndPids(this.stateDir);
    if (pid === undefined) throw new Error('no kilnd runs');
    return pid;
  }

  async #stopKilnd(): Promise<void> {
    const pids = kilndPids(this.stateDir);
    for (const pid of pids) signal(pid, 'SIGTERM');
    for (const pid of pids) await waitForEnd(pid, 20_000);
  }
}

/** Sets a stage up for the enclosing `describe`, and checks after every test that nothing is left. */
export function useOciStage(): OciStage {
  const stage = new OciStage();
  beforeAll(() => stage.setUp());
  afterAll(() => stage.tearDown());
  afterEach(() => stage.checkClean());
  return stage;
}

const capabilities = ['CAP_CHOWN', 'CAP_DAC_OVERRIDE', 'CAP_FOWNER', 'CAP_KILL', 'CAP_SETGID', 'CAP_SETUID'];

/** A spec as `runc spec` makes it, as far as it matters. */
function configOf({ args, terminal = false, readonlyRoot = false, networkNamespace, ...others }: BundleSpec): object {
  const { annotations, cgroupsPath, mounts = [], over = {} } = others;
  const network = { type: 'network', ...(networkNamespace === undefined ? {} : { path: networkNamespace }) };
  return {
    ociVersion: '1.0.2',
    process: {
      ...{ terminal, user: { uid: 0, gid: 0 }, args, cwd: '/', noNewPrivileges: true },
      env: ['PATH=/bin:/sbin:/usr/bin:/usr/sbin', 'TERM=xterm'],
      capabilities: { bounding: capabilities, effective: capabilities, permitted: capabilities },
    },
    root: { path: 'rootfs', readonly: readonlyRoot },
    hostname: 'bundle',
    mounts: [
      { destination: '/proc', type: 'proc', source: 'proc' },
      { destination: '/dev', type: 'tmpfs', source: 'tmpfs', options: ['nosuid', 'strictatime', 'mode=755'] },
      { destination: '/dev/pts', type: 'devpts', source: 'devpts', options: ['nosuid', 'noexec', 'newinstance'] },
      { destination: '/sys', type: 'sysfs', source: 'sysfs', options: ['nosuid', 'noexec', 'nodev', 'ro'] },
      ...mounts,
    ],
    ...(annotations === undefined ? {} : { annotations }),
    linux: {
      namespaces: [{ type: 'pid' }, network, { type: 'ipc' }, { type: 'uts' }, { type: 'mount' }],
      ...(cgroupsPath === undefined ? {} : { cgroupsPath }),
    },
    ...over,
  };
}
