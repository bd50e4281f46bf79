import { mkdirSync, rmSync } from 'node:fs';
import type { KilnConfig } from '../config/config.ts';
import { forLog, KilnError } from '../errors.ts';
import type { TerminalSize } from '../guest/terms.ts';
import { type ControlGroup, type GroupPlan, HostControlGroup } from '../host/control-group.ts';
import { adoptHelper, type HelperProcess } from '../host/helper-process.ts';
import { identityOf } from '../host/process-identity.ts';
import { adoptCallersStandIn, type StandIn, standInLog, startStandIn } from '../host/stand-in.ts';
import type { NetworkSource } from '../network/networks.ts';
import type { Logger } from '../observe/logger.ts';
import type { Timeline } from '../observe/timeline.ts';
import type { VolumeMount } from '../oci/binds.ts';
import type { DeviceNumber } from '../oci/block-devices.ts';
import { type PreparedRootfs, type RootfsPlan, type RootfsStore, volumeRootfs } from '../rootfs/index.ts';
import type { TemplateStore } from '../template/store.ts';
import type { Parking } from '../vmm/cards.ts';
import type { VmConfig, Vmm } from '../vmm/vmm.ts';
import type { ContainerDevices } from './block-devices.ts';
import type { BootSlots } from './boot-slots.ts';
import type { ChangesPlan } from './changes.ts';
import type { AttachedDisk } from './disk-slots.ts';
import type { ExecRequest } from './exec.ts';
import { faultPoint } from './faults.ts';
import type { GuestClocks } from './guest-clocks.ts';
import type { ContainerHooks, HookPlan } from './hooks.ts';
import type { Pod } from './pod.ts';
import type { SandboxPool } from './pool.ts';
import type { AloneRecord, ContainerRecord, MemberRecord } from './record.ts';
import type { Sandbox } from './sandbox.ts';
import { startSandbox } from './start.ts';
import type { ContainerStdio } from './stdio.ts';
import { PlaceInPod, type Tenancy, WholeVm } from './tenancy.ts';
import { checkVolumes, type FileServers, SandboxVolumes } from './volumes.ts';

/** What the host provides to every container. */
export interface HostServices {
  readonly rootfs: RootfsStore;
  readonly standInProgram: string;
  readonly bootSlots: BootSlots;
  readonly templates: Pick<TemplateStore, 'provide' | 'noteRestored' | 'noteFailure'>;
  readonly pool: Pick<SandboxPool, 'take' | 'creating'>;
  readonly fileServers: FileServers;
  /** Where the taps of a VM's network cards wait, to be moved to where its containers' network is. */
  readonly parking: Parking;
  readonly networks: NetworkSource;
  readonly clocks: Pick<GuestClocks, 'keep'>;
}

export interface ContainerRequest {
  readonly id: string;
  /** A directory of our own for sockets and logs, not yet existing; it is removed with the container. */
  readonly directory: string;
  readonly vmm: Vmm;
  readonly config: KilnConfig;
  /**
   * The guest's runtime-spec, JSON; its root filesystem is at `guestRootDirectory(id)`, its volumes and its block devices have
   * these numbers.
   */
  readonly spec: (volumeNumbers: readonly number[], deviceNumbers: readonly DeviceNumber[]) => string;
  /** What it gets of the host's files. */
  readonly volumes: readonly VolumeMount[];
  readonly blockDevices: ContainerDevices;
  /** The file of the host that is its /etc/resolv.conf, if it has one. */
  readonly resolvConf?: string | undefined;
  /** undefined for one that is the last of the volumes. */
  readonly rootfs: RootfsPlan | undefined;
  /** When what it writes comes to its snapshot; absent where it has no directory for it. */
  readonly changes?: ChangesPlan | undefined;
  readonly hooks: HookPlan;
  readonly files: Pick<VmConfig, 'kernel' | 'initrd' | 'guestImage'>;
  readonly memoryMib: number;
  readonly vcpus: number;
  /** The init process has a terminal. */
  readonly terminal: boolean;
  /** Undefined leaves it as the guest makes it. */
  readonly terminalSize: TerminalSize | undefined;
  readonly openStdio: () => Promise<ContainerStdio>;
  /** The pid of a process that is to stand for the container, instead of one that is started for it. */
  readonly standInPid?: number | undefined;
  /** The host's control group for what it has on the host; of a pod's container, its pod has it. */
  readonly groupPlan?: GroupPlan | undefined;
  /** A network namespace of the host to be in; without it, the container gets a new one. */
  readonly networkNamespace?: string | undefined;
  /** What its limits let it use of a pod's memory; undefined for no limit. */
  readonly memoryBytes?: number | undefined;
  /** The pod in whose VM it runs; else it gets a VM of its own. */
  readonly pod?: Pod | undefined;
  readonly timeline: Timeline;
  readonly logger: Logger;
}

