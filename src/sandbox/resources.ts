import type { KilnConfig } from '../config/config.ts';
import type { HelperProcess } from '../host/helper-process.ts';
import { startStandIn } from '../host/stand-in.ts';
import type { Logger } from '../observe/logger.ts';
import type { Timeline } from '../observe/timeline.ts';
import type { PreparedRootfs, RootfsPlan, RootfsStore } from '../rootfs/index.ts';
import type { VmConfig, Vmm } from '../vmm/vmm.ts';
import { faultPoint } from './faults.ts';
import type { HookPlan } from './hooks.ts';
import { Sandbox } from './sandbox.ts';
import type { ContainerStdio } from './stdio.ts';

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
  readonly hooks: HookPlan;
  readonly files: Pick<VmConfig, 'kernel' | 'initrd' | 'guestImage'>;
  readonly memoryMib: number;
  readonly vcpus: number;
  readonly openStdio: () => Promise<ContainerStdio>;
  readonly timeline: Timeline;
  readonly logger: Logger;
}

export interface Resources {
  readonly sandbox: Sandbox;
  readonly standIn: HelperProcess;
  readonly rootfs: PreparedRootfs;
  readonly stdio: ContainerStdio;
}

/**
 * Acquires a container's resources side by side, since the VM's boot dwarfs the rest, and puts them on the stack in the
 * reverse order of their release. When one fails, the others are given up and its error is thrown.
 */
export async function acquire(
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
