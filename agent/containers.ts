/**
 * The containers of this guest: what exists, in which state, and the verbs on them.
 */
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { CreateContainerRequest } from '../gen/kiln/agent/v1/agent.ts';
import { CLOCK_REALTIME, clockGettime } from '../src/sys/clock.ts';
import type { Exit } from '../src/sys/process.ts';
import { cgroupOf, killAll, processesIn } from './cgroup.ts';
import { Controls } from './controls.ts';
import type { Crun } from './crun.ts';
import { AgentError } from './errors.ts';
import { mountOne } from './mounts.ts';
import type { Reaper } from './reaper.ts';
import { type ContainerExit, ContainerState, type State } from './state.ts';
import { ContainerStdio } from './stdio.ts';

const SIGKILL = 9;

/** An id becomes a directory's name: what runc and crun allow, too. */
const validId = /^[\w+.-]{1,255}$/;

interface Container {
  readonly id: string;
  readonly state: ContainerState;
  readonly ended: PromiseWithResolvers<ContainerExit>;
  /** Set when it has been created. */
  made?: Made;
  /** Set while it is being removed. */
  removal?: Promise<void>;
  /** The VM ends next: crun's own state of the container goes with it, without a process to remove it. */
  guestEnds?: boolean;
}

type AliveOrStopped = Extract<State, { pid: number }>;

interface Made {
  readonly bundle: string;
  /** Undefined when it has no control group of its own: then only its init is known. */
  readonly cgroup: string | undefined;
  readonly controls: Controls | undefined;
  readonly stdio: ContainerStdio;
  /** Takes back everything that creating it has acquired. */
  readonly undo: AsyncDisposableStack;
}

export interface ContainersOptions {
  /** Bundles go to directories below it, one per container. */
  readonly directory: string;
  readonly crun: Crun;
  readonly reaper: Reaper;
}

export class Containers {
  readonly #options: ContainersOptions;
  readonly #containers = new Map<string, Container>();

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
    const container: Container = { id, state: new ContainerState(id), ended: Promise.withResolvers() };
    this.#containers.set(id, container);
    try {
      return await this.#make(container, request);
    } catch (error) {
      this.#containers.delete(id);
      throw error;
    }
  }

  async #make(container: Container, request: CreateContainerRequest): Promise<number> {
    const { directory, crun, reaper } = this.#options;
    const { id } = container;
    await using undo = new AsyncDisposableStack();
    const bundle = join(directory, id);
    mkdirSync(bundle, { recursive: true, mode: 0o700 });
    undo.defer(() => rmSync(bundle, { recursive: true, force: true }));
    for (const mount of request.mounts) mountOne(mount, undo);
    writeFileSync(join(bundle, 'config.json'), request.spec, { mode: 0o600 });
    const stdio = undo.use(new ContainerStdio(request));
    // From here on an init can exist: it must be found when it ends, and killed when anything below fails.
    using _held = reaper.hold();
    undo.defer(async () => {
      if (!container.guestEnds) await crun.delete(id, bundle);
    });
    const pid = await crun.create(id, bundle, stdio.forProgram);
    stdio.release();
    const cgroup = cgroupOf(pid);
    const controls = cgroup === undefined ? undefined : undo.use(new Controls(id, cgroup, request.mounts));
    container.state.become({ kind: 'created', pid });
    reaper.watch(pid, (exit) => this.#ended(container, pid, exit));
    container.made = { bundle, cgroup, controls, stdio, undo: undo.move() };
    return pid;
  }

  #ended(container: Container, pid: number, exit: Exit): void {
    const status = exit.kind === 'exited' ? exit.code : 128 + exit.signal;
    const ended: ContainerExit = { status, atNs: clockGettime(CLOCK_REALTIME) };
    container.state.become({ kind: 'stopped', pid, exit: ended });
    container.ended.resolve(ended);
  }

  /** Runs the user's program. */
  async start(id: string): Promise<void> {
    const { state, made } = this.#get(id);
    const { pid } = state.expect('start', 'created');
    if (made === undefined) throw state.refusal('start');
    await this.#options.crun.start(id, made.bundle);
    // A short program may have ended while crun was still returning.
    if (state.current.kind === 'created') state.become({ kind: 'running', pid });
  }

  /** Sends a signal to the init, or to every process of the container. */
  signal(id: string, signal: number, all: boolean): void {
    const { state, made } = this.#get(id);
    if (all) {
      const current = state.expect('signal', 'created', 'running', 'stopped');
      if (signal === SIGKILL && made?.cgroup !== undefined) killAll(made.cgroup);
      else for (const pid of processesOf(current, made)) kill(pid, signal);
      return;
    }
    const { pid } = state.expect('signal', 'created', 'running');
    if (!kill(pid, signal)) throw state.refusal('signal');
  }

  /** Resolves when the init has ended; at once if it already has. */
  async wait(id: string): Promise<ContainerExit> {
    const { state, ended } = this.#get(id);
    state.expect('wait for', 'created', 'running', 'stopped');
    return ended.promise;
  }

  /** The ids of the container's processes, and its init's. */
  processes(id: string): { pids: number[]; initPid: number } {
    const { state, made } = this.#get(id);
    const current = state.expect('list the processes of', 'created', 'running', 'stopped');
    return { pids: processesOf(current, made), initPid: current.pid };
  }

  /** Its stdin, stdout and stderr. */
  stdio(id: string): ContainerStdio {
    const { state, made } = this.#get(id);
    state.expect('use the stdio of', 'created', 'running', 'stopped');
    if (made === undefined) throw state.refusal('use the stdio of');
    return made.stdio;
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

  /** Removes a container; a running one only with `force`, which kills it first. Its disks are complete afterwards. */
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
    const { state, ended } = container;
    // Also of a stopped one: without a PID namespace of its own, processes can outlive the init.
    if (made.cgroup !== undefined) killAll(made.cgroup);
    if (current.kind !== 'stopped') kill(current.pid, SIGKILL);
    await ended.promise;
    state.become({ kind: 'removing' });
    try {
      await made.undo.disposeAsync();
    } finally {
      this.#containers.delete(container.id);
    }
  }

  #get(id: string): Container {
    const container = this.#containers.get(id);
    if (container === undefined) throw new AgentError('not-found', `no container "${id}" in this guest`);
    return container;
  }
}

function processesOf(state: AliveOrStopped, made: Made | undefined): number[] {
  if (made?.cgroup !== undefined) return processesIn(made.cgroup);
  return state.kind === 'stopped' ? [] : [state.pid];
}

/**
 * kill(2).
 *
 * @returns false when the process has ended
 * @throws AgentError invalid-argument when there is no such signal
 */
function kill(pid: number, signal: number): boolean {
  try {
    process.kill(pid, signal);
    return true;
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ESRCH') return false;
    if (code === 'EINVAL') throw new AgentError('invalid-argument', `there is no signal ${signal}`);
    throw error;
  }
}
