/** What a program reads from its stdin, on its way from the host. */
import { closeSync } from 'node:fs';
import type { Socket } from 'node:net';
import { countRelayed } from '../src/sys/garbage.ts';
import { socketFromFd } from '../src/sys/pipe.ts';
import { socketFromDevice } from '../src/sys/terminal.ts';
import { AgentError } from './errors.ts';

export class Input implements Disposable {
  readonly #fd: number;
  readonly #kind: 'pipe' | 'terminal';
  #sink: Socket | undefined;
  /** Ends the writer that is at it. */
  #replace: (() => void) | undefined;
  #closed = false;

  constructor(fd: number, kind: 'pipe' | 'terminal' = 'pipe') {
    this.#fd = fd;
    this.#kind = kind;
  }

  /**
   * Writes all chunks in order, then closes stdin; a terminal stays open, whose end of input is a character. A program
   * that has closed its stdin, or has ended, is no error: the rest is read and dropped, as a shell's pipe would lose it.
   *
   * A new writer takes over from one that is at it, whose connection is gone or about to be; what that one has handed over
   * comes first, and what is still to come from it is dropped.
   *
   * @throws AgentError failed-precondition when stdin is closed, aborted when another writer took over; what `chunks`
   * throws, and then stdin is as it was, for the next writer
   */
  async writeAll(chunks: AsyncIterable<Uint8Array>): Promise<void> {
    if (this.#closed) throw new AgentError('failed-precondition', 'stdin is closed');
    this.#sink ??= this.#open();
    const sink = this.#sink;
    this.#replace?.();
    const replaced = Promise.withResolvers<never>();
    replaced.promise.catch(() => {});
    const tookOver = new AgentError('aborted', 'another writer of stdin took over');
    const replace = () => replaced.reject(tookOver);
    this.#replace = replace;
    try {
      for await (const chunk of chunks) {
        if (this.#replace !== replace) throw tookOver;
        countRelayed(chunk.length);
        if (chunk.length === 0 || !sink.writable) continue;
        const written = new Promise<void>((done) => sink.write(chunk, () => done()));
        await Promise.race([written, replaced.promise]);
      }
      if (this.#replace !== replace) throw tookOver;
    } finally {
      if (this.#replace === replace) this.#replace = undefined;
    }
    if (this.#kind === 'terminal') return;
    await new Promise<void>((ended) => (sink.writable ? sink.end(ended) : ended()));
    this[Symbol.dispose]();
  }

  /** As a `writeAll` of nothing. */
  end(): void {
    if (this.#kind === 'pipe') this[Symbol.dispose]();
  }

  #open(): Socket {
    const sink = this.#kind === 'pipe' ? socketFromFd(this.#fd, 'write') : socketFromDevice(this.#fd, 'write');
    return sink.on('error', () => {});
  }

  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    if (this.#sink === undefined) closeSync(this.#fd);
    else this.#sink.destroy();
  }
}