/** A container of an earlier kilnd. */
export type AdoptRequest = Pick<ContainerRequest, 'directory' | 'openStdio' | 'timeline' | 'logger'> & {
  /** Those that were exec'd in it, as they were asked for. */
  readonly execs: readonly ExecRequest[];
} & ({ readonly record: AloneRecord; readonly vmm: Vmm } | { readonly record: MemberRecord; readonly pod: Pod });

export interface Resources {
  readonly sandbox: Sandbox;
  readonly tenancy: Tenancy;
  readonly standIn: StandIn;
  readonly rootfs: PreparedRootfs;
  readonly stdio: ContainerStdio;
}

/** Resources of a container that is being made. */
export interface NewResources extends Resources {
  /** The guest's numbers of its volumes. */
  readonly volumeNumbers: readonly number[];
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
): Promise<NewResources> {
  const { id, pod, vmm } = request;
  const controlGroup = await provideGroup(request, stack);
  const { either, guard } = sideBySide(signal);
  const [stdio, standIn, rootfs, volumes, sandbox] = await Promise.allSettled([
    guard(request.openStdio()),
    guard(findStandIn(host, request, controlGroup)),
    guard(prepareRootfs(host, request, either)),
    guard(prepareVolumes(host, request, controlGroup)),
    guard(pod === undefined ? startSandbox(host, { ...request, controlGroup }, either) : Promise.resolve(pod.sandbox)),
  ]);
  if (stdio.status === 'fulfilled') stack.defer(() => stdio.value.dispose());
  if (standIn.status === 'fulfilled') stack.use(standIn.value);
  if (volumes.status === 'fulfilled' && volumes.value.volumes !== undefined) stack.use(volumes.value.volumes);
  let tenancy: Tenancy | undefined;
  if (rootfs.status === 'fulfilled' && sandbox.status === 'fulfilled') {
    const volumeNumbers = volumes.status === 'fulfilled' ? volumes.value.numbers : [];
    tenancy = settle(stack, { id, vmm: vmm.name, pod, sandbox: sandbox.value, rootfs: rootfs.value, volumeNumbers });
  } else {
    if (pod !== undefined && volumes.status === 'fulfilled') await pod.sandbox.removeVolumes(volumes.value.numbers);
    if (rootfs.status === 'fulfilled') stack.use(rootfs.value);
    if (sandbox.status === 'fulfilled' && pod === undefined) stack.use(sandbox.value);
  }
  // The first failure is the cause; the other steps were aborted by it.
  either.throwIfAborted();
  const { volumes: served, numbers: volumeNumbers } = fulfilled(volumes);
  const resources = {
    stdio: fulfilled(stdio),
    standIn: fulfilled(standIn),
    rootfs: fulfilled(rootfs),
    sandbox: fulfilled(sandbox),
    tenancy: tenancy as Tenancy,
    volumeNumbers,
  };
  if (served !== undefined) resources.sandbox.useVolumes(served);
  if (pod === undefined) joinNetwork(host, id, resources);
  for (const point of ['stdio', 'stand-in', 'rootfs', 'volumes'] as const) faultPoint(point);
  return resources;
}

