/**
 * The containers of this guest: what exists, in which state, and the verbs on them.
 */
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type {
  CreateContainerRequest,
  ExecProcessRequest,
  Mount,
  ReadStatsResponse,
  Stdio,
} from '../gen/kiln/agent/v1/agent.ts';
import { BeyondCrun } from './beyond-crun.ts';
import { cgroupOf, killAll, processesIn } from './cgroup.ts';
import { Controls } from './controls.ts';
import type { Crun } from './crun.ts';
import { diskIsFree, useAsDevice } from './disks.ts';
import { AgentError } from './errors.ts';
import { mountOne } from './mounts.ts';
import { oomScoreOf } from './oom-score.ts';
import type { Pod } from './pod.ts';
import { kill, Process, type ProcessExit } from './process.ts';
import type { Reaper } from './reaper.ts';
import { deadlyBeforeStart } from './signals.ts';
import { ContainerState, type State } from './state.ts';
import { makeStdio, type ProcessStdio } from './stdio.ts';
import type { Volumes } from './volumes.ts';

const SIGKILL = 9;

/** An id becomes a directory's name: what runc and crun allow, too. */
const validId = /^[\w+.-]{1,255}$/;

/** A process of a container: the init process has the empty exec id. */
export interface ProcessName {
  readonly id: string;
  readonly execId: string;
}

interface Container {
  readonly id: string;
  readonly state: ContainerState;
  /** By their exec ids; null while crun is at it. */
  readonly execs: Map<string, Process | null>;
  /** Of its root filesystem, from when they are mounted. */
  mounts?: readonly Mount[];
  /** Settled when the files that its creation awaits are there. */
  readonly files: PromiseWithResolvers<void>;
  /** Set when it has been created. */
  made?: Made;
  /** Set from when its program may run: from then on, signals are the program's. */
  starting?: boolean;
  /** Starts and execs that are under way. */
  readonly pending: Set<Promise<unknown>>;
  /** The signal that ended it before its start; the kernel was told SIGKILL. */
  endedBy?: number;
  /** Set while it is being removed. */
  removal?: Promise<void>;
  /** The VM ends next: crun's own state of the container goes with it, without a process to remove it. */
  guestEnds?: boolean;
}

interface Made {
  readonly bundle: string;
  /** Undefined when it has no control group of its own: then only its named processes are known. */
  readonly cgroup: string | undefined;
  readonly controls: Controls | undefined;
  readonly init: Process;
  /** Takes back everything that creating it has acquired. */
  readonly undo: AsyncDisposableStack;
}

/** A process of the guest, and what the host calls it. */
export interface NamedProcess {
  readonly pid: number;
  readonly execId: string;
  readonly init: boolean;
}

export interface ContainersOptions {
  /** Bundles go to directories below it, one per container. */
  readonly directory: string;
  readonly crun: Crun;
  readonly reaper: Reaper;
  readonly volumes: Volumes;
  readonly pod: Pod;
}

export class Containers {
  readonly #options: ContainersOptions;
  readonly #containers = new Map<string, Container>();
  /** Whoever has files for a container that is not yet there, by its id. */
  readonly #mounted = new Map<string, PromiseWithResolvers<readonly Mount[]>>();
  /** Numbers the files of one exec: an exec id may be longer than a file's name. */
  #execs = 0;

  constructor(options: ContainersOptions) {
    this.#options = options;
  }

