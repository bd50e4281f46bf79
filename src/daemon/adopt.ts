/** Taking over what an earlier kilnd has created. */
import { rm } from 'node:fs/promises';
import path from 'node:path';
import { setImmediate } from 'node:timers/promises';
import { forLog } from '../errors.ts';
import { clearControlGroup } from '../host/control-group.ts';
import { reattachContainer } from '../sandbox/create.ts';
import { reattachPod } from '../sandbox/create-pod.ts';
import { EndedContainer, EndedProcess } from '../sandbox/ended.ts';
import { ContainerHooks } from '../sandbox/hooks.ts';
import type { PodContainer } from '../sandbox/pod-container.ts';
import type { Exit } from '../sandbox/process-state.ts';
import { type ContainerRecord, type PodRecord, readContainerRecord } from '../sandbox/record.ts';
import type { SandboxContainer } from '../shim/sandbox-service.ts';
import { noStdio, type StdioPaths } from '../shim/stdio.ts';
import { loggerFifosBelow } from '../shim/stdio-logger.ts';
import type { RestoredTask, TaskProcess } from '../shim/task.ts';
import { createRequestOf, execRequestsOf, type TaskState } from '../shim/task-record.ts';
import { type Installation, openStdioOf, prepareExec } from './containers.ts';
import type { ContainerContext } from './endpoints.ts';
import { endRemains } from './remains.ts';
import { vmmNamed } from './vmm.ts';

/**
 * The container of a task that an earlier kilnd has written down. When its VM is gone, or does not answer, or nothing was
 * written down of it, what is left of it is a container that has ended. Never rejects.
 */
export async function adoptContainer(
  installation: Installation,
  state: TaskState,
  context: ContainerContext,
  signal: AbortSignal,
): Promise<RestoredTask> {
  const { host, pods, load } = installation;
  const { directory, timeline, logger } = context;
  let record: ContainerRecord | undefined;
  try {
    record = readContainerRecord(directory);
    const request = createRequestOf(state);
    if (record !== undefined && record.exit === undefined && request !== undefined) {
      if (record.place === 'pod') {
        const container = await adoptPod(installation, record, { ...context, stdio: request }, signal);
        return { container, execs: withEnded(state, new Map(), unknownExit()) };
      }
      const openStdio = () => openStdioOf(request, { ...context, adopt: true });
      const common = { directory, openStdio, timeline, logger };
      const execs = [...execRequestsOf(state).values()].map((exec) => prepareExec(exec, { ...context, adopt: true }));
      // All pods are being taken over by then.
      await setImmediate();
      const where =
        record.place === 'alone'
          ? { record, vmm: vmmNamed(record.vmm, load().config, { logger, parking: host.parking }) }
          : { record, pod: await pods.find(record.pod, path.basename(record.pod)) };
      const adopted = await reattachContainer(host, { ...common, ...where, execs }, signal);
      return { container: adopted.container, execs: withEnded(state, adopted.execs, unknownExit()) };
    }
  } catch (error) {
    logger.error({ err: forLog(error) }, 'cannot take the container over: it has ended');
  }
  return { container: endedContainer(record, context), execs: withEnded(state, new Map(), exitOf(record)) };
}

/** As `adoptContainer`, of a sandbox. */
export async function adoptSandbox(
  installation: Installation,
  context: ContainerContext,
  signal: AbortSignal,
): Promise<SandboxContainer> {
  let record: ContainerRecord | undefined;
  try {
    record = readContainerRecord(context.directory);
    if (record?.place === 'pod' && record.exit === undefined) {
      return await adoptPod(installation, record, { ...context, stdio: noStdio }, signal);
    }
  } catch (error) {
    context.logger.error({ err: forLog(error) }, 'cannot take the sandbox over: it has ended');
  }
  return endedContainer(record, context);
}

/** A pod that an earlier kilnd has made, with what stands for it. */
async function adoptPod(
  { host, pods, load }: Installation,
  record: PodRecord,
  context: ContainerContext & { readonly stdio: StdioPaths },
  signal: AbortSignal,
): Promise<PodContainer> {
  const { directory, timeline, logger, stdio } = context;
  const vmm = vmmNamed(record.vmm, load().config, { logger, parking: host.parking });
  const openStdio = () => openStdioOf(stdio, { ...context, adopt: true });
  const onGone = () => pods.remove(directory);
  const adopting = reattachPod(host, { directory, openStdio, timeline, logger, record, vmm, onGone }, signal);
  // Before anything is awaited, so that the pod's containers find it.
  pods.add(
    directory,
    adopting.then(({ pod }) => pod),
  );
  return (await adopting).container;
}

/** What is left of a container whose VM is gone: an exit, and things to be removed. */
function endedContainer(
  record: ContainerRecord | undefined,
  { id, directory, holds, logger }: ContainerContext,
): EndedContainer {
  const disposal = new AsyncDisposableStack();
  if (record !== undefined) {
    const hooks = new ContainerHooks({ id: record.id, hooks: record.hooks, logger, begun: true });
    disposal.defer(() => hooks.poststop());
  }
  for (const left of [directory, record?.place === 'member' ? undefined : record?.vmDirectory]) {
    if (left === undefined) continue;
    disposal.defer(() => rm(left, { recursive: true, force: true }));
    disposal.defer(() => clearControlGroup(left, logger));
    disposal.defer(() => endRemains(left).then(() => {}));
  }
  // Its loggers end with their streams, which the relay holds open beside the processes that are killed then.
  disposal.defer(() => Promise.all(loggerFifosBelow(directory).map((fifo) => holds.releaseFifo(fifo))).then(() => {}));
  return new EndedContainer(id, record?.standIn.pid ?? 0, exitOf(record), disposal);
}

function exitOf(record: ContainerRecord | undefined): Exit {
  return record?.exit === undefined ? unknownExit() : { status: record.exit.status, at: new Date(record.exit.atMs) };
}

/** The execs that were started and are not there any more, beside those that are. */
function withEnded(state: TaskState, alive: ReadonlyMap<string, TaskProcess>, exit: Exit): Map<string, TaskProcess> {
  const execs = new Map(alive);
  for (const [execId, pid] of Object.entries(state.pids)) {
    if (pid !== 0 && !execs.has(execId)) execs.set(execId, new EndedProcess(`exec ${execId}`, pid, exit));
  }
  return execs;
}

/** Of a process whose end nobody saw. */
function unknownExit(): Exit {
  return { status: 255, at: new Date() };
}
