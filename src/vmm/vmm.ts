import type net from 'node:net';
import type { ControlGroup } from '../host/control-group.ts';

/**
 * The seam between Kiln and a virtual machine monitor. Only the folders below `vmm/` know a VMM; everything else sees
 * these types. What differs between VMMs is data, never an `if` on a name.
 */

/** A drive that exists from the VM's start and gets a file put behind it later. */
export type SlotName = `ro${number}` | `rw${number}`;

/** The slots that a VM can have. All VMs of a shape have the same, so that a snapshot of one fits every container. */
export const readOnlySlots: readonly SlotName[] = ['ro0', 'ro1', 'ro2', 'ro3', 'ro4', 'ro5', 'ro6', 'ro7'];
export const writableSlots: readonly SlotName[] = ['rw0', 'rw1', 'rw2', 'rw3', 'rw4', 'rw5', 'rw6', 'rw7'];

/** The vsock port that the guest dials for its files, unless the kernel's command line says `kiln.files_port=`. */
export const filesPort = 9000;

/** The vsock port on which the host awaits the agent's call, unless the kernel's command line says `kiln.agent_port=`. */
export const agentPort = 1024;

export interface VmConfig {
  /** For logs and the process list. */
  readonly id: string;
  /** An existing private directory for the VM's sockets and logs; its owner removes it after `kill`. */
  readonly directory: string;
  readonly memoryMib: number;
  readonly vcpus: number;
  /** An uncompressed kernel with a PVH entry note (ELF vmlinux). */
  readonly kernel: string;
  /** Absent for a kernel that has everything built in. */
  readonly initrd: string | undefined;
  /** The read-only erofs image with the agent. */
  readonly guestImage: string;
  /** Network cards that the VM has from its start, without a network: 0 to `maxNetworkCards`. */
  readonly networkCards: number;
  /** Where the VMM and its helpers run; where kilnd does, without it. */
  readonly controlGroup?: ControlGroup | undefined;
  /** It waits for a container: what the VMM has at hand for a quick start stays until `leavePool`, however long that is. */
  readonly pooled?: boolean;
}

export const maxNetworkCards = 4;

/** A network card, and the tap device that is the host's end of it. */
export interface NetworkCard {
  /** By which the guest finds the card: the same in every VM, so the guest takes another one over before it is used. */
  readonly mac: string;
  /** Its name in the namespace where the VMM was started, until it is moved to another one. It is down. */
  readonly tap: string;
}

/** The MAC of a VM's nth card: a local address, whose last bytes are "kiln" and the number. */
export function cardMac(index: number): string {
  return `02:6b:69:6c:6e:${index.toString(16).padStart(2, '0')}`;
}

/** What all clones of a template have in common. */
export type VmShape = Omit<VmConfig, 'id' | 'directory' | 'controlGroup' | 'pooled'>;

export interface VmExit {
  /** The VMM's exit code, or null when a signal ended it. */
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  /** True when the guest itself stopped (panic, reboot, power-off) and not the VMM. */
  readonly guestStopped: boolean;
  /** The last lines of the guest's console, where they could still be read. */
  readonly consoleTail: string;
}

/** What a later kilnd needs to find a VM again: JSON, and nobody's business but the driver's. */
export type VmRecord = Readonly<Record<string, unknown>>;

/** How a VM's memory can grow while it runs. */
export interface MemoryGrowth {
  /** The most that the VM can have, in MiB. */
  readonly limitMib: number;
  /**
   * Resolves when the guest can use so much. Throws `internal` with the VMM's words, `deadline-exceeded` when the guest does not
   * take it, `resource-exhausted` when the host has no room.
   */
  growTo(mib: number): Promise<void>;
}