  /**
   * Everything short of the user's program. When it fails, nothing of the container is left.
   *
   * @returns the process id of its init
   */
  async create(request: CreateContainerRequest): Promise<number> {
    const { id } = request;
    if (!validId.test(id) || id === '.' || id === '..') {
      throw new AgentError('invalid-argument', `"${id}" is no container id: use letters, digits and _ + - .`);
    }
    if (this.#containers.has(id)) throw new AgentError('already-exists', `container "${id}" exists already`);
    const files = Promise.withResolvers<void>();
    files.promise.catch(() => {});
    const container: Container = { id, state: new ContainerState(id), execs: new Map(), pending: new Set(), files };
    this.#containers.set(id, container);
    try {
      return await this.#make(container, request);
    } catch (error) {
      this.#mounted.get(id)?.reject(error);
      if (error instanceof SuppressedError) {
        // The clean-up has failed, too. Something may still have its disks: whoever asks for its removal is told.
        container.removal = Promise.reject(error);
        container.removal.catch(() => {});
      } else {
        this.#containers.delete(id);
      }
      throw error;
    }
  }

  async #make(container: Container, request: CreateContainerRequest): Promise<number> {
    const { directory, crun, reaper, volumes, pod } = this.#options;
    const { id } = container;
    const beyondCrun = new BeyondCrun(request.spec);
    beyondCrun.check();
    await using undo = new AsyncDisposableStack();
    const bundle = join(directory, id);
    // Whoever is root in a user namespace is not root here, and reaches its root filesystem by a path beside this one.
    mkdirSync(directory, { recursive: true, mode: 0o711 });
    mkdirSync(bundle, { recursive: true, mode: 0o700 });
    undo.defer(() => rmSync(bundle, { recursive: true, force: true }));
    if (request.volumes !== undefined) {
      await volumes.mount(request.volumes.options);
      undo.defer(() => volumes.flush());
    }
    // Undone last: as long as anything has a disk, the host must not put another file behind it.
    undo.defer(async () => {
      if (container.guestEnds) return;
      for (const disk of disksOf(request)) await diskIsFree(disk);
    });
    for (const mount of request.mounts) mountOne(mount, undo);
    for (const disk of request.disks) useAsDevice(disk, undo);
    container.mounts = request.mounts;
    this.#mounted.get(id)?.resolve(request.mounts);
    if (request.awaitFiles) await container.files.promise;
    writeFileSync(join(bundle, 'config.json'), request.spec, { mode: 0o600 });
    const stdio = undo.use(this.#stdio(request.stdio));
    // From here on an init can exist: it must be found when it ends, and killed when anything below fails.
    pod.provideFor(request.spec, (other) => {
      return this.#get(other).state.expect('join the process namespace of', 'created', 'running').pid;
    });
    using _held = reaper.hold();
    undo.defer(async () => {
      if (!container.guestEnds) await crun.delete(id, bundle);
    });
    const pid = await crun.create(id, bundle, stdio);
    beyondCrun.apply(pid);
    stdio.connect();
    const cgroup = cgroupOf(pid);
    const controls = cgroup === undefined ? undefined : undo.use(new Controls(id, cgroup, request.mounts, volumes));
    container.state.become({ kind: 'created', pid });
    const init = new Process(pid, stdio, reaper, (exit) => this.#ended(container, pid, exit));
    container.made = { bundle, cgroup, controls, init, undo: undo.move() };
    return pid;
  }

  /**
   * Puts files into the root filesystem of a container that is being made, and that awaits them; before its creation is
   * asked for, this waits for it. Or of one whose processes rest.
   */
  async provideFiles(id: string, write: (root: string) => Promise<void>): Promise<void> {
    if (this.#containers.get(id)?.made !== undefined) return write(this.mountsAtRest(id).at(-1)?.target ?? '');
    const mounted = Promise.withResolvers<readonly Mount[]>();
    mounted.promise.catch(() => {});
    this.#mounted.set(id, mounted);
    try {
      const mounts = this.#containers.get(id)?.mounts ?? (await mounted.promise);
      const { files } = this.#get(id);
      try {
        await write(mounts.at(-1)?.target ?? '');
        files.resolve();
      } catch (error) {
        files.reject(error);
        throw error;
      }
    } finally {
      this.#mounted.delete(id);
    }
  }

  /** The mounts of the root filesystem of a container whose processes rest, or have ended. */
  mountsAtRest(id: string): readonly Mount[] {
    const { state, made, mounts } = this.#get(id);
    const { kind } = state.expect('read the files of', 'running', 'stopped');
    if (mounts === undefined || (kind === 'running' && made?.controls?.paused !== true)) {
      throw new AgentError('failed-precondition', `cannot read what container "${id}" has written: it is not paused`);
    }
    return mounts;
  }

  /** What the container's processes have as "/". */
  rootOf(id: string): string {
    const { state, made } = this.#get(id);
    state.expect('use the files of', 'created', 'running');
    if (made === undefined) throw state.refusal('use the files of');
    return `/proc/${made.init.pid}/root`;
  }

  #ended(container: Container, pid: number, seen: ProcessExit): ProcessExit {
    const exit = container.endedBy === undefined ? seen : { ...seen, status: 128 + container.endedBy };
    container.state.become({ kind: 'stopped', pid, exit });
    // The kernel does it where the container has a PID namespace of its own; runc does it where it has none.
    if (container.made?.cgroup !== undefined) killAll(container.made.cgroup);
    return exit;
  }

  /** Runs the user's program. */
  async start(id: string): Promise<void> {
    const container = this.#get(id);
    const { state, made } = container;
    const { pid } = state.expect('start', 'created');
    if (made === undefined) throw state.refusal('start');
    container.starting = true;
    await underWay(container, this.#options.crun.start(id, made.bundle));
    // A short program may have ended while crun was still returning.
    if (state.current.kind === 'created') state.become({ kind: 'running', pid });
  }

  /**
   * Runs one more process in the container. When it fails, nothing of it is left.
   *
   * @returns its process id
   */
  async exec(request: ExecProcessRequest): Promise<number> {
    const { id, execId } = request;
    const container = this.#get(id);
    const { state, made, execs } = container;
    state.expect('run a process in', 'created', 'running');
    if (made === undefined) throw state.refusal('run a process in');
    if (execId === '') throw new AgentError('invalid-argument', 'a process needs an exec id');
    if (execs.has(execId)) {
      throw new AgentError('already-exists', `container "${id}" has a process "${execId}" already`);
    }
    execs.set(execId, null);
    try {
      const process = await underWay(container, this.#exec(container, made, request));
      execs.set(execId, process);
      return process.pid;
    } catch (error) {
      execs.delete(execId);
      throw error;
    }
  }

  async #exec(container: Container, { bundle, init }: Made, request: ExecProcessRequest): Promise<Process> {
    const { crun, reaper } = this.#options;
    this.#execs += 1;
    const files = join(bundle, `exec-${this.#execs}`);
    mkdirSync(files, { mode: 0o700 });
    try {
      writeFileSync(join(files, 'process.json'), request.process, { mode: 0o600 });
      using undo = new DisposableStack();
      const stdio = undo.use(this.#stdio(request.stdio));
      using _held = reaper.hold();
      const pid = await crun.exec(container.id, files, stdio, oomScoreOf(init.pid));
      stdio.connect();
      const process = new Process(pid, stdio, reaper);
      undo.move();
      return process;
    } finally {
      rmSync(files, { recursive: true, force: true });
    }
  }

  #stdio(wanted: Stdio | undefined): ProcessStdio {
    // Beside the bundles, not in one: a container's id can be longer than a Unix socket's path.
    this.#execs += 1;
    const none = { stdin: false, stdout: false, stderr: false, terminal: false, width: 0, height: 0 };
    return makeStdio(wanted ?? none, join(this.#options.directory, `console-${this.#execs}`));
  }

  /** Sends a signal to one process, or to every process of the container. */
  signal({ id, execId }: ProcessName, signal: number, all: boolean): void {
    const container = this.#get(id);
    const { state, made } = container;
    if (execId === '' && !container.starting && state.current.kind === 'created' && deadlyBeforeStart.has(signal)) {
      container.endedBy = signal;
      if (!kill(state.current.pid, SIGKILL)) throw state.refusal('signal');
      return;
    }
    if (all) {
      const current = state.expect('signal', 'created', 'running', 'stopped');
      if (signal === SIGKILL && made?.cgroup !== undefined) killAll(made.cgroup);
      else for (const { pid } of processesOf(container, current)) kill(pid, signal);
      return;
    }
    if (execId === '') {
      const { pid } = state.expect('signal', 'created', 'running');
      if (!kill(pid, signal)) throw state.refusal('signal');
      return;
    }
    const process = this.process({ id, execId });
    if (process.exit !== undefined || !kill(process.pid, signal)) {
      throw new AgentError('failed-precondition', `process "${execId}" of container "${id}" has ended`);
    }
  }

  /** Resolves when the process has ended; at once if it already has. */
  async wait(name: ProcessName): Promise<ProcessExit> {
    return this.process(name).ended;
  }

  /**
   * Whether the program was started and is frozen, and which processes were exec'd and not removed; told when no start
   * or exec is under way.
   */
  async describe(id: string): Promise<{ started: boolean; paused: boolean; execs: NamedProcess[] }> {
    const { state, execs, made, pending } = this.#get(id);
    await Promise.allSettled(pending);
    const current = state.expect('describe', 'created', 'running', 'stopped');
    const paused = made?.controls?.paused ?? false;
    const named = [...execs].flatMap(([execId, process]) =>
      process === null ? [] : [{ pid: process.pid, execId, init: false }],
    );
    return { started: current.kind !== 'created', paused, execs: named };
  }

  /** The ids of those that are not removed. */
  list(): string[] {
    return [...this.#containers.keys()];
  }

  /** The container's processes: which is its init, and which were exec'd. */
  processes(id: string): NamedProcess[] {
    const container = this.#get(id);
    return processesOf(container, container.state.expect('list the processes of', 'created', 'running', 'stopped'));
  }

  /** @throws AgentError not-found, or failed-precondition while it is being made or removed */
  process({ id, execId }: ProcessName): Process {
    const { state, made, execs } = this.#get(id);
    state.expect('use a process of', 'created', 'running', 'stopped');
    if (made === undefined) throw state.refusal('use a process of');
    if (execId === '') return made.init;
    const process = execs.get(execId);
    if (process === undefined) throw new AgentError('not-found', `container "${id}" has no process "${execId}"`);
    if (process === null) throw new AgentError('failed-precondition', `process "${execId}" is being started`);
    return process;
  }

  /** Forgets an exec'd process that has ended. */
  removeProcess(name: ProcessName): void {
    const { id, execId } = name;
    const process = this.process(name);
    if (execId === '') throw new AgentError('invalid-argument', 'the init process goes with its container');
    if (process.exit === undefined) {
      throw new AgentError(
        'failed-precondition',
        `cannot remove process "${execId}" of container "${id}": it is running`,
      );
    }
    this.#get(id).execs.delete(execId);
    process[Symbol.dispose]();
  }

  /** What a container has used; undefined of one without a control group of its own. */
  finalStats(id: string): ReadStatsResponse | undefined {
    return this.#containers.get(id)?.made?.controls?.stats();
  }

  /** Follows who of the container is killed for want of memory; undefined where it has no control group of its own. */
  followOom(id: string, onKills: (kills: bigint) => void): Disposable | undefined {
    return this.#containers.get(id)?.made?.controls?.followOom(onKills);
  }

  /** The verbs on its control group, for an action that these states allow. */
  controls(id: string, action: string, ...allowed: State['kind'][]): Controls {
    const { state, made } = this.#get(id);
    state.expect(action, ...allowed);
    if (made?.controls === undefined) {
      throw new AgentError('internal', `cannot ${action} container "${id}": it has no control group of its own`);
    }
    return made.controls;
  }

  /**
   * Removes a container; a running one only with `force`, which kills it first. Its disks are complete afterwards, and nobody
   * has them. Where that fails, it fails again each time: the host must not put other files behind the disks.
   */
  async remove(id: string, force: boolean, guestEnds = false): Promise<void> {
    const container = this.#get(id);
    if (container.removal === undefined) {
      container.guestEnds = guestEnds;
      const { state, made } = container;
      const current = force
        ? state.expect('remove', 'created', 'running', 'stopped')
        : state.expect('remove', 'created', 'stopped');
      if (made === undefined) throw state.refusal('remove');
      container.removal = this.#remove(container, current, made);
    }
    return container.removal;
  }

  async #remove(container: Container, current: AliveOrStopped, made: Made): Promise<void> {
    const { state, execs } = container;
    // Also of a stopped one: without a PID namespace of its own, processes can outlive the init.
    if (made.cgroup !== undefined) killAll(made.cgroup);
    if (current.kind !== 'stopped') kill(current.pid, SIGKILL);
    await made.init.ended;
    state.become({ kind: 'removing' });
    for (const process of execs.values()) process?.[Symbol.dispose]();
    this.#options.pod.forget(container.id);
    await made.undo.disposeAsync();
    this.#containers.delete(container.id);
  }

  #get(id: string): Container {
    const container = this.#containers.get(id);
    if (container === undefined) throw new AgentError('not-found', `no container "${id}" in this guest`);
    return container;
  }
}

/** The serials of all disks that a container has. */
function disksOf({ mounts, disks }: CreateContainerRequest): string[] {
  return [...mounts.flatMap(({ source }) => (source?.$case === 'disk' ? [source.value] : [])), ...disks];
}

/** Has `describe` wait for a step. */
async function underWay<T>({ pending }: Container, step: Promise<T>): Promise<T> {
  pending.add(step);
  try {
    return await step;
  } finally {
    pending.delete(step);
  }
}

type AliveOrStopped = Extract<State, { pid: number }>;

function processesOf({ made, execs }: Container, state: AliveOrStopped) {
  const names = new Map<number, string>();
  for (const [execId, process] of execs) {
    if (process?.exit === undefined && process !== null) names.set(process.pid, execId);
  }
  const known = state.kind === 'stopped' ? [...names.keys()] : [state.pid, ...names.keys()];
  const pids = made?.cgroup === undefined ? known : processesIn(made.cgroup);
  return pids.map((pid) => ({
    pid,
    execId: names.get(pid) ?? '',
    init: pid === state.pid && state.kind !== 'stopped',
  }));
}
