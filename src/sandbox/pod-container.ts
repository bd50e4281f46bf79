import { forLog, KilnError } from '../errors.ts';
import type { StandIn } from '../host/stand-in.ts';
import type { Logger } from '../observe/logger.ts';
import type { Timeline } from '../observe/timeline.ts';
import type { ContainerProcess, ContainerStats, ProcessDetails } from './container.ts';
import type { ContainerHooks, HookPlan } from './hooks.ts';
import { OomReport } from './oom.ts';
import type { Pod } from './pod.ts';
import {
  afterExit,
  type ContainerState,
  type Exit,
  requireDeletable,
  requireSignalable,
  requireStartable,
} from './process-state.ts';
import { type PodRecord, writeContainerRecord } from './record.ts';
import type { ContainerStdio } from './stdio.ts';
import { sigkill, statusOfVmEnd, unknownStatus, vmKilledStatus } from './vm-end.ts';
import { WaitableCell } from './waitable-cell.ts';

/** Signal numbers, as in signal(7). */
const sighup = 1;
const sigint = 2;
const sigterm = 15;

export interface PodContainerParts {
  readonly id: string;
  readonly directory: string;
  readonly pod: Pod;
  readonly vmm: string;
  readonly standIn: StandIn;
  /** Of a process that there is not: it is closed at the end, and nothing was ever written. */
  readonly stdio: Pick<ContainerStdio, 'dispose'>;
  readonly terminal: boolean;
  readonly hooks: ContainerHooks;
  readonly hookPlan: HookPlan;
  readonly disposal: AsyncDisposableStack;
  readonly started: boolean;
  readonly timeline: Timeline;
  readonly logger: Logger;
}

/**
 * The container that stands for a pod, which elsewhere is a "pause" process that holds the pod's namespaces. Here the VM
 * holds them, so there is nothing in the guest: on the host there is its stand-in, and its end is the pod's end.
 */
export class PodContainer {
  readonly id: string;
  readonly pid: number;
  readonly terminal: boolean;
  readonly exit = new WaitableCell<Exit>();
  readonly timeline: Timeline;
  /** The containers of the pod tell of their own. */
  readonly oom = new OomReport();
  readonly #parts: PodContainerParts;
  #state: ContainerState;
  #ending: Promise<void> | undefined;
  #destruction: Promise<void> | undefined;