/** A running VM. Whoever got it from `boot` must call `kill` in the end. */
export interface Vm extends AsyncDisposable {
  readonly pid: number;
  /** The VM as it is now, for `Vmm.adopt`. */
  record(): VmRecord;
  /** Those that have no file now. */
  readonly freeSlots: readonly SlotName[];
  /** One per network card. */
  readonly nics: readonly NetworkCard[];
  /** Null where the VM keeps the memory that it was booted with. */
  readonly memoryGrowth: MemoryGrowth | null;
  /**
   * The connection that the agent in the guest dials when it is up, or, of an adopted VM, dials again. Of an adopted VM
   * it may be called again for the next one, since a program in the guest may have dialled before the agent.
   * Rejects with `unavailable` when the VM ends first, or with the signal's reason when that aborts.
   */
  acceptAgent(signal: AbortSignal): Promise<net.Socket>;
  /**
   * The host's end of the guest's file channel, as a blocking, close-on-exec descriptor, which is the caller's. Over vsock this
   * is a connection that the guest dials, and the host listens from the moment of this call; over virtio-serial it is the one
   * byte stream there is, at once, whether or not anybody is at its other end. It may be called again when an earlier call has
   * ended and, over virtio-serial, its descriptor was closed.
   * Rejects with `unavailable` when the VM ends first, or with the signal's reason when that aborts.
   */
  acceptFiles(signal: AbortSignal): Promise<number>;
  /**
   * Puts a file behind a slot, and returns the serial by which the guest knows that disk (at most 20 characters).
   * Precondition: the slot is empty. The guest sees the new content at its next read.
   * Throws `failed-precondition` for a slot in use, `internal` with the VMM's words otherwise.
   */
  attachDisk(slot: SlotName, file: string): Promise<string>;
  /**
   * Takes the file from behind a slot, which is empty then as it was at the VM's start, and can get another one. The guest
   * must have unmounted the disk. An empty slot is none of an error.
   * Throws `internal` with the VMM's words; `unimplemented` where a slot cannot be emptied.
   */
  detachDisk(slot: SlotName): Promise<void>;
  /** Of a VM that was started as `pooled`: a container has it now. Never throws. */
  leavePool(): void;
  /** A card's tap is where its container's network is, and has to be gone when the VM is. Never throws. */
  cardMoved(card: number): void;
  /** Moves the VMM and its helpers to another control group. What they have of memory stays counted where they got it. */
  enter(group: ControlGroup): Promise<void>;
  /** Resolves when nobody can reach the agent any more although the VM lives on; else never. */
  readonly channelLost: Promise<void>;
  /** Resolves when the VM has ended, for whatever reason; never rejects. */
  wait(): Promise<VmExit>;
  /** The last `maxBytes` of the guest's console; empty when the VMM no longer answers. */
  consoleTail(maxBytes: number): Promise<string>;
  /** Ends the VM and its helpers and waits until they are gone. Safe to call twice. */
  kill(): Promise<void>;
}

/** A running VM that can be saved as a template. */
export interface SavableVm extends Vm {
  /** Stops the VM for good and writes all that it is into its template's files, complete when this resolves. */
  save(signal: AbortSignal): Promise<void>;
}

/**
 * Saving and restoring VMs. A template is a directory with the files of one saved VM, from which any number of clones can
 * be started: each has its state, and shares its memory's pages until it writes to them.
 */
export interface TemplateDriver {
  /** The files that a template consists of. */
  readonly files: readonly string[];
  /** A clone runs slowly what it runs for the first time, since the VMM has to translate it. */
  readonly clonesAreCold: boolean;
  /**
   * What a template of that shape depends on, as text: the VMM's program and how it is told to run. One that was made under
   * another value cannot be restored. Throws `failed-precondition` when there is no such program.
   */
  fingerprint(shape: VmShape): readonly string[];
  /**
   * As `Vmm.boot`, of a VM that can be saved into an existing directory. What this and `save` leave in there when they fail,
   * the caller removes.
   */
  boot(config: VmConfig, template: string, signal: AbortSignal): Promise<SavableVm>;
  /**
   * Starts a clone, which has not run since it was saved: its agent waits for the host's first words, or calls again.
   * `config` is the template's, but for id and directory. Fails as `Vmm.boot` does, also for files that are no template.
   */
  restore(config: VmConfig, template: string, signal: AbortSignal): Promise<Vm>;
}

export interface Vmm {
  readonly name: string;
  /** Undefined where this VMM cannot save VMs, as it is configured. */
  readonly templates?: TemplateDriver;
  /**
   * Starts a VM. Resolves as soon as the VMM takes commands; the guest is still booting then.
   * On failure nothing is left behind, and the error carries the VMM's own last words.
   */
  boot(config: VmConfig, signal: AbortSignal): Promise<Vm>;
  /**
   * Takes over a VM that an earlier kilnd has booted, from its record and its directory.
   * Throws `not-found` when it has ended, and then ends what is left of it; `invalid-argument` for a record that is none.
   */
  adopt(record: VmRecord, directory: string, signal: AbortSignal): Promise<Vm>;
}
