/**
 * Making containers, and the processes that are exec'd in them: what crun is given, and what becomes of it. Everything that
 * is acquired is taken back in reverse, when a later step fails or the container is removed.
 */
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { CreateContainerRequest, ExecProcessRequest, Mount, Stdio } from '../gen/kiln/agent/v1/agent.ts';
import { BeyondCrun } from './beyond-crun.ts';
import { cgroupOf } from './cgroup.ts';
import { Controls } from './controls.ts';
import type { Crun } from './crun.ts';
import { diskIsFree, useAsDevice } from './disks.ts';
import { mountOne } from './mounts.ts';
import { oomScoreOf } from './oom-score.ts';
import type { Pod } from './pod.ts';
import { Process, type ProcessExit } from './process.ts';
import type { Reaper } from './reaper.ts';
import type { ContainerState } from './state.ts';
import { makeStdio, type ProcessStdio } from './stdio.ts';
import { Undo } from './undo.ts';
import type { Volumes } from './volumes.ts';

export interface ContainerOptions {
  /** Bundles go to directories below it, one per container. */
  readonly directory: string;
  readonly crun: Crun;
  readonly reaper: Reaper;
  readonly volumes: Volumes;
  readonly pod: Pod;
}

/** What a container's creation needs of those that know the others. */
export interface CreateHost extends ContainerOptions {
  /** Told when the root filesystem is mounted. */
  readonly mounted: (mounts: readonly Mount[]) => void;
  /** The process id of another container's init; throws when it has none. */
  readonly initOf: (container: string) => number;
}

/** What a container is made of. */
export interface ContainerParts {
  readonly bundle: string;
  /** Undefined when it has no control group of its own: then only its named processes are known. */
  readonly cgroup: string | undefined;
  readonly controls: Controls | undefined;
  readonly init: Process;
  /** Takes back everything that creating it has acquired. */
  readonly undo: Undo;
}

/** A container that is being made, as its creation sees it. */
export interface NewContainer {
  readonly id: string;
  readonly state: ContainerState;
  /** Of its root filesystem, from when they are mounted. */
  mounts: readonly Mount[] | undefined;
  /** Settled when the files that its creation awaits are there. */
  readonly files: PromiseWithResolvers<void>;
  /** Set when it has been created. */
  parts: ContainerParts | undefined;
  /** The VM ends next. */
  readonly guestEnds: boolean;
  /** Told of its init's exit before anybody else; returns it as it is to be told. */
  ended(pid: number, seen: ProcessExit): ProcessExit;
}

/** Numbers the files of one exec, and consoles: an exec id may be longer than a file's name. */
let lastNumber = 0;

/**
 * Everything short of the user's program. When it fails, nothing of the container is left.
 *
 * @returns the process id of its init
 */
export async function createContainer(
  container: NewContainer,
  request: CreateContainerRequest,
  { directory, crun, reaper, volumes, pod, mounted, initOf }: CreateHost,
): Promise<number> {
  const { id } = container;
  const beyondCrun = new BeyondCrun(request.spec);
  beyondCrun.check();
  await using undo = new Undo(() => container.guestEnds);
  const bundle = join(directory, id);
  // Whoever is root in a user namespace is not root here, and reaches its root filesystem by a path beside this one.
  mkdirSync(directory, { recursive: true, mode: 0o711 });
  mkdirSync(bundle, { recursive: true, mode: 0o700 });
  undo.deferWithin(() => rmSync(bundle, { recursive: true, force: true }));
  if (request.volumes !== undefined) {
    await volumes.mount(request.volumes.options);
    undo.defer(() => volumes.flush());
  }
  // Undone last: as long as anything has a disk, the host must not put another file behind it.
  undo.deferWithin(async () => {
    for (const disk of disksOf(request)) await diskIsFree(disk);
  });
  for (const mount of request.mounts) mountOne(mount, undo);
  for (const disk of request.disks) useAsDevice(disk, undo);
  container.mounts = request.mounts;
  mounted(request.mounts);
  if (request.awaitFiles) await container.files.promise;
  writeFileSync(join(bundle, 'config.json'), request.spec, { mode: 0o600 });
  const stdio = undo.use(stdioOf(request, directory));
  // From here on an init can exist: it must be found when it ends, and killed when anything below fails.
  pod.provideFor(request.spec, initOf);
  using _held = reaper.hold();
  undo.deferWithin(() => crun.delete(id, bundle));
  const pid = await crun.create(id, bundle, stdio);
  beyondCrun.apply(pid);
  stdio.connect();
  const cgroup = cgroupOf(pid);
  const controls = cgroup === undefined ? undefined : undo.use(new Controls(id, cgroup, request.mounts, volumes));
  container.state.become({ kind: 'created', pid });
  const init = new Process(pid, stdio, reaper, (exit) => container.ended(pid, exit));
  container.parts = { bundle, cgroup, controls, init, undo: undo.move() };
  return pid;
}

/** One more process in a container. When it fails, nothing of it is left. */
export async function execProcess(
  request: ExecProcessRequest,
  { bundle, init }: Pick<ContainerParts, 'bundle' | 'init'>,
  { directory, crun, reaper }: Pick<ContainerOptions, 'directory' | 'crun' | 'reaper'>,
): Promise<Process> {
  lastNumber += 1;
  const files = join(bundle, `exec-${lastNumber}`);
  mkdirSync(files, { mode: 0o700 });
  try {
    writeFileSync(join(files, 'process.json'), request.process, { mode: 0o600 });
    using undo = new DisposableStack();
    const stdio = undo.use(stdioOf(request, directory));
    using _held = reaper.hold();
    const pid = await crun.exec(request.id, files, stdio, oomScoreOf(init.pid));
    stdio.connect();
    const process = new Process(pid, stdio, reaper);
    undo.move();
    return process;
  } finally {
    rmSync(files, { recursive: true, force: true });
  }
}

function stdioOf({ stdio }: { readonly stdio?: Stdio | undefined }, directory: string): ProcessStdio {
  // Beside the bundles, not in one: a container's id can be longer than a Unix socket's path.
  lastNumber += 1;
  const none = { stdin: false, stdout: false, stderr: false, terminal: false, width: 0, height: 0 };
  return makeStdio(stdio ?? none, join(directory, `console-${lastNumber}`));
}

/** The serials of all disks that a container has. */
function disksOf({ mounts, disks }: CreateContainerRequest): string[] {
  return [...mounts.flatMap(({ source }) => (source?.$case === 'disk' ? [source.value] : [])), ...disks];
}
