import { rmSync, statSync } from 'node:fs';
import type net from 'node:net';
import { KilnError } from '../../errors.ts';
import type { ControlGroup } from '../../host/control-group.ts';
import { describeExit, type HelperProcess, type ProcessExit } from '../../host/helper-process.ts';
import type { Taps } from '../cards.ts';
import type { FirstConnection } from '../channel.ts';
import { DriveSlots, isReadOnly } from '../drive-slots.ts';
import type { FileChannel } from '../file-channel.ts';
import {
  type NetworkCard,
  readOnlySlots,
  type SavableVm,
  type SlotName,
  type Vm,
  type VmExit,
  type VmRecord,
  writableSlots,
} from '../vmm.ts';
import { emptyNode, slotNode } from './command-line.ts';
import { GuestConsole } from './console.ts';
import { saveState } from './migration.ts';
import type { QmpClient } from './qmp.ts';
import type { ChannelRecord } from './record.ts';

/** Characters of console kept for an exit report: what fits an error message. */
const consoleTailChars = 4096;

/** What a running VM is made of. */
export interface QemuParts {
  readonly qemu: HelperProcess;
  readonly qmp: QmpClient;
  /** See guest-stop.ts. */
  readonly guestStopped: Promise<'guest'>;
  /** Where the agent calls. */
  readonly agent: Pick<FirstConnection, 'accept'>;
  readonly channel: ChannelRecord;
  /** Where the guest's files go. */
  readonly files: Pick<FileChannel, 'accept'>;
  readonly nics: readonly NetworkCard[];
  /** Of its cards; an earlier kilnd's VM has them alone. */
  readonly taps?: Pick<Taps, 'leave'>;
  /** Drive slots that have a file already. */
  readonly usedSlots?: readonly SlotName[];
  /** A file that is there while the VM is in a pool. */
  readonly pooled?: string | undefined;
  /** The program that carries the channel, where there is one. */
  readonly backend: HelperProcess | undefined;
  /** Releases all of the above. */
  readonly resources: AsyncDisposableStack;
}

export class QemuVm implements Vm {
  readonly pid: number;
  readonly nics: readonly NetworkCard[];
  readonly memoryGrowth = null;
  readonly channelLost: Promise<void>;
  readonly #parts: QemuParts;
  readonly #console: GuestConsole;
  readonly #exit: Promise<VmExit>;
  readonly #slots: DriveSlots;
  #killed: Promise<void> | undefined;

  constructor(parts: QemuParts) {
    this.pid = parts.qemu.pid;
    this.nics = parts.nics;
    this.#parts = parts;
    this.#slots = new DriveSlots([...readOnlySlots, ...writableSlots], parts.usedSlots);
    this.#console = new GuestConsole(parts.qmp);
    this.#exit = this.#awaitExit();
    this.channelLost = this.#awaitBackendLoss();
  }