/** Puts what a container has of a VM on the stack, with its root filesystem. */
function settle(
  stack: AsyncDisposableStack,
  parts: Pick<ContainerRequest, 'id' | 'pod'> & {
    readonly vmm: string;
    readonly sandbox: Sandbox;
    readonly rootfs: PreparedRootfs;
    readonly disks?: readonly AttachedDisk[];
    readonly volumeNumbers: readonly number[];
  },
): Tenancy {
  const { id, vmm, pod, sandbox, rootfs, disks = [], volumeNumbers } = parts;
  if (pod !== undefined) return stack.use(new PlaceInPod(pod, id, rootfs, { disks, volumeNumbers }));
  stack.use(rootfs);
  return stack.use(new WholeVm(sandbox, vmm, disks));
}

/** For steps that run side by side: the first that fails aborts `either`, with its error, for the others. */
export function sideBySide(signal: AbortSignal) {
  const failed = new AbortController();
  const guard = async <T>(step: Promise<T>): Promise<T> => {
    try {
      return await step;
    } catch (error) {
      failed.abort(error);
      throw error;
    }
  };
  return { either: AbortSignal.any([signal, failed.signal]), guard };
}

export function fulfilled<T>(result: PromiseSettledResult<T>): T {
  if (result.status === 'rejected') throw result.reason;
  return result.value;
}

async function prepareRootfs(host: HostServices, request: ContainerRequest, signal: AbortSignal) {
  if (request.rootfs === undefined) return volumeRootfs;
  const prepared = await host.rootfs.prepare(request.rootfs, {
    signal,
    writableSizeBytes: request.config.storage.writableSizeGib * 2 ** 30,
  });
  request.timeline.mark('rootfs-ready');
  return prepared;
}

/** The process that stands for a container or a pod on the host, as the request wants it. */
export async function findStandIn(
  { standInProgram: program }: Pick<HostServices, 'standInProgram'>,
  request: Pick<ContainerRequest, 'id' | 'directory' | 'networkNamespace' | 'standInPid'>,
  controlGroup: ControlGroup | undefined,
): Promise<StandIn> {
  const { id, directory, networkNamespace, standInPid } = request;
  if (standInPid === undefined) return startStandIn({ program, id, directory, networkNamespace, controlGroup });
  const identity = identityOf(standInPid);
  await controlGroup?.add(standInPid);
  const found = identity && adoptCallersStandIn(identity, directory);
  if (found !== undefined) return found;
  throw new KilnError('not-found', `the process ${standInPid}, which is to stand for container ${id}, has ended`);
}

/** A file server with the container's volumes, if it has any; a pod's own, once it has one. */
async function prepareVolumes(
  host: HostServices,
  { volumes: mounts, directory, pod, logger }: ContainerRequest,
  controlGroup: ControlGroup | undefined,
) {
  if (mounts.length === 0) return { volumes: undefined, numbers: [] };
  const wanted = await checkVolumes(mounts);
  if (pod !== undefined) {
    const options = { directory: pod.directory, controlGroup: pod.controlGroup, logger };
    const shared = await pod.sandbox.volumes(() => SandboxVolumes.start(host.fileServers, options));
    return { volumes: undefined, numbers: await shared.add(wanted) };
  }
  await using stack = new AsyncDisposableStack();
  const volumes = stack.use(await SandboxVolumes.start(host.fileServers, { directory, controlGroup, logger }));
  const numbers = await volumes.add(wanted);
  stack.move();
  return { volumes, numbers };
}

/** Makes a container's directory, which is removed with the stack, in place of one that could not be removed earlier. */
export function makeDirectory(directory: string, stack: AsyncDisposableStack): void {
  // In the state folder, which is small and lies in memory: here and now takes less than to wait for it.
  rmSync(directory, { recursive: true, force: true });
  mkdirSync(directory, { mode: 0o700 });
  stack.defer(() => rmSync(directory, { recursive: true, force: true }));
  faultPoint('sandbox-directory');
}

