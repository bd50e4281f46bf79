import { KilnError } from '../errors.ts';
import { Guest, type GuestContainer } from '../guest/guest.ts';
import type { Logger } from '../observe/logger.ts';
import { abortable } from '../vmm/hybrid-vsock.ts';
import {
  readOnlySlots,
  type SlotName,
  type Vm,
  type VmConfig,
  type VmExit,
  type Vmm,
  writableSlots,
} from '../vmm/vmm.ts';
import { faultPoint } from './faults.ts';

/** Bytes of guest console that go into an error message. */
const consoleTailBytes = 2000;

/** How long a VM may take to end by itself after its agent is gone, before it is killed. */
const guestStopGraceMs = 5000;

export interface SandboxOptions {
  readonly vmm: Vmm;
  readonly vm: VmConfig;
  readonly bootTimeoutMs: number;
  readonly logger: Logger;
  /** Called with the moments of the start as they pass. */
  readonly mark: (name: 'vmm-spawned' | 'kernel-up' | 'agent-connected', atMs?: number) => void;
}

/** One VM with its agent connected. Containers attach their disks to it and run in it. */
export class Sandbox implements AsyncDisposable {
  readonly vm: Vm;
  readonly guest: Guest;
  readonly #freeSlots = { ro: [...readOnlySlots], rw: [...writableSlots] };

  private constructor(vm: Vm, guest: Guest) {
    this.vm = vm;
    this.guest = guest;
  }

  /** Boots the VM and waits for its agent. A failure carries the guest's last console lines and leaves nothing. */
  static async boot(options: SandboxOptions, signal: AbortSignal): Promise<Sandbox> {
    const { vmm, mark } = options;
    await using stack = new AsyncDisposableStack();
    const vm = stack.use(await vmm.boot(options.vm, signal));
    mark('vmm-spawned');
    faultPoint('vm-boot');
    const timeout = AbortSignal.timeout(options.bootTimeoutMs);
    let guest: Guest;
    try {
      const either = AbortSignal.any([signal, timeout]);
      const socket = await vm.acceptAgent(either);
      mark('agent-connected');
      guest = stack.use(await abortable(Guest.connect(socket, 'kiln'), either));
    } catch (error) {
      throw timeout.aborted && !signal.aborted ? await agentSilent(vm, options.bootTimeoutMs) : error;
    }
    mark('kernel-up', guest.facts.agentStartedAtMs);
    faultPoint('agent-connect');
    options.logger.info({ vmmPid: vm.pid, ...guest.facts }, 'sandbox is up');
    stack.move();
    return new Sandbox(vm, guest);
  }

  /** Puts a file behind a free drive slot and returns the slot, which is the disk's serial in the guest. */
  async attachDisk(disk: { readonly file: string; readonly readOnly: boolean }): Promise<SlotName> {
    const slot = (disk.readOnly ? this.#freeSlots.ro : this.#freeSlots.rw).shift();
    if (slot === undefined) {
      const kind = disk.readOnly ? 'read-only' : 'writable';
      throw new KilnError('resource-exhausted', `the VM has no free ${kind} drive slot for ${disk.file}`);
    }
    await this.vm.attachDisk(slot, disk.file);
    return slot;
  }

  /** As `Guest.createContainer`; when the VM ends meanwhile, the error says how and shows its console. */
  async createContainer(container: GuestContainer): Promise<void> {
    try {
      await this.guest.createContainer(container);
    } catch (error) {
      if (!(error instanceof KilnError && error.code === 'unavailable')) throw error;
      const { code, signal, guestStopped, consoleTail } = await this.end();
      const how = guestStopped ? 'the guest stopped' : `the VM ended (${signal ?? `exit code ${code}`})`;
      throw new KilnError('unavailable', `${how} while container ${container.id} was created\n${consoleTail}`.trim(), {
        cause: error,
      });
    }
  }

  /** After the agent was lost: how the VM ended. A VM that lives on without its agent is killed. */
  async end(): Promise<VmExit> {
    const timer = setTimeout(() => void this.vm.kill(), guestStopGraceMs);
    try {
      return await this.vm.wait();
    } finally {
      clearTimeout(timer);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.guest[Symbol.dispose]();
    await this.vm.kill();
  }
}

async function agentSilent(vm: Vm, timeoutMs: number): Promise<KilnError> {
  const tail = await vm.consoleTail(consoleTailBytes);
  return new KilnError(
    'deadline-exceeded',
    `the agent in the guest did not call within ${timeoutMs / 1000} s; the guest console's last lines:\n${tail || '(nothing)'}`,
    { hint: 'see docs/guest.md; vm.boot_timeout_s in the config file sets the limit' },
  );
}
