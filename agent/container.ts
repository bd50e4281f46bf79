/**
 * One container: the verbs on it, from when it is being made (create.ts) until it is removed. Its processes go by their exec
 * ids; the init's is empty.
 */
import type { ExecProcessRequest, Mount, ReadStatsResponse } from '../gen/kiln/agent/v1/agent.ts';
import { killAll, processesIn } from './cgroup.ts';
import type { Controls } from './controls.ts';
import { type ContainerOptions, type ContainerParts, execProcess, type NewContainer } from './create.ts';
import { AgentError } from './errors.ts';
import { kill, type Process, type ProcessExit } from './process.ts';
import { deadlyBeforeStart } from './signals.ts';
import { ContainerState, type State } from './state.ts';

const SIGKILL = 9;

/** A process of the guest, and what the host calls it. */
export interface NamedProcess {
  readonly pid: number;
  readonly execId: string;
  readonly init: boolean;
}

type AliveOrStopped = Extract<State, { pid: number }>;

export class Container implements NewContainer {
  readonly id: string;
  readonly state: ContainerState;
  mounts: readonly Mount[] | undefined;
  readonly files = Promise.withResolvers<void>();
  parts: ContainerParts | undefined;
  guestEnds = false;
  readonly #options: ContainerOptions;
  readonly #onRemoved: () => void;
  /** By their exec ids; null while crun is at it. */
  readonly #execs = new Map<string, Process | null>();
  /** Set from when its program may run: from then on, signals are the program's. */
  #starting = false;
  /** Starts and execs that are under way. */
  readonly #pending = new Set<Promise<unknown>>();
  /** The signal that ended it before its start; the kernel was told SIGKILL. */
  #endedBy: number | undefined;
  /** Set while it is being removed. */
  #removal: Promise<void> | undefined;

  /** @param onRemoved called when nothing of it is left */
  constructor(id: string, options: ContainerOptions, onRemoved: () => void) {
    this.id = id;
    this.state = new ContainerState(id);
    this.#options = options;
    this.#onRemoved = onRemoved;
    this.files.promise.catch(() => {});
  }

  /** The mounts of its root filesystem when its processes rest, or have ended. */
  mountsAtRest(): readonly Mount[] {
    const { kind } = this.state.expect('read the files of', 'running', 'stopped');
    if (this.mounts === undefined || (kind === 'running' && this.parts?.controls?.paused !== true)) {
      throw new AgentError(
        'failed-precondition',
        `cannot read what container "${this.id}" has written: it is not paused`,
      );
    }
    return this.mounts;
  }

  /** What its processes have as "/". */
  root(): string {
    return `/proc/${this.#expectParts('use the files of', 'created', 'running').init.pid}/root`;
  }

  /** The process id of its init, for who joins its PID namespace. */
  initToJoin(): number {
    return this.state.expect('join the process namespace of', 'created', 'running').pid;
  }

  ended(pid: number, seen: ProcessExit): ProcessExit {
    const exit = this.#endedBy === undefined ? seen : { ...seen, status: 128 + this.#endedBy };
    this.state.become({ kind: 'stopped', pid, exit });
    // The kernel does it where the container has a PID namespace of its own; runc does it where it has none.
    if (this.parts?.cgroup !== undefined) killAll(this.parts.cgroup);
    return exit;
  }

  /** Runs the user's program. */
  async start(): Promise<void> {
    const { bundle, init } = this.#expectParts('start', 'created');
    this.#starting = true;
    await this.#underWay(this.#options.crun.start(this.id, bundle));
    // A short program may have ended while crun was still returning.
    if (this.state.current.kind === 'created') this.state.become({ kind: 'running', pid: init.pid });
  }

  /**
   * Runs one more process in the container. When it fails, nothing of it is left.
   *
   * @returns its process id
   */
  async exec(request: ExecProcessRequest): Promise<number> {
    const { execId } = request;
    const parts = this.#expectParts('run a process in', 'created', 'running');
    if (execId === '') throw new AgentError('invalid-argument', 'a process needs an exec id');
    if (this.#execs.has(execId)) {
      throw new AgentError('already-exists', `container "${this.id}" has a process "${execId}" already`);
    }
    this.#execs.set(execId, null);
    try {
      const process = await this.#underWay(execProcess(request, parts, this.#options));
      this.#execs.set(execId, process);
      return process.pid;
    } catch (error) {
      this.#execs.delete(execId);
      throw error;
    }
  }

