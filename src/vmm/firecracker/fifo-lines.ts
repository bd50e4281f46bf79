import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';
import type { Socket } from 'node:net';
import { KilnError } from '../../errors.ts';
import { socketFromFd } from '../../sys/pipe.ts';

/** A FIFO's own size, which is the most that is read at once: pipe(7). */
const chunkBytes = 64 * 1024;

/** A FIFO can be made to hold 1 MiB: pipe(7), pipe-max-size. More than that comes from a writer that is still there. */
const drainReads = 16;

/** Between two reads, so that a writer without end costs kilnd little. */
const pauseMs = 100;

/**
 * Reads lines from a FIFO that Firecracker writes to without ever waiting: what finds no room is lost (v1.16
 * src/vmm/src/utils/mod.rs, open_file_nonblock), so nobody needs to read, and a reader that is slow costs lines and no more.
 */
export class FifoLines implements Disposable {
  readonly #fd: number;
  readonly #stream: Socket;
  readonly #maxBytes: number;
  readonly #onLine: (line: string) => void;
  #begun = '';
  #pause: NodeJS.Timeout | undefined;

  /**
   * @param maxBytes of a line; the rest of a longer one is dropped
   * @throws KilnError internal where there is no such FIFO
   */
  constructor(file: string, maxBytes: number, onLine: (line: string) => void) {
    this.#maxBytes = maxBytes;
    this.#onLine = onLine;
    // To write as well, or it would end whenever no Firecracker has it open.
    this.#fd = openSync(file, constants.O_RDWR | constants.O_NONBLOCK | constants.O_NOFOLLOW);
    if (!fstatSync(this.#fd).isFIFO()) {
      closeSync(this.#fd);
      throw new KilnError('internal', `${file} is no FIFO`);
    }
    this.#stream = socketFromFd(this.#fd, 'read');
    this.#stream.on('data', (chunk: Buffer) => {
      this.#take(chunk.toString());
      this.#stream.pause();
      this.#pause = setTimeout(() => this.#stream.resume(), pauseMs).unref();
    });
    this.#stream.on('error', () => this.#stream.destroy());
  }

  /** Takes what lies in the FIFO now, for after the writer's end. Returns also when the writer goes on. */
  drain(): void {
    // What the stream has read during a pause comes first: each read(), until there is nothing, is a 'data' event.
    let left: unknown;
    do left = this.#stream.read();
    while (left !== null);
    const chunk = Buffer.alloc(chunkBytes);
    for (let reads = 0; reads < drainReads && !this.#stream.destroyed; reads += 1) {
      try {
        const length = readSync(this.#fd, chunk);
        if (length === 0) return;
        this.#take(chunk.toString('utf8', 0, length));
      } catch {
        return; // EAGAIN: it is empty.
      }
    }
  }

  [Symbol.dispose](): void {
    clearTimeout(this.#pause);
    this.#stream.destroy();
  }

  #take(text: string): void {
    const lines = (this.#begun + text).split('\n');
    this.#begun = (lines.pop() ?? '').slice(0, this.#maxBytes);
    for (const line of lines) this.#onLine(line.slice(0, this.#maxBytes));
  }
}
