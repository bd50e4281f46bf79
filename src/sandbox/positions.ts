import { closeSync, constants, openSync, readSync, writeSync } from 'node:fs';
import type { OutputName } from '../guest/streams.ts';

/** What of each output stream has been delivered to its reader, in bytes. */
export type Delivered = Readonly<Record<OutputName, number>>;

/** Where each stream's number lies in the file: 64 bits each, little-endian. */
const places: Readonly<Record<OutputName, number>> = { stdout: 0, stderr: 8 };
const size = 16;

/**
 * How far the outputs of a process have come, in a file: a kilnd that is killed leaves it to the next, which reads on
 * from there. Written after each delivery, so what was delivered last may be delivered once more, and nothing is lost.
 * The state folder is in memory (tmpfs), and so is this.
 */
export class Positions implements Disposable {
  readonly #fd: number;
  readonly #bytes = Buffer.alloc(8);
  #open = true;

  constructor(file: string) {
    this.#fd = openSync(file, constants.O_RDWR | constants.O_CREAT, 0o600);
  }

  /** Zeros for a process whose output nobody has read. */
  read(): Delivered {
    const bytes = Buffer.alloc(size);
    readSync(this.#fd, bytes, 0, size, 0);
    const at = (name: OutputName) => Number(bytes.readBigUInt64LE(places[name]));
    return { stdout: at('stdout'), stderr: at('stderr') };
  }

  write(name: OutputName, offset: number): void {
    if (!this.#open) return;
    this.#bytes.writeBigUInt64LE(BigInt(offset));
    writeSync(this.#fd, this.#bytes, 0, this.#bytes.length, places[name]);
  }

  [Symbol.dispose](): void {
    if (!this.#open) return;
    this.#open = false;
    closeSync(this.#fd);
  }
}
