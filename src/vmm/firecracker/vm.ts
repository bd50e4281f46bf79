import type net from 'node:net';
import { KilnError } from '../../errors.ts';
import { abortable } from '../../host/abortable.ts';
import type { GroupLimits } from '../../host/cgroups.ts';
import type { ControlGroup } from '../../host/control-group.ts';
import { describeExit, type HelperProcess, type ProcessExit } from '../../host/helper-process.ts';
import type { FirstConnection } from '../channel.ts';
import { DriveSlots, isReadOnly } from '../drive-slots.ts';
import type { FileChannel } from '../file-channel.ts';
import type { MemoryGrowth, NetworkCard, SavableVm, SlotName, Vm, VmExit, VmRecord } from '../vmm.ts';
import type { FirecrackerApi } from './api.ts';
import { serialOf, slotsBeside } from './drives.ts';
import type { GuestMemory } from './memory.ts';
import type { Place } from './place.ts';
import type { Telemetry } from './telemetry.ts';

/** Bytes of console kept for an exit report: what fits an error message. */
const consoleTailBytes = 4096;

/** Containers of a pod have one process each on the host, in the pod's control group. */
const standInsAtMost = 1024;

/** Exit codes that are no guest's doing: v1.16 src/vmm/src/lib.rs, FcExitCode. */
const exitReasons: Readonly<Record<number, string>> = {
  148: 'a system call that its seccomp filter forbids',
  149: 'SIGBUS: the host has no memory or no huge pages left',
  150: 'SIGSEGV',
  151: 'SIGXFSZ: a file became longer than its limit',
  152: 'a configuration that it does not accept',
  153: 'arguments that it does not know',
  154: 'SIGXCPU',
  155: 'SIGPIPE',
  156: 'SIGHUP',
  157: 'SIGILL',
};

/** "(SIGKILL)", "(exit code 1)" or "(exit code 148: …)". */
export function describeFirecrackerExit(exit: ProcessExit): string {
  const reason = exitReasons[exit.code ?? 0];
  return reason === undefined ? describeExit(exit) : `(exit code ${exit.code}: ${reason})`;
}

/** An exit that the kernel did not tell, since it was not our child's, is what Firecracker's last line says. */
export function withExitCode({ code, signal }: ProcessExit, { log }: Pick<Telemetry, 'log'>): ProcessExit {
  return { code: code ?? (signal === null ? log.exitCode : null), signal };
}

/**
 * Moves Firecracker to a control group. One that was in a jail's leaves the limits there behind, so the new one gets them,
 * with as many processes more as may stand for containers.
 */
export async function enterGroup(
  group: ControlGroup,
  { firecracker, limits }: Pick<FirecrackerParts, 'firecracker' | 'limits'>,
): Promise<void> {
  await group.add(firecracker.pid);
  if (limits !== undefined) group.limit({ ...limits, pids: limits.pids + standInsAtMost });
}

/** What a running VM is made of. */
export interface FirecrackerParts {
  readonly firecracker: HelperProcess;
  readonly api: FirecrackerApi;
  readonly place: Place;
  readonly telemetry: Telemetry;
  /** Where the agent calls. */
  readonly agent: Pick<FirstConnection, 'accept'>;
  /** Where the guest's files go. */
  readonly files: Pick<FileChannel, 'accept'>;
  readonly nics: readonly NetworkCard[];
  readonly memory: GuestMemory;
  readonly growth: MemoryGrowth | null;
  /** Drive slots that have a file already. */
  readonly usedSlots?: readonly SlotName[];
  /** Of a VM in a jail: what it may take of the host. */
  readonly limits?: GroupLimits | undefined;
  /** Releases all of the above. */
  readonly resources: AsyncDisposableStack;
}

export class FirecrackerVm implements Vm {
  readonly pid: number;
  readonly nics: readonly NetworkCard[];
  readonly memoryGrowth: MemoryGrowth | null;
  /** Firecracker is itself the other end of the guest's vsock. */
  readonly channelLost = new Promise<never>(() => {});
  readonly #parts: FirecrackerParts;
  readonly #exit: Promise<VmExit>;
  readonly #slots: DriveSlots;
  #killed: Promise<void> | undefined;

