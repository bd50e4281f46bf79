/**
 * A private containerd: its own root, state, sockets and log in a short temporary folder, so that the suite can lie
 * anywhere (a Unix socket's path holds at most 107 bytes, unix(7)) and can run beside an installed containerd.
 *
 * It finds Kiln as a user's containerd would: by dist/bin on its PATH. What kilnd is to use (state, cache, config) goes
 * through containerd's environment to the launcher, and from there to the kilnd it starts.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createWriteStream } from 'node:fs';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { type ContainerdVersion, containerdBin, distBin, runcBin } from './paths.ts';
import { Lines, type RunningProgram, type RunOptions, type RunResult, run, stream } from './spawn.ts';

export interface ContainerdOptions {
  readonly version: ContainerdVersion;
  /** A short, existing folder of this containerd's own. */
  readonly dir: string;
  /** KILN_STATE_DIR and the like, for the launcher. */
  readonly kilnEnv: Readonly<Record<string, string>>;
  /** Folders in front of dist/bin on PATH: a test's own shim or broken tools. */
  readonly pathBefore?: readonly string[];
  /** With CRI, which is off by default. Tried with `within` alone. */
  readonly cri?: CriOptions;
  /** Commands in front of containerd's and of `ctr`'s: for a network namespace of their own. */
  readonly within?: { readonly containerd: readonly string[]; readonly ctr: readonly string[] };
}

/** What containerd's CRI plugin is told. */
export interface CriOptions {
  /** Where CNI's plugins are, and the configuration of the network. */
  readonly cniBin: string;
  readonly cniConfig: string;
  /** What CRI takes for its pause image; it must be imported into the namespace k8s.io. */
  readonly sandboxImage: string;
  /** Name and type of the runtime. */
  readonly handler: string;
  readonly runtimeType: string;
  /** Who makes pods: CRI's own controller by default, or the runtime. Of containerd 2. */
  readonly sandboxer?: 'podsandbox' | 'shim';
}

export interface CtrOptions extends RunOptions {
  /** Default: `default`. */
  readonly namespace?: string;
}

export interface Containerd extends AsyncDisposable {
  readonly version: ContainerdVersion;
  readonly dir: string;
  readonly address: string;
  readonly logFile: string;
  /** Where containerd keeps the bundles: one folder per namespace, one per task in it. */
  readonly bundles: string;
  readonly pid: number;
  /** Runs `ctr` to its end. */
  ctr(args: readonly string[], options?: CtrOptions): Promise<RunResult>;
  /** Starts `ctr`; its input stays open with `interactive`. */
  ctrStream(args: readonly string[], options?: CtrOptions & { interactive?: boolean }): RunningProgram;
  /** SIGTERM, and waits for the end. Tasks go on. */
  stop(): Promise<void>;
  /** SIGKILL, and waits for the end. Tasks go on. */
  kill(): Promise<void>;
  /** Starts it again on the same folders, with another `kilnEnv` if given; ends it first when it still runs. */
  restart(kilnEnv?: Readonly<Record<string, string>>): Promise<void>;
  /** The last part of containerd's log. */
  logTail(lines?: number): Promise<string>;
}

// What a test has no use for, or what would look at the machine outside `dir` (CNI, NRI).
const disabledPlugins: Record<ContainerdVersion, readonly string[]> = {
  '1.6': [
    'io.containerd.grpc.v1.cri',
    'io.containerd.snapshotter.v1.aufs',
    'io.containerd.snapshotter.v1.btrfs',
    'io.containerd.snapshotter.v1.devmapper',
    'io.containerd.snapshotter.v1.zfs',
    'io.containerd.internal.v1.tracing',
    'io.containerd.tracing.processor.v1.otlp',
  ],
  '1.7': [
    'io.containerd.grpc.v1.cri',
    'io.containerd.internal.v1.tracing',
    'io.containerd.nri.v1.nri',
    'io.containerd.snapshotter.v1.blockfile',
    'io.containerd.snapshotter.v1.btrfs',
    'io.containerd.snapshotter.v1.devmapper',
    'io.containerd.snapshotter.v1.zfs',
    'io.containerd.tracing.processor.v1.otlp',
  ],
  '2.1': [
    'io.containerd.cri.v1.images',
    'io.containerd.cri.v1.runtime',
    'io.containerd.grpc.v1.cri',
    'io.containerd.internal.v1.tracing',
    'io.containerd.nri.v1.nri',
    'io.containerd.podsandbox.controller.v1.podsandbox',
    'io.containerd.snapshotter.v1.blockfile',
    'io.containerd.snapshotter.v1.btrfs',
    'io.containerd.snapshotter.v1.devmapper',
    'io.containerd.snapshotter.v1.zfs',
    'io.containerd.tracing.processor.v1.otlp',
  ],
};

const criPlugins = [
  'io.containerd.grpc.v1.cri',
  'io.containerd.cri.v1.images',
  'io.containerd.cri.v1.runtime',
  'io.containerd.podsandbox.controller.v1.podsandbox',
];

