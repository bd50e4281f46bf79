/**
 * How a sandbox's VM comes up, until its agent has called and said hello: it boots, or it is a template's clone that goes on
 * where the template was saved, or an earlier kilnd has started it and its agent dials again. What fails here leaves no VM.
 */
import { randomUUID } from 'node:crypto';
import { KilnError } from '../errors.ts';
import { Guest } from '../guest/guest.ts';
import { abortable } from '../host/abortable.ts';
import { TimeLimit } from '../host/time-limit.ts';
import type { Logger } from '../observe/logger.ts';
import type { Template } from '../template/store.ts';
import type { Vm, VmConfig, Vmm } from '../vmm/vmm.ts';
import { faultPoint } from './faults.ts';
import { Sandbox, type SandboxRecord } from './sandbox.ts';
import { agentSilent, vmmSilent } from './unresponsive.ts';
import { type FileServers, SandboxVolumes } from './volumes.ts';

export interface SandboxOptions {
  readonly vmm: Vmm;
  readonly vm: VmConfig;
  /** The VM's directory goes with the sandbox, and not with a container. */
  readonly ownsDirectory?: boolean;
  /** Time for the boot, from starting the VMM to the agent's call; then for each answer of VMM and agent. */
  readonly bootTimeoutMs: number;
  readonly logger: Logger;
  /** Called with the moments of the start as they pass. */
  readonly mark: (name: 'vmm-spawned' | 'vm-restored' | 'kernel-up' | 'agent-connected', atMs?: number) => void;
}

/** Boots the VM and waits for its agent. A failure carries the guest's last console lines and leaves nothing. */
export async function bootSandbox(options: SandboxOptions, signal: AbortSignal): Promise<Sandbox> {
  const { vmm, vm, mark } = options;
  const boot = async (either: AbortSignal) => {
    const booted = await vmm.boot(vm, either);
    mark('vmm-spawned');
    return booted;
  };
  const sandbox = await start(boot, options, signal);
  mark('kernel-up', sandbox.guest.facts.agentStartedAtMs);
  return sandbox;
}

/** As `bootSandbox`, of a VM that is a template's clone. */
export function restoreSandbox(template: Template, options: SandboxOptions, signal: AbortSignal): Promise<Sandbox> {
  const { vm, mark } = options;
  const restore = async (either: AbortSignal) => {
    const restored = await template.driver.restore(vm, template.directory, either);
    mark('vm-restored');
    return restored;
  };
  return start(restore, options, signal);
}

async function start(
  startVm: (signal: AbortSignal) => Promise<Vm>,
  { vmm, vm: config, ownsDirectory, mark, bootTimeoutMs, logger }: SandboxOptions,
  signal: AbortSignal,
): Promise<Sandbox> {
  const session = randomUUID();
  await using stack = new AsyncDisposableStack();
  using limit = new TimeLimit(bootTimeoutMs, signal);
  const either = limit.signal;
  let vm: Vm | undefined;
  let guest: Guest;
  try {
    vm = stack.use(await startVm(either));
    faultPoint('vm-boot');
    const socket = await vm.acceptAgent(either);
    mark('agent-connected');
    guest = stack.use(
      await abortable(Guest.connect(socket, { hostname: 'kiln', answerLimitMs: bootTimeoutMs, session }), either),
    );
  } catch (error) {
    if (!limit.caused(error)) throw error;
    if (vm === undefined) throw vmmSilent(vmm, 'start', bootTimeoutMs);
    throw await agentSilent(vm, bootTimeoutMs);
  }
  faultPoint('agent-connect');
  logger.info({ vmmPid: vm.pid, ...guest.facts }, 'sandbox is up');
  stack.move();
  const vmDirectory = ownsDirectory ? config.directory : undefined;
  return new Sandbox({ vm, guest, session, answerLimitMs: bootTimeoutMs, vmDirectory, logger });
}

export interface ReattachOptions {
  readonly vmm: Vmm;
  readonly fileServers: FileServers;
  readonly record: SandboxRecord;
  /** The container's directory, which is the VM's, too, where the record names no other. */
  readonly directory: string;
  readonly logger: Logger;
}

/**
 * Takes over the VM of an earlier kilnd: its agent dials again. Throws `not-found` when it has ended, `deadline-exceeded`
 * when it does not answer, and whatever else makes it useless; the VM is ended then.
 */
export async function reattachSandbox(options: ReattachOptions, signal: AbortSignal): Promise<Sandbox> {
  const { answerLimitMs } = options.record;
  using limit = new TimeLimit(answerLimitMs, signal);
  try {
    return await takeOver(options, limit.signal);
  } catch (error) {
    if (!limit.caused(error)) throw error;
    const message = `VMM and agent did not both answer the next kilnd within ${answerLimitMs / 1000} s`;
    throw new KilnError('deadline-exceeded', message);
  }
}

async function takeOver(
  { vmm, fileServers, record, directory, logger }: ReattachOptions,
  signal: AbortSignal,
): Promise<Sandbox> {
  const { session, answerLimitMs, vmDirectory } = record;
  await using stack = new AsyncDisposableStack();
  const vm = stack.use(await vmm.adopt(record.vm, vmDirectory ?? directory, signal));
  let impostors = 0;
  for (;;) {
    const socket = await vm.acceptAgent(signal);
    try {
      const hello = Guest.connect(socket, { hostname: '', answerLimitMs, session, returning: true });
      const guest = await abortable(hello, signal);
      logger.info({ vmmPid: vm.pid, ...guest.facts }, 'sandbox is taken over');
      const sandbox = new Sandbox({ vm, guest, session, answerLimitMs, vmDirectory, logger, adopted: true });
      sandbox.volumeCache = record.volumeCache ?? sandbox.volumeCache;
      if (record.volumes !== undefined) {
        const volumes = await SandboxVolumes.adopt(fileServers, record.volumes, { directory, logger });
        if (volumes !== undefined) sandbox.useVolumes(volumes);
      }
      stack.move();
      return sandbox;
    } catch (error) {
      if (!(error instanceof KilnError && error.code === 'permission-denied')) throw error;
      impostors += 1;
      // Once: it may do so without end.
      if (impostors === 1) logger.warn({ err: error }, 'a program in the guest has dialled the port of the agent');
    }
  }
}
