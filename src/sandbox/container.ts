import { mkdir, rm } from 'node:fs/promises';
import { setTimeout as delay } from 'node:timers/promises';
import type { KilnConfig } from '../config/config.ts';
import type { HelperProcess } from '../host/helper-process.ts';
import { startStandIn } from '../host/stand-in.ts';
import type { Logger } from '../observe/logger.ts';
import type { Timeline } from '../observe/timeline.ts';
import { guestMounts, type PreparedRootfs, type RootfsPlan, type RootfsStore } from '../rootfs/index.ts';
import type { VmConfig, Vmm } from '../vmm/vmm.ts';
import {
  afterExit,
  type ContainerState,
  type Exit,
  requireDeletable,
  requireSignalable,
  requireStartable,
} from './container-state.ts';
import { faultPoint } from './faults.ts';
import { assertNoInterfaces } from './network-check.ts';
import { Sandbox } from './sandbox.ts';
import type { ContainerStdio } from './stdio.ts';
import { WaitableCell } from './waitable-cell.ts';

/** Output that a reader takes its time to fetch holds an exit back for so long and no longer. */
const outputGraceMs = 1000;

/** The time that Delete gives a slow reader before what is left of the output is dropped; runc's shim has the same. */
const deleteDrainMs = 10_000;

/** Signal numbers, as in signal(7). */
const sigkill = 9;

/** Exit status of a container whose VM was killed from outside, and of one whose VM failed. */
const vmKilledStatus = 128 + sigkill;
const unknownStatus = 255;

/** What the host provides to every container. */
export interface HostServices {
  readonly rootfs: RootfsStore;
  readonly standInProgram: string;
}

export interface ContainerRequest {
  readonly id: string;
  /** A directory of our own for sockets and logs, not yet existing; it is removed with the container. */
  readonly directory: string;
  readonly vmm: Vmm;
  readonly config: KilnConfig;
  /** The guest's runtime-spec, JSON; its root filesystem is at `guestRootDirectory(id)`. */
  readonly spec: string;
  readonly rootfs: RootfsPlan;
  readonly files: Pick<VmConfig, 'kernel' | 'initrd' | 'guestImage'>;
  readonly memoryMib: number;
  readonly vcpus: number;
  readonly openStdio: () => Promise<ContainerStdio>;
  readonly timeline: Timeline;
  readonly logger: Logger;
}

interface Resources {
  readonly sandbox: Sandbox;
  readonly standIn: HelperProcess;
  readonly rootfs: PreparedRootfs;
  readonly stdio: ContainerStdio;
}

/**
 * A container in a VM of its own.
 *
 * `create` acquires everything side by side, since the VM's boot dwarfs the rest: directory, stdio, stand-in, VM and
 * root filesystem. Whatever step fails, all that was acquired is released before the error reaches the caller.
 */
export class Container {
  readonly id: string;
  /** The stand-in's pid: what the host knows the container by. */
  readonly pid: number;
  /** Set once, when the init process has ended and its output was delivered. */
  readonly exit = new WaitableCell<Exit>();
  readonly timeline: Timeline;
  #state: ContainerState = { kind: 'created' };
  readonly #resources: Resources;
  readonly #disposal: AsyncDisposableStack;
  readonly #logger: Logger;
  readonly #outputs: Promise<unknown>;
  #starting: Promise<void> = Promise.resolve();
  #torndown: Promise<void> | undefined;

  private constructor(id: string, resources: Resources, disposal: AsyncDisposableStack, request: ContainerRequest) {
    this.id = id;
    this.pid = resources.standIn.pid;
    this.timeline = request.timeline;
    this.#resources = resources;
    this.#disposal = disposal;
    this.#logger = request.logger;
    this.#outputs = this.#relayStdio();
    void this.#supervise();
  }

  get state(): ContainerState {
    return this.#state;
  }