  /** Has `describe` wait for a step. */
  async #underWay<T>(step: Promise<T>): Promise<T> {
    this.#pending.add(step);
    try {
      return await step;
    } finally {
      this.#pending.delete(step);
    }
  }

  /** Sends a signal to one process, or to every process of the container. */
  signal(execId: string, signal: number, all: boolean): void {
    const { current } = this.state;
    if (execId === '' && !this.#starting && current.kind === 'created' && deadlyBeforeStart.has(signal)) {
      this.#endedBy = signal;
      if (!kill(current.pid, SIGKILL)) throw this.state.refusal('signal');
      return;
    }
    if (all) {
      const known = this.state.expect('signal', 'created', 'running', 'stopped');
      if (signal === SIGKILL && this.parts?.cgroup !== undefined) killAll(this.parts.cgroup);
      else for (const { pid } of this.#processes(known)) kill(pid, signal);
      return;
    }
    if (execId === '') {
      const { pid } = this.state.expect('signal', 'created', 'running');
      if (!kill(pid, signal)) throw this.state.refusal('signal');
      return;
    }
    const process = this.process(execId);
    if (process.exit !== undefined || !kill(process.pid, signal)) {
      throw new AgentError('failed-precondition', `process "${execId}" of container "${this.id}" has ended`);
    }
  }

  /** Resolves when the process has ended; at once if it already has. */
  async wait(execId: string): Promise<ProcessExit> {
    return this.process(execId).ended;
  }

  /**
   * Whether the program was started and is frozen, and which processes were exec'd and not removed; told when no start
   * or exec is under way.
   */
  async describe(): Promise<{ started: boolean; paused: boolean; execs: NamedProcess[] }> {
    await Promise.allSettled(this.#pending);
    const current = this.state.expect('describe', 'created', 'running', 'stopped');
    const paused = this.parts?.controls?.paused ?? false;
    const named = [...this.#execs].flatMap(([execId, process]) =>
      process === null ? [] : [{ pid: process.pid, execId, init: false }],
    );
    return { started: current.kind !== 'created', paused, execs: named };
  }

  /** The container's processes: which is its init, and which were exec'd. */
  processes(): NamedProcess[] {
    return this.#processes(this.state.expect('list the processes of', 'created', 'running', 'stopped'));
  }

  #processes(state: AliveOrStopped): NamedProcess[] {
    const names = new Map<number, string>();
    for (const [execId, process] of this.#execs) {
      if (process?.exit === undefined && process !== null) names.set(process.pid, execId);
    }
    const known = state.kind === 'stopped' ? [...names.keys()] : [state.pid, ...names.keys()];
    const pids = this.parts?.cgroup === undefined ? known : processesIn(this.parts.cgroup);
    return pids.map((pid) => ({
      pid,
      execId: names.get(pid) ?? '',
      init: pid === state.pid && state.kind !== 'stopped',
    }));
  }

  /** @throws AgentError not-found, or failed-precondition while it is being made or removed */
  process(execId: string): Process {
    const { init } = this.#expectParts('use a process of', 'created', 'running', 'stopped');
    if (execId === '') return init;
    const process = this.#execs.get(execId);
    if (process === undefined) throw new AgentError('not-found', `container "${this.id}" has no process "${execId}"`);
    if (process === null) throw new AgentError('failed-precondition', `process "${execId}" is being started`);
    return process;
  }

  /** Forgets an exec'd process that has ended. */
  removeProcess(execId: string): void {
    const process = this.process(execId);
    if (execId === '') throw new AgentError('invalid-argument', 'the init process goes with its container');
    if (process.exit === undefined) {
      throw new AgentError(
        'failed-precondition',
        `cannot remove process "${execId}" of container "${this.id}": it is running`,
      );
    }
    this.#execs.delete(execId);
    process[Symbol.dispose]();
  }

  /** What it has used; undefined without a control group of its own. */
  finalStats(): ReadStatsResponse | undefined {
    return this.parts?.controls?.stats();
  }

  /** Follows who of it is killed for want of memory; undefined where it has no control group of its own. */
  followOom(onKills: (kills: bigint) => void): Disposable | undefined {
    return this.parts?.controls?.followOom(onKills);
  }

  /** The verbs on its control group, for an action that these states allow. */
  controls(action: string, ...allowed: State['kind'][]): Controls {
    this.state.expect(action, ...allowed);
    if (this.parts?.controls === undefined) {
      throw new AgentError('internal', `cannot ${action} container "${this.id}": it has no control group of its own`);
    }
    return this.parts.controls;
  }

  /**
   * Removes a container; a running one only with `force`, which kills it first. Its disks are complete afterwards, and nobody
   * has them. Where that fails, it fails again each time: the host must not put other files behind the disks.
   */
  async remove(force: boolean, guestEnds: boolean): Promise<void> {
    if (this.#removal === undefined) {
      this.guestEnds = guestEnds;
      const current = force
        ? this.state.expect('remove', 'created', 'running', 'stopped')
        : this.state.expect('remove', 'created', 'stopped');
      if (this.parts === undefined) throw this.state.refusal('remove');
      this.#removal = this.#remove(current, this.parts);
    }
    return this.#removal;
  }

  async #remove(current: AliveOrStopped, { cgroup, init, undo }: ContainerParts): Promise<void> {
    // Also of a stopped one: without a PID namespace of its own, processes can outlive the init.
    if (cgroup !== undefined) killAll(cgroup);
    if (current.kind !== 'stopped') kill(current.pid, SIGKILL);
    await init.ended;
    this.state.become({ kind: 'removing' });
    for (const process of this.#execs.values()) process?.[Symbol.dispose]();
    this.#options.pod.forget(this.id);
    await undo[Symbol.asyncDispose]();
    this.#onRemoved();
  }

  /** To be called when its creation has failed, and what was acquired is not taken back. */
  refuseRemoval(reason: unknown): void {
    // Something may still have its disks: whoever asks for its removal is told.
    this.#removal = Promise.reject(reason);
    this.#removal.catch(() => {});
  }

  /** What it is made of, for an action that these states allow. @throws AgentError failed-precondition otherwise */
  #expectParts(action: string, ...allowed: State['kind'][]): ContainerParts {
    this.state.expect(action, ...allowed);
    if (this.parts === undefined) throw this.state.refusal(action);
    return this.parts;
  }
}