  constructor(parts: PodContainerParts) {
    const { id, standIn, started, timeline, terminal, pod } = parts;
    this.id = id;
    this.pid = standIn.pid;
    this.terminal = terminal;
    this.timeline = timeline;
    this.#parts = parts;
    this.#state = { kind: started ? 'running' : 'created' };
    this.save();
    void standIn.exited.then(() => this.#onStandInEnd());
    void pod.sandbox.vm.channelLost.then(() => this.#end(unknownStatus));
    void this.#followVm();
  }

  get #name(): string {
    return `container ${this.id}`;
  }

  get state(): ContainerState {
    return this.#state;
  }

  async start(): Promise<void> {
    requireStartable(this.#name, this.#state);
    this.#state = { kind: 'running' };
    this.timeline.mark('started');
    this.save();
    await this.#parts.hooks.poststart(this.pid, () => this.#end(vmKilledStatus));
  }

  /**
   * SIGKILL ends the pod, and so do the signals at which a pause process ends; it ignores the others, as the init of a PID
   * namespace ignores what it has no handler for.
   */
  async kill(signal: number): Promise<void> {
    requireSignalable(this.#name, this.#state);
    if (signal === sigkill) void this.#end(vmKilledStatus);
    else if (this.#state.kind === 'created' && signal !== sighup) void this.#end(128 + signal);
    else if (signal === sigterm || signal === sigint) void this.#end(0);
  }

  /** As the signal at which a pause process ends, but waits for the end, and has a time of its own for it. */
  stop(graceMs?: number): Promise<void> {
    return this.#end(0, graceMs);
  }

  /** @throws KilnError failed-precondition when it has ended, unavailable or deadline-exceeded when the guest is silent */
  async ping(): Promise<void> {
    if (this.exit.peek() !== undefined) throw new KilnError('failed-precondition', `${this.#name} has ended`);
    await this.#parts.pod.sandbox.guest.containers();
  }

  describe(): Readonly<Record<string, unknown>> {
    const { pod, vmm } = this.#parts;
    const { pid, nics } = pod.sandbox.vm;
    const { kernelRelease, bootId, memoryBytes, vcpus } = pod.sandbox.guest.facts;
    return {
      processStatus: this.#state.kind,
      containers: pod.memberIds,
      vm: { vmm, pid, memoryBytes, vcpus, kernelRelease, bootId, networkCards: nics.length },
    };
  }

  /** What all containers of the pod use together. */
  stats(): Promise<ContainerStats> {
    return this.#parts.pod.sandbox.guest.totalStats();
  }

  async processes(): Promise<readonly ContainerProcess[]> {
    return this.exit.peek() === undefined ? [{ pid: this.pid, execId: '' }] : [];
  }

  /** Its only process sleeps on the host. */
  async processTable(): Promise<readonly ProcessDetails[]> {
    return [];
  }

  exec(): never {
    throw this.#unsupported('run a process in');
  }

  async pause(): Promise<void> {
    throw this.#unsupported('pause');
  }

  async resume(): Promise<void> {
    throw this.#unsupported('resume');
  }

  async update(): Promise<void> {
    throw this.#unsupported('change the limits of');
  }

  #unsupported(action: string): KilnError {
    return new KilnError('unimplemented', `cannot ${action} ${this.#name}: it stands for its pod`, {
      hint: 'use one of the containers that run in the pod',
    });
  }

  async resize(): Promise<void> {}

  closeStdin(): void {}

  async delete(): Promise<Exit> {
    requireDeletable(this.#name, this.#state);
    await this.#end(vmKilledStatus);
    const exit = await this.exit.wait();
    await this.destroy();
    this.#state = { kind: 'deleted', exit };
    return exit;
  }

  /** Releases everything, whatever the state; what runs in the pod ends. Safe to call twice. */
  destroy(): Promise<void> {
    this.#destruction ??= this.#destroy().catch((error: unknown) => {
      this.#destruction = undefined;
      throw error;
    });
    return this.#destruction;
  }

  async #destroy(): Promise<void> {
    await this.#end(vmKilledStatus);
    await this.#parts.disposal.disposeAsync();
    this.timeline.mark('deleted');
  }

  /** Ends the pod, and then this; the first status counts. Never rejects. */
  #end(status: number, graceMs?: number): Promise<void> {
    this.#ending ??= this.#endAll(status, graceMs);
    return this.#ending;
  }

  async #endAll(status: number, graceMs?: number): Promise<void> {
    const { pod, standIn, stdio, logger } = this.#parts;
    try {
      await pod.end(graceMs);
    } catch (error) {
      logger.warn({ err: forLog(error) }, 'cannot end the VM of the pod');
    }
    // A stand-in of the caller's waits for the end of its output.
    await stdio.dispose();
    await standIn.kill();
    const exit: Exit = { status, at: new Date() };
    this.timeline.mark('exited');
    this.#state = afterExit(this.#state, exit);
    this.exit.set(exit);
    this.save();
  }

  /** The VM may end by itself, or by somebody else's hand. */
  async #followVm(): Promise<void> {
    const end = await this.#parts.pod.sandbox.vm.wait();
    if (this.#ending !== undefined) return;
    this.#parts.logger.error({ ...end }, 'the VM of the pod has ended');
    await this.#end(statusOfVmEnd(end));
  }

  #onStandInEnd(): void {
    if (this.#ending !== undefined) return;
    this.#parts.logger.warn({ pid: this.pid }, 'the process that stands for the pod was ended: ending the pod');
    void this.#end(vmKilledStatus);
  }

  /** Writes down what the next kilnd needs, should this one be killed. */
  save(): void {
    const { pod, vmm, standIn, hookPlan, directory, logger } = this.#parts;
    if (standIn.identity === undefined) return;
    const exit = this.exit.peek();
    const record: PodRecord = {
      ...{ place: 'pod', version: 1, id: this.id, terminal: this.terminal, vmm },
      started: this.#state.kind !== 'created',
      ...pod.sandbox.record(),
      standIn: standIn.identity,
      ...(standIn.callers === true ? { standInIsCallers: true } : {}),
      hooks: hookPlan,
      oomKills: 0,
      filesDirectory: pod.filesDirectory,
      ...(exit === undefined ? {} : { exit: { status: exit.status, atMs: exit.at.getTime() } }),
    };
    try {
      writeContainerRecord(directory, record);
    } catch (error) {
      logger.error({ err: error }, 'cannot write down the state of the pod: it would not outlive kilnd');
    }
  }
}
