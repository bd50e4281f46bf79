/**
 * A FIFO for what a logger writes to its stdout and stderr, of which the end is kept for error messages.
 *
 * Not a file: a logger can run for months, and nobody would ever shorten it. Not a pipe: when kilnd dies, the logger's
 * next line must not kill it by SIGPIPE. The logger gets the FIFO open in both directions (fifo(7)), so that it has a
 * reader as long as it lives.
 */
import { closeSync, constants, openSync, readSync, rmSync } from 'node:fs';
import type { Socket } from 'node:net';
import { mkfifo } from '../sys/fifo.ts';
import { socketFromFd } from '../sys/pipe.ts';
import { lastLines } from './printable.ts';

/** What is kept, in bytes. */
const keptBytes = 2048;

/** A pipe's capacity: there is never more to read at once. pipe(7). */
const pipeCapacity = 64 * 1024;

export class LastWords {
  /** For the logger's descriptors 1 and 2; to be closed with `closeWriter` when it has them. */
  readonly writer: number;
  readonly #path: string;
  readonly #fd: number;
  readonly #socket: Socket;
  #kept = Buffer.alloc(0);
  #writerOpen = true;

  /**
   * @param how whether there is no such FIFO yet, or a logger of an earlier kilnd that writes to it
   * @throws SysError, or the error of open(2)
   */
  constructor(path: string, how: 'new' | 'existing' = 'new') {
    this.#path = path;
    if (how === 'new') mkfifo(path, 0o600);
    // First in both directions, so that the other open meets a writer.
    this.writer = openSync(path, constants.O_RDWR);
    try {
      this.#fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
      this.#socket = socketFromFd(this.#fd, 'read');
    } catch (error) {
      closeSync(this.writer);
      throw error;
    }
    this.#socket.on('data', (chunk: Buffer) => this.#keep(chunk));
    this.#socket.on('error', () => {});
  }

  closeWriter(): void {
    if (this.#writerOpen) closeSync(this.writer);
    this.#writerOpen = false;
  }

  /** The last lines, those included that the event loop has not seen yet: the logger may have ended just now. */
  text(): string {
    if (!this.#socket.destroyed) this.#readWhatIsThere();
    return lastLines(this.#kept.toString());
  }

  [Symbol.dispose](): void {
    this.closeWriter();
    this.#socket.destroy();
    rmSync(this.#path, { force: true });
  }

  #readWhatIsThere(): void {
    const chunk = Buffer.allocUnsafe(pipeCapacity);
    try {
      this.#keep(chunk.subarray(0, readSync(this.#fd, chunk)));
    } catch {
      // EAGAIN: nothing is there.
    }
  }

  #keep(chunk: Buffer): void {
    this.#kept = Buffer.concat([this.#kept, chunk]).subarray(-keptBytes);
  }
}
