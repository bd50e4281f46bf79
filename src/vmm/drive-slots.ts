import { KilnError } from '../errors.ts';
import { readOnlySlots, type SlotName } from './vmm.ts';

export function isReadOnly(slot: SlotName): boolean {
  return readOnlySlots.includes(slot);
}

/** Which of a VM's drive slots have a file. */
export class DriveSlots {
  readonly #all: readonly SlotName[];
  readonly #used: Set<SlotName>;

  constructor(all: readonly SlotName[], used: readonly SlotName[] = []) {
    this.#all = all;
    this.#used = new Set(used);
  }

  get free(): SlotName[] {
    return this.#all.filter((slot) => !this.#used.has(slot));
  }

  get used(): SlotName[] {
    return [...this.#used];
  }

  /**
   * Has `put` put the file behind the slot; when that fails the slot is free again.
   *
   * @throws KilnError failed-precondition for a slot in use; what `put` throws, with slot and file named
   */
  async fill<T>(slot: SlotName, file: string, put: () => Promise<T>): Promise<T> {
    if (!this.#all.includes(slot)) throw new KilnError('failed-precondition', `this VM has no drive slot ${slot}`);
    if (this.#used.has(slot)) {
      throw new KilnError('failed-precondition', `drive slot ${slot} already has a file`);
    }
    this.#used.add(slot);
    try {
      return await put();
    } catch (error) {
      this.#used.delete(slot);
      const { code, message } = KilnError.from(error);
      throw new KilnError(code, `cannot put ${file} behind drive slot ${slot}: ${message}`, { cause: error });
    }
  }

  /**
   * Has `take` take the file from behind the slot; when that fails the slot is still in use. Nothing is done for a slot that
   * has none.
   *
   * @throws KilnError what `take` throws, with the slot named
   */
  async empty(slot: SlotName, take: () => Promise<void>): Promise<void> {
    if (!this.#used.has(slot)) return;
    try {
      await take();
    } catch (error) {
      const { code, message } = KilnError.from(error);
      throw new KilnError(code, `cannot empty drive slot ${slot}: ${message}`, { cause: error });
    }
    this.#used.delete(slot);
  }
}
