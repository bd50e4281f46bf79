import { KilnError } from '../errors.ts';
import { isReadOnly } from '../vmm/drive-slots.ts';
import { readOnlySlots, type SlotName, writableSlots } from '../vmm/vmm.ts';

/** A file to be put behind a drive slot. */
export interface DiskFile {
  readonly file: string;
  readonly readOnly: boolean;
  /** A device of the host, which any containers of the VM may have, and only one VM may write to. */
  readonly device?: boolean | undefined;
}

/** A file behind a drive slot. */
export interface AttachedDisk {
  readonly slot: SlotName;
  /** By which the guest knows it. */
  readonly serial: string;
  readonly file: string;
  readonly device?: boolean | undefined;
}

/** What puts files behind slots. */
export interface DiskHost {
  /** Slots that have no file, as far as the VM knows. */
  readonly free: readonly SlotName[];
  /** Returns the serial. It goes on when nobody waits for it any more. */
  readonly attach: (slot: SlotName, file: string) => Promise<string>;
  /** Waits for what `attach` returns as long as whoever wants the disk does. */
  readonly answer: (attached: Promise<string>) => Promise<string>;
  readonly detach: (slot: SlotName) => Promise<void>;
  /** Takes a device of the host for this VM alone. */
  readonly claim: (file: string) => Promise<AsyncDisposable>;
}

interface Occupied {
  readonly file: string;
  readonly serial: Promise<string>;
  /** Containers that have it mounted, or are about to. */
  users: number;
  /** It is being taken away. */
  leaving: boolean;
  /** Of a device that is written to. */
  claim?: AsyncDisposable | undefined;
}

/**
 * Which file is behind which drive slot of a VM, for how many containers: a read-only file takes one slot however many
 * have it.
 */
export class DiskSlots implements AsyncDisposable {
  readonly #occupied = new Map<SlotName, Occupied>();
  /** What is behind these is not known: an attempt failed, or an earlier kilnd was at it. */
  readonly #doubtful: Set<SlotName>;
  /** By file, what is still to be taken away since nobody wants it any more. */
  readonly #late = new Map<string, Promise<void>>();

  /** @param adopted true where an earlier kilnd may have put files behind any slot */
  constructor(adopted = false) {
    this.#doubtful = new Set(adopted ? [...readOnlySlots, ...writableSlots] : []);
  }

  /**
   * @throws KilnError resource-exhausted when no slot is free, failed-precondition for a device that the VM has in the other
   *   mode; what `vm` throws
   */
  async attach(disk: DiskFile, vm: DiskHost): Promise<AttachedDisk> {
    const { file, readOnly, device } = disk;
    const kind = readOnly ? 'read-only' : 'writable';
    const shared = readOnly || device ? this.#find(file) : undefined;
    if (shared !== undefined) {
      const [slot, occupied] = shared;
      if (isReadOnly(slot) !== readOnly) {
        throw new KilnError(
          'failed-precondition',
          `${file} cannot be ${kind}: another container of the VM has it otherwise`,
        );
      }
      return this.#use(slot, occupied, disk, vm);
    }
    const slot = vm.free.find((name) => isReadOnly(name) === readOnly && !this.#occupied.has(name));
    if (slot === undefined) {
      throw new KilnError('resource-exhausted', `the VM has no free ${kind} drive slot for ${file}`, {
        hint: 'docs/vmm.md has how many there are: of the writable ones each container takes one for its own changes',
      });
    }
    const { promise, resolve } = Promise.withResolvers<string>();
    const occupied: Occupied = { file, serial: promise, users: 0, leaving: false };
    this.#occupied.set(slot, occupied);
    resolve(this.#put(slot, occupied, disk, vm));
    return this.#use(slot, occupied, disk, vm);
  }

  /** Whoever gives up waiting leaves no file behind: what the VM has put there nevertheless is taken away again. */
  async #use(slot: SlotName, occupied: Occupied, { file, device }: DiskFile, vm: DiskHost): Promise<AttachedDisk> {
    occupied.users += 1;
    try {
      return { slot, serial: await vm.answer(occupied.serial), file, device };
    } catch (error) {
      occupied.users -= 1;
      if (occupied.users === 0 && this.#occupied.get(slot) === occupied) this.#takeLate(slot, occupied, vm.detach);
      throw error;
    }
  }

  async #put(slot: SlotName, occupied: Occupied, { file, readOnly, device }: DiskFile, vm: DiskHost): Promise<string> {
    try {
      if (device && !readOnly) occupied.claim = await vm.claim(file);
      if (this.#doubtful.has(slot)) await vm.detach(slot);
      this.#doubtful.delete(slot);
      return await vm.attach(slot, file);
    } catch (error) {
      this.#occupied.delete(slot);
      this.#doubtful.add(slot);
      await occupied.claim?.[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** After everybody has given up. What cannot be taken away keeps its slot. */
  #takeLate(slot: SlotName, occupied: Occupied, detach: DiskHost['detach']): void {
    const { file } = occupied;
    occupied.leaving = true;
    const take = async () => {
      await detach(slot);
      this.#occupied.delete(slot);
      await occupied.claim?.[Symbol.asyncDispose]();
    };
    const gone = occupied.serial.then(take, () => {});
    const forget = () => {
      if (this.#late.get(file) === gone) this.#late.delete(file);
    };
    // A failure stays to be told.
    gone.then(forget, () => {});
    this.#late.set(file, gone);
  }

  /** Resolves when a file that nobody waits for any more is behind no slot. @throws what `detach` throws */
  async gone(file: string): Promise<void> {
    await this.#late.get(file);
  }

  /**
   * Notes what a container of an earlier kilnd has.
   *
   * @throws what `claim` throws, after all is noted
   */
  async claim({ slot, serial, file, device }: AttachedDisk, claim: DiskHost['claim']): Promise<void> {
    this.#doubtful.delete(slot);
    const known = this.#occupied.get(slot);
    if (known !== undefined) {
      known.users += 1;
      return;
    }
    const occupied: Occupied = { file, serial: Promise.resolve(serial), users: 1, leaving: false };
    this.#occupied.set(slot, occupied);
    if (device && !isReadOnly(slot)) occupied.claim = await claim(file);
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
    await occupied.claim?.[Symbol.asyncDispose]();
  }

  /** When the VM has ended: gives back what was taken for it alone. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const { claim } of this.#occupied.values()) await claim?.[Symbol.asyncDispose]();
    this.#occupied.clear();
  }

  #find(file: string): [SlotName, Occupied] | undefined {
    return [...this.#occupied].find(([, occupied]) => occupied.file === file && !occupied.leaving);
  }
}