  static async create(host: HostServices, request: ContainerRequest, signal: AbortSignal): Promise<Container> {
    const { id, directory, timeline } = request;
    await using stack = new AsyncDisposableStack();
    await mkdir(directory, { mode: 0o700 });
    stack.defer(() => rm(directory, { recursive: true, force: true }));
    faultPoint('sandbox-directory');
    const resources = await acquire(host, request, signal, stack);
    const { sandbox, rootfs, stdio } = resources;
    const lower = await sandbox.attachDisk(rootfs.lower);
    const writable = rootfs.writable === null ? undefined : await sandbox.attachDisk(rootfs.writable);
    timeline.mark('rootfs-attached');
    faultPoint('attach-disk');
    await sandbox.createContainer({
      id,
      spec: request.spec,
      mounts: guestMounts(rootfs, id, { lower, writable }),
      stdin: stdio.stdin !== null,
      stdout: stdio.stdout !== null,
      stderr: stdio.stderr !== null,
    });
    timeline.mark('created');
    faultPoint('container-create');
    return new Container(id, resources, stack.move(), request);
  }

  /** Runs the user's program. */
  async start(): Promise<void> {
    requireStartable(this.id, this.#state);
    assertNoInterfaces(this.id, this.pid);
    const started = Promise.withResolvers<void>();
    this.#starting = started.promise;
    try {
      await this.#resources.sandbox.guest.startContainer(this.id);
      faultPoint('container-start');
      if (this.#state.kind === 'created') this.#state = { kind: 'running' };
      this.#resources.stdio.startStdin();
      this.timeline.mark('started');
    } finally {
      started.resolve();
    }
  }

  async kill(signal: number, all: boolean): Promise<void> {
    requireSignalable(this.id, this.#state);
    await this.#resources.sandbox.guest.signal(this.id, signal, all);
  }

  /** The processes of the container by their pids in the guest; the init process by its pid on the host. */
  async processes(): Promise<readonly number[]> {
    if (this.#state.kind === 'stopped' || this.#state.kind === 'deleted') return [];
    const { pids, initPid } = await this.#resources.sandbox.guest.processes(this.id);
    return [this.pid, ...pids.filter((pid) => pid !== initPid)];
  }

  closeStdin(): void {
    this.#resources.stdio.closeStdin();
  }

  /** Removes a container that is not running, with everything that belongs to it, and returns its exit. */
  async delete(): Promise<Exit> {
    requireDeletable(this.id, this.#state);
    if (this.#state.kind === 'created') await this.kill(sigkill, true);
    const exit = await this.exit.wait();
    await this.destroy();
    this.#state = { kind: 'deleted', exit };
    return exit;
  }

  /** Releases everything at once, whatever the state: for containerd's `delete` and for kilnd's end. */
  async destroy(): Promise<void> {
    if (this.exit.peek() === undefined) {
      await this.#resources.sandbox.vm.kill();
      await this.exit.wait();
    }
    await Promise.race([this.#torndown, delay(deleteDrainMs, undefined, { ref: false })]);
    await this.#disposal.disposeAsync();
    this.timeline.mark('deleted');
    const marks = this.timeline.toJSON().marks.map(({ name, atMs }) => ({ name, at_ms: atMs }));
    this.#logger.info({ marks }, 'timeline');
  }

  /** stdin flows until its writer closes it; the promise is of the two outputs, and never rejects. */
  #relayStdio(): Promise<unknown> {
    const { stdio, sandbox } = this.#resources;
    const { stdin, stdout, stderr } = stdio;
    const report = (error: unknown) => this.#logger.debug({ err: error }, 'a stdio stream ended early');
    if (stdin !== null) sandbox.guest.pipeStdin(this.id, stdin).catch(report);
    const outputs: Promise<void>[] = [];
    if (stdout !== null) outputs.push(sandbox.guest.pipeOutput(this.id, 'stdout', stdout));
    if (stderr !== null) outputs.push(sandbox.guest.pipeOutput(this.id, 'stderr', stderr));
    return Promise.all(outputs.map((output) => output.catch(report)));
  }

  /** Follows the init process to its end. */
  async #supervise(): Promise<void> {
    const status = await this.#awaitStatus();
    this.timeline.mark('exited');
    const exit: Exit = { status, at: new Date() };
    // The stand-in lives exactly as long as the task: `kill -0` on its pid must fail once the exit is known.
    await this.#resources.standIn.kill();
    const drained = this.#outputs.then(() => this.#resources.stdio.finish());
    drained.catch((error: unknown) => this.#logger.warn({ err: error }, 'cannot finish the output'));
    await Promise.race([drained, delay(outputGraceMs, undefined, { ref: false })]);
    await this.#starting;
    this.#state = afterExit(this.#state, exit);
    this.#torndown = drained.catch(() => {}).then(() => this.#endVm());
    this.exit.set(exit);
  }

  async #awaitStatus(): Promise<number> {
    const { sandbox } = this.#resources;
    try {
      return await sandbox.guest.waitExit(this.id);
    } catch (error) {
      const end = await sandbox.end();
      this.#logger.error({ err: error, ...end }, 'the VM ended while the container was alive');
      return end.signal === 'SIGKILL' && !end.guestStopped ? vmKilledStatus : unknownStatus;
    }
  }

  /** Gives the VM's memory back as soon as the container has ended, with its filesystems flushed. */
  async #endVm(): Promise<void> {
    const { sandbox } = this.#resources;
    try {
      await sandbox.guest.removeContainer(this.id, true);
    } catch (error) {
      this.#logger.debug({ err: error }, 'the guest did not remove the container');
    }
    await sandbox[Symbol.asyncDispose]();
  }
}

/** Acquires the container's resources side by side; puts them on the stack in the reverse order of their release. */
async function acquire(
  host: HostServices,
  request: ContainerRequest,
  signal: AbortSignal,
  stack: AsyncDisposableStack,
): Promise<Resources> {
  const failed = new AbortController();
  const either = AbortSignal.any([signal, failed.signal]);
  const guard = async <T>(step: Promise<T>): Promise<T> => {
    try {
      return await step;
    } catch (error) {
      failed.abort(error);
      throw error;
    }
  };
  const [stdio, standIn, rootfs, sandbox] = await Promise.allSettled([
    guard(request.openStdio()),
    guard(startStandIn({ program: host.standInProgram, id: request.id, directory: request.directory })),
    guard(prepareRootfs(host, request, either)),
    guard(bootSandbox(request, either)),
  ]);
  if (stdio.status === 'fulfilled') stack.defer(() => stdio.value.dispose());
  if (standIn.status === 'fulfilled') stack.use(standIn.value);
  if (rootfs.status === 'fulfilled') stack.defer(() => rootfs.value.release());
  if (sandbox.status === 'fulfilled') stack.use(sandbox.value);
  // The first failure is the cause; the other steps were aborted by it.
  either.throwIfAborted();
  const resources = {
    stdio: fulfilled(stdio),
    standIn: fulfilled(standIn),
    rootfs: fulfilled(rootfs),
    sandbox: fulfilled(sandbox),
  };
  for (const point of ['stdio', 'stand-in', 'rootfs'] as const) faultPoint(point);
  return resources;
}

function fulfilled<T>(result: PromiseSettledResult<T>): T {
  if (result.status === 'rejected') throw result.reason;
  return result.value;
}

async function prepareRootfs(host: HostServices, request: ContainerRequest, signal: AbortSignal) {
  const prepared = await host.rootfs.prepare(request.rootfs, {
    signal,
    writableSizeBytes: request.config.storage.writableSizeGib * 2 ** 30,
  });
  request.timeline.mark('rootfs-ready');
  return prepared;
}

function bootSandbox(request: ContainerRequest, signal: AbortSignal): Promise<Sandbox> {
  const { id, directory, memoryMib, vcpus, files, vmm, timeline, logger, config } = request;
  return Sandbox.boot(
    {
      vmm,
      vm: { id, directory, memoryMib, vcpus, ...files },
      bootTimeoutMs: config.vm.bootTimeoutS * 1000,
      logger,
      mark: (name, atMs) => timeline.mark(name, atMs),
    },
    signal,
  );
}
