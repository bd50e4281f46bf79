import { mkdir, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import type { GuestPod } from '../guest/terms.ts';
import { HostControlGroup } from '../host/control-group.ts';
import type { PodFiles } from '../oci/cri-pod.ts';
import { reattachSandbox } from './bring-up.ts';
import { faultPoint } from './faults.ts';
import { ContainerHooks } from './hooks.ts';
import { Pod } from './pod.ts';
import { PodContainer } from './pod-container.ts';
import type { PodRecord } from './record.ts';
import {
  adoptStandIn,
  type ContainerRequest,
  findStandIn,
  fulfilled,
  type HostServices,
  holdAdopted,
  joinNetwork,
  makeDirectory,
  provideGroup,
  rejoinNetwork,
  sideBySide,
} from './resources.ts';
import type { Sandbox } from './sandbox.ts';
import { startSandbox, type VmRequest } from './start.ts';

export interface PodRequest
  extends VmRequest,
    Pick<ContainerRequest, 'hooks' | 'terminal' | 'openStdio' | 'networkNamespace' | 'groupPlan' | 'standInPid'> {
  /** What the pod's containers share. */
  readonly guestPod: GuestPod;
  /** What each container gets in /etc, where their specs do not say it, and where that is kept. */
  readonly podFiles?: { readonly directory: string; readonly texts: PodFiles } | undefined;
  /** Called when nothing of the pod is left. */
  readonly onGone: () => void;
}

/**
 * Makes a pod, in which nothing runs yet, and what stands for it. Whatever step fails, all that was acquired is released
 * before the error reaches the caller.
 */
export async function bootPod(
  host: HostServices,
  request: PodRequest,
  signal: AbortSignal,
): Promise<{ container: PodContainer; pod: Pod }> {
  const { id, directory, timeline } = request;
  using _creating = host.pool.creating();
  await using stack = new AsyncDisposableStack();
  stack.defer(request.onGone);
  const hooks = new ContainerHooks(request);
  // Early on the stack, because they run when all the rest is gone.
  stack.defer(() => hooks.poststop());
  makeDirectory(directory, stack);
  const filesDirectory = request.podFiles?.directory;
  if (request.podFiles !== undefined) await writePodFiles(request.podFiles, stack);
  const controlGroup = await provideGroup(request, stack);
  const { either, guard } = sideBySide(signal);
  const [stdio, standIn, sandbox] = await Promise.allSettled([
    guard(request.openStdio()),
    guard(findStandIn(host, request, controlGroup)),
    guard(startSandbox(host, { ...request, controlGroup }, either)),
  ]);
  if (stdio.status === 'fulfilled') stack.defer(() => stdio.value.dispose());
  if (standIn.status === 'fulfilled') stack.use(standIn.value);
  if (sandbox.status === 'fulfilled') stack.use(sandbox.value);
  // The first failure is the cause; the other steps were aborted by it.
  either.throwIfAborted();
  joinNetwork(host, id, { sandbox: fulfilled(sandbox), standIn: fulfilled(standIn) });
  await hooks.create(fulfilled(standIn).pid, signal);
  faultPoint('hooks');
  await fulfilled(sandbox).preparePod(request.guestPod);
  timeline.mark('created');
  faultPoint('container-create');
  const parts = { standIn: fulfilled(standIn), stdio: fulfilled(stdio), sandbox: fulfilled(sandbox) };
  const ends = { hooks, hookPlan: request.hooks, disposal: stack.move() };
  return standFor(request, { ...parts, ...ends, controlGroup, started: false, filesDirectory });
}

/** They belong to the pod's containers, which may write to them. */
async function writePodFiles(
  { directory, texts }: NonNullable<PodRequest['podFiles']>,
  stack: AsyncDisposableStack,
): Promise<void> {
  // An earlier kilnd may have got so far.
  await rm(directory, { recursive: true, force: true });
  await mkdir(directory, { mode: 0o755 });
  stack.defer(() => rm(directory, { recursive: true, force: true }));
  for (const [name, text] of Object.entries(texts)) await writeFile(path.join(directory, name), text, { mode: 0o644 });
}

/** A pod of an earlier kilnd. When that fails, its VM is ended, and what is left of it on the host stays. */
export async function reattachPod(
  host: HostServices,
  request: Pick<PodRequest, 'directory' | 'vmm' | 'openStdio' | 'onGone' | 'timeline' | 'logger'> & {
    readonly record: PodRecord;
  },
  signal: AbortSignal,
): Promise<{ container: PodContainer; pod: Pod }> {
  const { record, directory, vmm, openStdio, logger } = request;
  const { id, terminal, hooks: hookPlan, started, filesDirectory } = record;
  await using stack = new AsyncDisposableStack();
  const hooks = new ContainerHooks({ id, hooks: hookPlan, logger, begun: true });
  const sandbox = stack.use(
    await reattachSandbox({ vmm, fileServers: host.fileServers, record, directory, logger }, signal),
  );
  const controlGroup = HostControlGroup.adopt(directory, logger);
  host.clocks.keep(sandbox);
  const stdio = stack.adopt(await openStdio(), (opened) => opened.dispose());
  const standIn = stack.use(adoptStandIn(record, directory));
  rejoinNetwork(host, id, { sandbox, standIn });
  stack.move();
  const disposal = new AsyncDisposableStack();
  disposal.defer(request.onGone);
  if (filesDirectory !== undefined) disposal.defer(() => rm(filesDirectory, { recursive: true, force: true }));
  holdAdopted(disposal, directory, { hooks, controlGroup, stdio, others: [standIn, sandbox] });
  return standFor(
    { ...request, id, terminal },
    { ...{ standIn, stdio, sandbox, hooks, hookPlan, controlGroup, disposal }, ...{ started, filesDirectory } },
  );
}

type Standing = ConstructorParameters<typeof PodContainer>[0];

function standFor(
  {
    id,
    directory,
    vmm,
    terminal,
    timeline,
    logger,
  }: Pick<PodRequest, 'id' | 'directory' | 'vmm' | 'terminal' | 'timeline' | 'logger'>,
  parts: Pick<Standing, 'standIn' | 'stdio' | 'hooks' | 'hookPlan' | 'disposal' | 'started'> & {
    readonly sandbox: Sandbox;
    readonly filesDirectory: string | undefined;
    readonly controlGroup: HostControlGroup | undefined;
  },
): { container: PodContainer; pod: Pod } {
  const { sandbox, filesDirectory, controlGroup, ...others } = parts;
  let container: PodContainer | undefined;
  const save = () => container?.save();
  const pod = new Pod({ directory, sandbox, pid: parts.standIn.pid, controlGroup, save, filesDirectory, logger });
  container = new PodContainer({ ...{ id, directory, pod, terminal, timeline, logger }, vmm: vmm.name, ...others });
  return { container, pod };
}