  /** The VM's end is QEMU's end, or the guest's: QEMU then keeps the paused guest until we have read its console. */
  async #awaitExit(): Promise<VmExit> {
    const { qemu, guestStopped } = this.#parts;
    const first = await Promise.race([guestStopped, qemu.exited]);
    if (first !== 'guest') return this.#report(first, false);
    await this.consoleTail(consoleTailChars);
    await qemu.kill();
    return this.#report({ code: 0, signal: null }, true);
  }

  async #report({ code, signal }: ProcessExit, guestStopped: boolean): Promise<VmExit> {
    return { code, signal, guestStopped, consoleTail: await this.consoleTail(consoleTailChars) };
  }

  get freeSlots(): readonly SlotName[] {
    return this.#slots.free;
  }

  record(): VmRecord {
    const { qemu, backend, channel, nics } = this.#parts;
    // Without an identity it has ended, which whoever adopts the VM will find.
    return { version: 1, qemu: qemu.identity, backend: backend?.identity, channel, usedSlots: this.#slots.used, nics };
  }

  async acceptAgent(signal: AbortSignal): Promise<net.Socket> {
    return Promise.race([this.#parts.agent.accept(signal), this.#failure('before the agent called')]);
  }

  async acceptFiles(signal: AbortSignal): Promise<number> {
    const given = new AbortController();
    this.#failure('before its files were served').catch((error: unknown) => given.abort(error));
    return this.#parts.files.accept(AbortSignal.any([signal, given.signal]));
  }

  /** Rejects when the guest cannot reach its host any more. */
  #failure(when: string): Promise<never> {
    const failure = Promise.race([this.#ended(when), this.#lost(when)]);
    failure.catch(() => {});
    return failure;
  }

  async #ended(when: string): Promise<never> {
    const exit = await this.#exit;
    const how = exit.guestStopped ? 'the guest stopped' : `QEMU ended ${describeExit(exit)}`;
    const words = exit.consoleTail || this.#parts.qemu.lastWords() || '(nothing)';
    throw new KilnError('unavailable', `${how} ${when}; last output:\n${words}`);
  }

  async #lost(when: string): Promise<never> {
    await this.channelLost;
    const { backend } = this.#parts;
    const how = backend === undefined ? '' : ` ${describeExit(await backend.exited)}`;
    throw new KilnError('unavailable', `the vsock backend ended${how} ${when}: ${backend?.lastWords()}`);
  }

  /** Resolves when the channel's program has ended although QEMU runs on. */
  async #awaitBackendLoss(): Promise<void> {
    const { backend, qmp } = this.#parts;
    await (backend?.exited ?? new Promise<never>(() => {}));
    // It also ends when QEMU does, and then QEMU's end is what has to be told: QEMU does not answer any more.
    await qmp.execute('query-status').catch(() => this.#exit.then(() => new Promise<never>(() => {})));
  }

  /** The serial is the slot's name, whatever file is behind it. */
  attachDisk(slot: SlotName, file: string): Promise<string> {
    return this.#slots.fill(slot, file, async () => {
      await this.#putBehind(slot, file);
      return slot;
    });
  }

  async #putBehind(slot: SlotName, file: string): Promise<void> {
    const { qmp } = this.#parts;
    const readOnly = isReadOnly(slot);
    const node = fileNode(slot);
    // "file" refuses a device (qapi/block-core.json, BlockdevDriver). What is not there QEMU tells of.
    const isDevice = statSync(file, { throwIfNoEntry: false })?.isBlockDevice() ?? false;
    const driver = isDevice ? 'host_device' : 'file';
    const options = { driver, 'node-name': node, filename: file, 'read-only': readOnly };
    const [added, opened] = await Promise.allSettled([
      qmp.execute('blockdev-add', readOnly ? options : { ...options, discard: 'unmap' }),
      qmp.execute('blockdev-reopen', { options: [slotNode(slot, readOnly, node)] }),
    ]);
    if (added.status === 'rejected') throw added.reason;
    if (opened.status === 'fulfilled') return;
    // The slot is as it was; a node that is left would keep its name and its lock on the file.
    await qmp.execute('blockdev-del', { 'node-name': node }).catch(() => {});
    throw opened.reason;
  }

  detachDisk(slot: SlotName): Promise<void> {
    return this.#slots.empty(slot, async () => {
      const { qmp } = this.#parts;
      await qmp.execute('blockdev-reopen', { options: [slotNode(slot, isReadOnly(slot), emptyNode(slot))] });
      await qmp.execute('blockdev-del', { 'node-name': fileNode(slot) });
    });
  }

  leavePool(): void {
    const { pooled } = this.#parts;
    try {
      if (pooled !== undefined) rmSync(pooled, { force: true });
    } catch {
      // Then its memory is not given back.
    }
  }

  cardMoved(card: number): void {
    this.#parts.taps?.leave(card);
  }

  async enter(group: ControlGroup): Promise<void> {
    const { qemu, backend } = this.#parts;
    for (const helper of [backend, qemu]) if (helper !== undefined) await group.add(helper.pid);
  }

  wait(): Promise<VmExit> {
    return this.#exit;
  }

  consoleTail(maxBytes: number): Promise<string> {
    return this.#console.tail(maxBytes);
  }

  kill(): Promise<void> {
    this.#killed ??= this.#parts.resources.disposeAsync();
    return this.#killed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.kill();
  }
}

/** The node of the file that is behind a slot. */
function fileNode(slot: SlotName): string {
  return `${slot}-file`;
}

/** A VM whose memory is a template's file. */
export class SavableQemuVm extends QemuVm implements SavableVm {
  readonly #qmp: QmpClient;
  readonly #stateFile: string;
  readonly #socket: string;

  /** @param socket a free place for a Unix socket */
  constructor(parts: QemuParts, stateFile: string, socket: string) {
    super(parts);
    this.#qmp = parts.qmp;
    this.#stateFile = stateFile;
    this.#socket = socket;
  }

  save(signal: AbortSignal): Promise<void> {
    return saveState(this.#qmp, this.#stateFile, this.#socket, signal);
  }
}