  constructor(parts: FirecrackerParts) {
    this.pid = parts.firecracker.pid;
    this.memoryGrowth = parts.growth;
    this.nics = parts.nics;
    this.#parts = parts;
    this.#slots = new DriveSlots(slotsBeside(parts.nics.length), parts.usedSlots);
    this.#exit = this.#awaitExit();
  }

  /** A guest that reboots, or panics and so reboots, ends Firecracker with 0. */
  async #awaitExit(): Promise<VmExit> {
    const { firecracker, telemetry } = this.#parts;
    const exit = await firecracker.exited;
    telemetry.end();
    const { code, signal } = withExitCode(exit, telemetry);
    return { code, signal, guestStopped: code === 0, consoleTail: await this.consoleTail(consoleTailBytes) };
  }

  get freeSlots(): readonly SlotName[] {
    return this.#slots.free;
  }

  record(): VmRecord {
    const { firecracker, memory, nics, place } = this.#parts;
    const jail = place.uid === undefined ? {} : { jail: { uid: place.uid } };
    // Without an identity it has ended, which whoever adopts the VM will find.
    return { version: 1, firecracker: firecracker.identity, usedSlots: this.#slots.used, memory, nics, ...jail };
  }

  async acceptAgent(signal: AbortSignal): Promise<net.Socket> {
    const ended = this.#ended('before the agent called');
    ended.catch(() => {});
    return Promise.race([this.#parts.agent.accept(signal), ended]);
  }

  async acceptFiles(signal: AbortSignal): Promise<number> {
    const given = new AbortController();
    this.#ended('before its files were served').catch((error: unknown) => given.abort(error));
    return this.#parts.files.accept(AbortSignal.any([signal, given.signal]));
  }

  async #ended(when: string): Promise<never> {
    const exit = await this.#exit;
    const how = exit.guestStopped ? 'the guest stopped' : `Firecracker ended ${describeFirecrackerExit(exit)}`;
    throw new KilnError('unavailable', `${how} ${when}; last output:\n${exit.consoleTail || '(nothing)'}`);
  }

  attachDisk(slot: SlotName, file: string): Promise<string> {
    return this.#slots.fill(slot, file, async () => {
      const { api, place } = this.#parts;
      const seen = await place.fill(slot, file, isReadOnly(slot));
      try {
        const serial = await serialOf(seen.host);
        await api.call('PATCH /drives', { drive_id: slot, path_on_host: seen.inside });
        return serial;
      } catch (error) {
        place.clear(slot);
        throw error;
      }
    });
  }

  detachDisk(slot: SlotName): Promise<void> {
    return this.#slots.empty(slot, async () => {
      const { api, place } = this.#parts;
      await api.call('PATCH /drives', { drive_id: slot, path_on_host: place.clear(slot) });
    });
  }

  /** It keeps nothing that it could give back. */
  leavePool(): void {}

  /** A tap that is persistent is deleted from where it is. */
  cardMoved(): void {}

  enter(group: ControlGroup): Promise<void> {
    return enterGroup(group, this.#parts);
  }

  wait(): Promise<VmExit> {
    return this.#exit;
  }

  /** The guest's serial port is Firecracker's own output. */
  async consoleTail(maxBytes: number): Promise<string> {
    return this.#parts.firecracker.outputTail(maxBytes);
  }

  kill(): Promise<void> {
    this.#killed ??= this.#parts.resources.disposeAsync();
    return this.#killed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.kill();
  }
}

/** A VM that can become a template. */
export class SavableFirecrackerVm extends FirecrackerVm implements SavableVm {
  readonly #save: (signal: AbortSignal) => Promise<void>;

  /** @param save pauses the VM, and writes its files */
  constructor(parts: FirecrackerParts, save: (signal: AbortSignal) => Promise<void>) {
    super(parts);
    this.#save = save;
  }

  async save(signal: AbortSignal): Promise<void> {
    try {
      await this.#save(signal);
    } catch (error) {
      if (!(error instanceof KilnError && error.code === 'unavailable')) throw error;
      // Its connection breaks a moment before it has exited, and its exit says more.
      const exit = await abortable(this.wait(), signal);
      const how = exit.guestStopped ? 'the guest stopped' : `Firecracker ended ${describeFirecrackerExit(exit)}`;
      throw new KilnError('unavailable', `${how} while the VM was saved`, { cause: error });
    }
  }
}
