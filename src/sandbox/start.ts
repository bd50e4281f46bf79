import { type ControlGroup, ControlGroupError } from '../host/control-group.ts';
import type { Template } from '../template/store.ts';
import { bootSandbox, restoreSandbox, type SandboxOptions } from './bring-up.ts';
import type { ContainerRequest, HostServices } from './resources.ts';
import type { Sandbox } from './sandbox.ts';

/** What the VM of a container or a pod depends on. */
export type VmRequest = Pick<
  ContainerRequest,
  'id' | 'directory' | 'memoryMib' | 'vcpus' | 'files' | 'vmm' | 'timeline' | 'logger' | 'config'
> & {
  /** Where the VMM and its helpers go. */
  readonly controlGroup?: ControlGroup | undefined;
};

/** A VM for a container, set up as its configuration says. */
export async function startSandbox(host: HostServices, request: VmRequest, signal: AbortSignal): Promise<Sandbox> {
  const sandbox = await provideSandbox(host, request, signal);
  sandbox.volumeCache = request.config.storage.volumeCache;
  host.clocks.keep(sandbox);
  return sandbox;
}

/** One that waits for it in the pool, else a clone of a template, else one that boots. */
async function provideSandbox(host: HostServices, request: VmRequest, signal: AbortSignal): Promise<Sandbox> {
  const { id, directory, memoryMib, vcpus, files, vmm, timeline, logger, config, controlGroup } = request;
  const shape = { memoryMib, vcpus, networkCards: config.vm.networkCards, ...files };
  const bootTimeoutMs = config.vm.bootTimeoutS * 1000;
  const options: SandboxOptions = {
    vmm,
    vm: { id, directory, controlGroup, ...shape },
    bootTimeoutMs,
    logger,
    mark: (name, atMs) => timeline.mark(name, atMs),
  };
  if (config.template.enabled) {
    const wanted = { vmm, shape, bootTimeoutMs };
    const template = await host.templates.provide(wanted, signal);
    const waiting = template && (await host.pool.take(template, wanted, config.pool));
    if (waiting !== undefined) {
      await enter(waiting, controlGroup);
      timeline.mark('vm-taken');
      logger.info({ vmmPid: waiting.vm.pid, ...waiting.guest.facts }, 'sandbox is taken from the pool');
      return waiting;
    }
    const restored = template && (await restore(host, template, options, signal));
    if (restored !== undefined) return restored;
  }
  using _slot = await host.bootSlots.take(signal);
  return await bootSandbox(options, signal);
}

/** One that cannot be put there is ended. */
async function enter(sandbox: Sandbox, group: ControlGroup | undefined): Promise<void> {
  if (group === undefined) return;
  await using stack = new AsyncDisposableStack();
  stack.use(sandbox);
  await sandbox.vm.enter(group);
  stack.move();
}

/** Undefined when the template is not good for it, which is noted. */
async function restore(
  host: HostServices,
  template: Template,
  options: SandboxOptions,
  signal: AbortSignal,
): Promise<Sandbox | undefined> {
  using _slot = await host.bootSlots.take(signal);
  try {
    await using stack = new AsyncDisposableStack();
    const sandbox = stack.use(await restoreSandbox(template, options, signal));
    host.templates.noteRestored(sandbox.guest.facts.bootId);
    stack.move();
    return sandbox;
  } catch (error) {
    signal.throwIfAborted();
    // Which is nothing that the template could do anything about.
    if (error instanceof ControlGroupError) throw error;
    host.templates.noteFailure(template, error);
    return undefined;
  }
}
