import { KilnError } from '../errors.ts';
import { isReadOnly } from '../vmm/drive-slots.ts';
import { readOnlySlots, type SlotName, writableSlots } from '../vmm/vmm.ts';

/** A file to be put behind a drive slot. */
export interface DiskFile {
  readonly file: string;
  readonly readOnly: boolean;
}

/** A file behind a drive slot. */
export interface AttachedDisk {
  readonly slot: SlotName;
  /** By which the guest knows it. */
  readonly serial: string;
  readonly file: string;
}

interface Occupied {
  readonly file: string;
  readonly serial: Promise<string>;
  /** Containers that have it mounted, or are about to. */
  users: number;
  /** It is being taken away. */
  leaving: boolean;
}

/**
 * Which file is behind which drive slot of a VM, for how many containers: a read-only file takes one slot however many
 * have it.
 */
export class DiskSlots {
  readonly #occupied = new Map<SlotName, Occupied>();
  /** What is behind these is not known: an attempt failed, or an earlier kilnd was at it. */
  readonly #doubtful: Set<SlotName>;

  /** @param adopted true where an earlier kilnd may have put files behind any slot */
  constructor(adopted = false) {
    this.#doubtful = new Set(adopted ? [...readOnlySlots, ...writableSlots] : []);
  }

  /**
   * @param vm what puts a file behind a slot, returning its serial, and what takes whatever is there away
   * @throws KilnError resource-exhausted when no slot is free; what `vm` throws
   */
  async attach(
    { file, readOnly }: DiskFile,
    vm: {
      /** Slots that have no file, as far as the VM knows. */
      readonly free: readonly SlotName[];
      readonly attach: (slot: SlotName, file: string) => Promise<string>;
      readonly detach: (slot: SlotName) => Promise<void>;
    },
  ): Promise<AttachedDisk> {
    const shared = readOnly ? this.#find(file) : undefined;
    if (shared !== undefined) {
      const [slot, occupied] = shared;
      occupied.users += 1;
      try {
        return { slot, serial: await occupied.serial, file };
      } catch {
        // Whoever put it there may have given up, which is no reason here.
        return this.attach({ file, readOnly }, vm);
      }
    }
    const slot = vm.free.find((name) => isReadOnly(name) === readOnly && !this.#occupied.has(name));
    if (slot === undefined) {
      const kind = readOnly ? 'read-only' : 'writable';
      throw new KilnError('resource-exhausted', `the VM has no free ${kind} drive slot for ${file}`);
    }
    const put = async () => {
      if (this.#doubtful.has(slot)) await vm.detach(slot);
      this.#doubtful.delete(slot);
      return vm.attach(slot, file);
    };
    const serial = put();
    this.#occupied.set(slot, { file, serial, users: 1, leaving: false });
    try {
      return { slot, serial: await serial, file };
    } catch (error) {
      this.#occupied.delete(slot);
      this.#doubtful.add(slot);
      throw error;
    }
  }

  /** Notes what a container of an earlier kilnd has. */
  claim({ slot, serial, file }: AttachedDisk): void {
    this.#doubtful.delete(slot);
    const known = this.#occupied.get(slot);
    if (known === undefined)
      this.#occupied.set(slot, { file, serial: Promise.resolve(serial), users: 1, leaving: false });
    else known.users += 1;
  }

  /** Takes away what may be behind slots of which nothing is known. @throws what `detach` throws */
  async emptyDoubtful(detach: (slot: SlotName) => Promise<void>): Promise<void> {
    for (const slot of this.#doubtful) {
      await detach(slot);
      this.#doubtful.delete(slot);
    }
  }

  /**
   * The end of one container's use. The last one's frees the slot; when `detach` fails, the slot is lost.
   *
   * @throws what `detach` throws
   */
  async release({ slot }: AttachedDisk, detach: (slot: SlotName) => Promise<void>): Promise<void> {
    const occupied = this.#occupied.get(slot);
    if (occupied === undefined) return;
    occupied.users -= 1;
    if (occupied.users > 0) return;
    occupied.leaving = true;
    await detach(slot);
    this.#occupied.delete(slot);
  }

  #find(file: string): [SlotName, Occupied] | undefined {
    return [...this.#occupied].find(([, occupied]) => occupied.file === file && !occupied.leaving);
  }
}
