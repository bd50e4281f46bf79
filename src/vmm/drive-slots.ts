import { KilnError } from '../errors.ts';
import type { SlotName } from './vmm.ts';

/** Which of a VM's drive slots have a file. */
export class DriveSlots {
  readonly #used: Set<SlotName>;

  constructor(used: readonly SlotName[] = []) {
    this.#used = new Set(used);
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
}
