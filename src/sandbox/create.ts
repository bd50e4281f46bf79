import { HostControlGroup } from '../host/control-group.ts';
import type { Logger } from '../observe/logger.ts';
import { guestMounts, type PreparedRootfs } from '../rootfs/index.ts';
import { attachDevices } from './block-devices.ts';
import { reattachSandbox } from './bring-up.ts';
import { Changes, type ChangesPlan } from './changes.ts';
import { Container } from './container.ts';
import type { AttachedDisk } from './disk-slots.ts';
import type { Exec } from './exec.ts';
import { faultPoint } from './faults.ts';
import { ContainerHooks } from './hooks.ts';
import { guestStdio } from './process-io.ts';
import type { ContainerState } from './process-state.ts';
import {
  type AdoptRequest,
  acquire,
  adoptResources,
  type ContainerRequest,
  type HostServices,
  holdAdopted,
  makeDirectory,
  type Resources,
} from './resources.ts';
import type { Sandbox } from './sandbox.ts';
import type { Tenancy } from './tenancy.ts';
import { inHostsWords, volumeOptions } from './volumes.ts';

/**
 * Makes a container, whose program has not run yet. Everything is acquired side by side, since the VM's boot dwarfs the
 * rest: directory, stdio, stand-in, VM and root filesystem. Whatever step fails, all that was acquired is released before
 * the error reaches the caller.
 */
export async function bootContainer(
  host: HostServices,
  request: ContainerRequest,
  signal: AbortSignal,
): Promise<Container> {
  const { id, directory, pod, timeline } = request;
  using _creating = host.pool.creating();
  await using stack = new AsyncDisposableStack();
  const hooks = new ContainerHooks(request);
  // First on the stack, because they run when all the rest is gone.
  stack.defer(() => hooks.poststop());
  makeDirectory(directory, stack);
  const resources = await acquire(host, request, signal, stack);
  const { sandbox, tenancy, rootfs, stdio, volumeNumbers } = resources;
  await hooks.create(resources.standIn.pid, signal);
  faultPoint('hooks');
  // A VM of its own was made as large as it has to be.
  if (pod !== undefined) await sandbox.provideMemory(request.memoryBytes ?? 0);
  const [lower, writable] = await attachRootfs(tenancy, rootfs, signal);
  const devices = await attachDevices(tenancy, request.blockDevices, signal);
  timeline.mark('rootfs-attached');
  faultPoint('attach-disk');
  const changes = changesOf(id, request.changes, resources, request.logger);
  using edits = await changes?.edits();
  const container = {
    id,
    spec: request.spec(volumeNumbers, devices.numbers),
    mounts: [...guestMounts(rootfs, id, { lower: lower?.serial, writable: writable?.serial }), ...devices.mounts],
    disks: devices.disks,
    stdio: guestStdio(stdio, request.terminal, request.terminalSize),
    volumeOptions: request.volumes.length === 0 ? undefined : volumeOptions(sandbox.volumeCache),
    files: edits?.stream,
  };
  try {
    await sandbox.createContainer(container, signal, () => pod?.save());
  } catch (error) {
    throw inHostsWords(error, request.volumes, volumeNumbers);
  }
  if (edits !== undefined) await changes?.editsTaken();
  timeline.mark('created');
  faultPoint('container-create');
  const state: ContainerState = { kind: 'created' };
  const parts = { ...request, resources, changes, disposal: stack.move(), hooks, hookPlan: request.hooks, state };
  return new Container(parts);
}

/**
 * Takes over a container that was created under an earlier kilnd, with the processes that were exec'd in it. When that
 * fails, it is ended, in its pod or by its VM, and what is left of it on the host stays.
 */
export async function reattachContainer(
  host: HostServices,
  request: AdoptRequest,
  signal: AbortSignal,
): Promise<{ container: Container; execs: Map<string, Exec> }> {
  const { record, directory, timeline, logger } = request;
  const { id, terminal, hooks: hookPlan, resolvConf } = record;
  await using stack = new AsyncDisposableStack();
  const sandbox = await sandboxOf(host, request, signal, stack);
  const guest = await sandbox.guest.describe(id);
  const resources = await adoptResources(host, request, sandbox, stack);
  if (guest.started) {
    resources.stdio.startStdin({ clientMayReturn: true });
    if (resolvConf !== undefined) void sandbox.followNameservers(resolvConf);
  }
  stack.move();
  const hooks = new ContainerHooks({ id, hooks: hookPlan, logger, begun: true });
  const controlGroup = HostControlGroup.adopt(directory, logger);
  const disposal = disposalOf(directory, resources, { hooks, controlGroup });
  const running: ContainerState = { kind: guest.paused ? 'paused' : 'running' };
  const state: ContainerState = guest.started ? running : { kind: 'created' };
  const changes = changesOf(id, record.changes, resources, logger);
  const common = { id, directory, terminal, resolvConf, resources, changes, disposal };
  const parts = { ...common, hooks, hookPlan, state, timeline, logger };
  const container = new Container(parts);
  // The agent tells the number so far; what is known of it is no news.
  container.oom.count(record.oomKills);
  const execs = new Map<string, Exec>();
  for (const exec of request.execs) {
    const known = guest.execs.find(({ execId }) => execId === exec.execId);
    if (known === undefined) continue;
    try {
      execs.set(exec.execId, await container.adoptExec(exec, known.pid));
    } catch (error) {
      logger.error({ err: error, execId: exec.execId }, 'cannot take an exec over');
    }
  }
  return { container, execs };
}

/** Both in one turn, so that the VMM is asked once; rejects when it is done with both. */
async function attachRootfs(
  tenancy: Tenancy,
  { lower, writable }: Pick<PreparedRootfs, 'lower' | 'writable'>,
  signal: AbortSignal,
): Promise<(AttachedDisk | undefined)[]> {
  const attaching = [lower, writable].map((disk) => (disk === null ? undefined : tenancy.attachDisk(disk, signal)));
  await Promise.allSettled(attaching);
  return Promise.all(attaching);
}

function changesOf(
  id: string,
  plan: ChangesPlan | undefined,
  { rootfs, sandbox }: Pick<Resources, 'rootfs' | 'sandbox'>,
  logger: Logger,
): Changes | undefined {
  if (plan === undefined || rootfs.writable === null) return undefined;
  return new Changes(plan, { id, guest: () => sandbox.guest, disk: rootfs.writable.file, logger });
}

/** The VM in which an earlier kilnd has made a container. One that is the container's alone goes on the stack. */
async function sandboxOf(
  { fileServers, clocks }: HostServices,
  request: AdoptRequest,
  signal: AbortSignal,
  stack: AsyncDisposableStack,
): Promise<Sandbox> {
  if ('pod' in request) return request.pod.sandbox;
  const { vmm, record, directory, logger } = request;
  const sandbox = stack.use(await reattachSandbox({ vmm, fileServers, record, directory, logger }, signal));
  clocks.keep(sandbox);
  return sandbox;
}

/** Releases a container's resources in the order in which `create` does. */
function disposalOf(
  directory: string,
  { tenancy, standIn, rootfs, stdio }: Resources,
  { hooks, controlGroup }: { readonly hooks: ContainerHooks; readonly controlGroup: HostControlGroup | undefined },
): AsyncDisposableStack {
  const stack = new AsyncDisposableStack();
  // A place in a pod releases its root filesystem itself.
  const others = tenancy.shared ? [standIn, tenancy] : [standIn, rootfs, tenancy];
  holdAdopted(stack, directory, { hooks, controlGroup, stdio, others });
  return stack;
}
