import { FilesError } from './tar-entry.ts';

/** A stream of chunks as a stream of bytes. */
export class Bytes {
  readonly #chunks: AsyncIterator<Buffer>;
  #chunk: Buffer = Buffer.alloc(0);
  #taken = 0;

  constructor(source: AsyncIterable<Buffer>) {
    this.#chunks = source[Symbol.asyncIterator]();
  }

  /** How many have been taken. */
  get taken(): number {
    return this.#taken;
  }

  /** Whether the stream ends here. */
  async atEnd(): Promise<boolean> {
    while (this.#chunk.length === 0) {
      const next = await this.#chunks.next();
      if (next.done) return true;
      this.#chunk = next.value;
    }
    return false;
  }

  /** Exactly so many. @throws FilesError invalid-argument when the stream ends before, in the middle of `what` */
  async take(length: number, what: string): Promise<Buffer> {
    const parts: Buffer[] = [];
    for (let missing = length; missing > 0; ) {
      const part = await this.some(missing, what);
      parts.push(part);
      missing -= part.length;
    }
    return parts.length === 1 ? (parts[0] ?? Buffer.alloc(0)) : Buffer.concat(parts);
  }

  /** At least one, and at most so many; none for none. */
  async some(most: number, what: string): Promise<Buffer> {
    if (most > 0 && (await this.atEnd()))
      throw new FilesError('invalid-argument', `the tar stream ends in the middle of ${what}`);
    const part = this.#chunk.subarray(0, most);
    this.#chunk = this.#chunk.subarray(part.length);
    this.#taken += part.length;
    return part;
  }

  /** Reads to the end of the stream: who sends it must not find it closed before. */
  async drain(): Promise<void> {
    while (!(await this.#chunks.next()).done);
  }
}