/**
 * The control group for what a container has on the host, which goes with the stack: its pod's, or one of its own, or none
 * where none is asked for.
 */
export async function provideGroup(
  { directory, groupPlan, pod, logger }: Pick<ContainerRequest, 'directory' | 'groupPlan' | 'pod' | 'logger'>,
  stack: AsyncDisposableStack,
): Promise<HostControlGroup | undefined> {
  const plan = groupPlan;
  const own = () => plan && HostControlGroup.make({ directory, plan, logger });
  const group = pod === undefined ? await own() : pod.controlGroup?.share(directory);
  if (group !== undefined) stack.use(group);
  faultPoint('control-group');
  return group;
}

/** Puts on the stack what a container of an earlier kilnd has, in the order in which one that is made new has it there. */
export function holdAdopted(
  stack: AsyncDisposableStack,
  directory: string,
  {
    hooks,
    controlGroup,
    stdio,
    others,
  }: {
    readonly hooks: ContainerHooks;
    readonly controlGroup: HostControlGroup | undefined;
    readonly stdio: ContainerStdio;
    readonly others: readonly AsyncDisposable[];
  },
): void {
  stack.defer(() => hooks.poststop());
  stack.defer(() => rmSync(directory, { recursive: true, force: true }));
  if (controlGroup !== undefined) stack.use(controlGroup);
  stack.defer(() => stdio.dispose());
  for (const resource of others) stack.use(resource);
}

/** Connects a VM with the network namespace of the process that stands for it on the host. */
export function joinNetwork({ networks }: HostServices, id: string, { sandbox, standIn }: SandboxOnHost): void {
  sandbox.useNetwork(networks.attach(id, sandbox.vm, networkOf(standIn)));
}

/** As `joinNetwork`, of a VM that an earlier kilnd has connected. */
export function rejoinNetwork({ networks }: HostServices, id: string, { sandbox, standIn }: SandboxOnHost): void {
  sandbox.useNetwork(networks.adopt(id, sandbox.vm, networkOf(standIn)));
  sandbox.followNetwork();
}

type SandboxOnHost = Pick<Resources, 'sandbox' | 'standIn'>;

function networkOf({ pid }: HelperProcess): string {
  return `/proc/${pid}/ns/net`;
}

/** The resources of a container whose VM was taken over, on the stack as `acquire` puts them. */
export async function adoptResources(
  host: HostServices,
  request: AdoptRequest,
  sandbox: Sandbox,
  stack: AsyncDisposableStack,
): Promise<Resources> {
  const { record, directory, openStdio } = request;
  const stdio = stack.adopt(await openStdio(), (opened) => opened.dispose());
  const standIn = stack.use(adoptStandIn(record, directory));
  const { lower, writable } = record.disks;
  const rootfs = lower === null ? volumeRootfs : host.rootfs.adopt({ lower, writable });
  const [vmm, pod, disks, volumeNumbers] =
    'pod' in request
      ? ['', request.pod, request.record.slots, request.record.volumeNumbers]
      : [request.record.vmm, undefined, request.record.devices ?? [], []];
  if (pod === undefined) rejoinNetwork(host, record.id, { sandbox, standIn });
  for (const disk of disks) {
    await sandbox.claimDisk(disk).catch((error: unknown) => {
      request.logger.warn({ err: forLog(error) }, 'a device of the host that a container has could be taken by others');
    });
  }
  const tenancy = settle(stack, { id: record.id, vmm, pod, sandbox, rootfs, disks, volumeNumbers });
  return { sandbox, tenancy, standIn, rootfs, stdio };
}

/** @throws KilnError not-found when it has ended */
export function adoptStandIn({ id, standIn, standInIsCallers }: ContainerRecord, directory: string): StandIn {
  const adopted =
    standInIsCallers === true
      ? adoptCallersStandIn(standIn, directory)
      : adoptHelper(standIn, { directory, ...standInLog });
  if (adopted !== undefined) return adopted;
  throw new KilnError('not-found', `the process that stands for container ${id} has ended`);
}