function criConfiguration(version: ContainerdVersion, cri: CriOptions): string[] {
  const s = JSON.stringify;
  const isOld = version.startsWith('1.');
  const runtime = isOld ? 'io.containerd.grpc.v1.cri' : 'io.containerd.cri.v1.runtime';
  return [
    `[plugins.${s(runtime)}]`,
    ...(isOld ? [`  sandbox_image = ${s(cri.sandboxImage)}`] : []),
    // Of the machine, which may have none of it.
    '  disable_apparmor = true',
    '  restrict_oom_score_adj = true',
    // Not in the machine's own /run/netns.
    '  netns_mounts_under_state_dir = true',
    `[plugins.${s(runtime)}.cni]`,
    isOld ? `  bin_dir = ${s(cri.cniBin)}` : `  bin_dirs = [${s(cri.cniBin)}]`,
    `  conf_dir = ${s(cri.cniConfig)}`,
    // It has to be one of those that are here, and a table of one takes away the "runc" that is there by default.
    `[plugins.${s(runtime)}.containerd]`,
    `  default_runtime_name = ${s(cri.handler)}`,
    `[plugins.${s(runtime)}.containerd.runtimes.${cri.handler}]`,
    `  runtime_type = ${s(cri.runtimeType)}`,
    ...(cri.sandboxer === undefined ? [] : [`  sandboxer = ${s(cri.sandboxer)}`]),
    ...(isOld ? [] : ['[plugins."io.containerd.cri.v1.images".pinned_images]', `  sandbox = ${s(cri.sandboxImage)}`]),
  ];
}

function configuration(version: ContainerdVersion, dir: string, cri: CriOptions | undefined): string {
  // JSON strings are TOML basic strings.
  const s = JSON.stringify;
  return [
    `version = ${version.startsWith('1.') ? 2 : 3}`,
    `root = ${s(join(dir, 'root'))}`,
    `state = ${s(join(dir, 'state'))}`,
    `temp = ${s(join(dir, 'tmp'))}`,
    `disabled_plugins = ${s(disabledPlugins[version].filter((id) => cri === undefined || !criPlugins.includes(id)))}`,
    '[grpc]',
    `  address = ${s(join(dir, 'c.sock'))}`,
    '[plugins."io.containerd.internal.v1.opt"]',
    `  path = ${s(join(dir, 'opt'))}`,
    // The transfer service (`ctr image import`) does not load without it.
    '[plugins."io.containerd.image-verifier.v1.bindir"]',
    `  bin_dir = ${s(join(dir, 'verifiers'))}`,
    ...(cri === undefined ? [] : criConfiguration(version, cri)),
    '',
  ].join('\n');
}

/** Starts a containerd of the given version; returns when it serves. */
export async function startContainerd(options: ContainerdOptions): Promise<Containerd> {
  const { version, dir, within = { containerd: [], ctr: [] } } = options;
  const address = join(dir, 'c.sock');
  if (Buffer.byteLength(`${address}.ttrpc`) > 107) throw new Error(`${dir} is too long for containerd's sockets`);
  const bin = containerdBin(version);
  const configFile = join(dir, 'containerd.toml');
  const logFile = join(dir, 'containerd.log');
  await mkdir(join(dir, 'tmp'), { recursive: true });
  await writeFile(configFile, configuration(version, dir, options.cri));

  const path = [...(options.pathBefore ?? []), distBin, bin, runcBin(), process.env.PATH ?? ''].join(':');
  // Not the test runner's whole environment: containerd hands its own to the shim.
  const baseEnv = { PATH: path, HOME: dir, TMPDIR: join(dir, 'tmp'), LANG: 'C.UTF-8' };
  let env: NodeJS.ProcessEnv = { ...baseEnv, ...options.kilnEnv };
  const log = createWriteStream(logFile, { flags: 'a' });

  const launch = async (): Promise<ReturnType<typeof spawn>> => {
    // pdeathsig: a killed test run takes its containerd along.
    const containerd = ['setpriv', '--pdeathsig', 'KILL', join(bin, 'containerd'), '--config', configFile];
    const [program = '', ...args] = [...within.containerd, ...containerd];
    const child = spawn(program, args, { env, cwd: dir, stdio: ['ignore', 'ignore', 'pipe'] });
    child.stderr.pipe(log, { end: false });
    const failed = once(child, 'exit').then(async () => {
      throw new Error(`containerd ${version} ended at its start:\n${await readFile(logFile, 'utf8')}`);
    });
    const booted = new Lines(child.stderr).waitFor((line) => line.includes('successfully booted'), 'sign of life');
    await Promise.race([booted, failed]);
    failed.catch(() => undefined);
    return child;
  };

  let child = await launch();
  const running = (): boolean => child.exitCode === null && child.signalCode === null;
  const end = async (signal: NodeJS.Signals): Promise<void> => {
    if (!running()) return;
    const ended = once(child, 'exit');
    child.kill(signal);
    await ended;
  };
  const ctrOptions = (given: CtrOptions | undefined): RunOptions => ({
    ...given,
    env: {
      PATH: path,
      HOME: dir,
      CONTAINERD_ADDRESS: address,
      CONTAINERD_NAMESPACE: given?.namespace ?? 'default',
      ...given?.env,
    },
  });

  const [ctr = '', ...ctrArgs] = [...within.ctr, join(bin, 'ctr')];

  return {
    version,
    dir,
    address,
    logFile,
    bundles: join(dir, 'state', 'io.containerd.runtime.v2.task'),
    get pid() {
      return child.pid ?? 0;
    },
    ctr: (args, given) => run(ctr, [...ctrArgs, ...args], ctrOptions(given)),
    ctrStream: (args, given) =>
      stream(ctr, [...ctrArgs, ...args], { ...ctrOptions(given), interactive: given?.interactive ?? false }),
    stop: () => end('SIGTERM'),
    kill: () => end('SIGKILL'),
    async restart(kilnEnv) {
      await end('SIGTERM');
      if (kilnEnv !== undefined) env = { ...baseEnv, ...kilnEnv };
      child = await launch();
    },
    async logTail(lines = 40) {
      return (await readFile(logFile, 'utf8')).split('\n').slice(-lines).join('\n');
    },
    async [Symbol.asyncDispose]() {
      await end('SIGTERM');
      log.end();
    },
  };
}
