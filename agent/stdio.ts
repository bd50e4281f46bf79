/**
 * A container's stdin, stdout and stderr: one pipe each, between the program and a gRPC stream.
 *
 * The pipes are real ones: programs open /dev/stdout again, which no socket allows. Nothing is buffered here beyond the
 * message that is being sent: while the gRPC stream is full we do not read, the pipe fills, and the program waits in
 * write(2); while the program does not read its stdin, HTTP/2's flow control holds the host back.
 */
import { closeSync } from 'node:fs';
import type { Socket } from 'node:net';
import { countRelayed } from '../src/sys/garbage.ts';
import { type Pipe, pipe2, socketFromFd } from '../src/sys/pipe.ts';
import { AgentError } from './errors.ts';

/** How much is read at once, in bytes: what a pipe holds (pipe(7)). */
export const chunkSize = 64 * 1024;

/** Where output goes: the part of a gRPC server stream that is used here. */
export interface OutputSink {
  /** Sends a message. The data is no longer needed when `sent` is called: then the stream can take the next. */
  write(message: { data: Buffer }, sent: () => void): unknown;
  end(): void;
  on(event: 'cancelled' | 'close', listener: () => void): unknown;
  off(event: 'cancelled' | 'close', listener: () => void): unknown;
}

/** The pipes of one container. The program's ends are closed with `release` as soon as the program has them. */
export class ContainerStdio implements Disposable {
  readonly stdin: Input | undefined;
  readonly stdout: Output | undefined;
  readonly stderr: Output | undefined;
  /** What the program gets as its first three descriptors. */
  readonly forProgram: readonly [number | 'ignore', number | 'ignore', number | 'ignore'];
  readonly #programEnds: number[];

  constructor(wanted: { readonly stdin: boolean; readonly stdout: boolean; readonly stderr: boolean }) {
    using undo = new DisposableStack();
    const pipe = (want: boolean): Pipe | undefined => {
      if (!want) return undefined;
      const made = pipe2();
      undo.defer(() => {
        closeSync(made.read);
        closeSync(made.write);
      });
      return made;
    };
    const stdin = pipe(wanted.stdin);
    const stdout = pipe(wanted.stdout);
    const stderr = pipe(wanted.stderr);
    this.stdin = stdin === undefined ? undefined : new Input(stdin.write);
    this.stdout = stdout === undefined ? undefined : new Output(stdout.read, 'stdout');
    this.stderr = stderr === undefined ? undefined : new Output(stderr.read, 'stderr');
    this.forProgram = [stdin?.read ?? 'ignore', stdout?.write ?? 'ignore', stderr?.write ?? 'ignore'];
    this.#programEnds = this.forProgram.filter((end) => end !== 'ignore');
    undo.move();
  }

  /** Closes our copies of the program's ends: without that, its output would never end. */
  release(): void {
    for (const fd of this.#programEnds.splice(0)) closeSync(fd);
  }

  [Symbol.dispose](): void {
    this.release();
    this.stdin?.[Symbol.dispose]();
    this.stdout?.[Symbol.dispose]();
    this.stderr?.[Symbol.dispose]();
  }
}

/** What the program writes to one stream. Until it is read the bytes stay in the pipe, also after the program's end. */
export class Output implements Disposable {
  readonly #fd: number;
  readonly #name: string;
  #chunk = Buffer.alloc(0);
  #pipe: Socket | undefined;
  #sink: OutputSink | undefined;
  /** Bytes of the chunk that wait for a reader: its predecessor went away before they were sent. */
  #unsent = 0;
  #disposed = false;

  constructor(fd: number, name: string) {
    this.#fd = fd;
    this.#name = name;
  }

  /**
   * Sends everything to `sink` and ends it when the last writer has closed its end. One chunk at a time: the next is
   * read when the stream has taken this one, into the same memory. When the sink's reader goes away, what the stream
   * has not taken stays here, and another may read on.
   *
   * @throws AgentError failed-precondition when it is being read, or has been read to its end
   */
  relayTo(sink: OutputSink): void {
    if (this.#sink !== undefined) throw new AgentError('failed-precondition', `${this.#name} is being read already`);
    if (this.#disposed || this.#pipe?.destroyed)
      throw new AgentError('failed-precondition', `${this.#name} has been read`);
    this.#pipe ??= this.#open();
    const pipe = this.#pipe;
    this.#sink = sink;
    const detach = () => {
      this.#sink = undefined;
      pipe.pause();
      pipe.off('close', finish);
      sink.off('cancelled', detach);
      sink.off('close', detach);
      if (this.#disposed) pipe.destroy();
    };
    const finish = () => {
      detach();
      sink.end();
    };
    sink.on('cancelled', detach);
    sink.on('close', detach);
    pipe.on('close', finish);
    if (this.#unsent > 0) this.#send(this.#unsent);
    else pipe.resume();
  }

  #open(): Socket {
    const callback = (length: number) => {
      this.#send(length);
      return false;
    };
    this.#chunk = Buffer.allocUnsafeSlow(chunkSize);
    const pipe = socketFromFd(this.#fd, 'read', { buffer: this.#chunk, callback });
    // 'close' follows the end of the pipe, and an error: reading from a pipe has none that a reader could use.
    return pipe.on('error', () => {});
  }

  #send(length: number): void {
    const sink = this.#sink;
    this.#unsent = length;
    sink?.write({ data: this.#chunk.subarray(0, length) }, () => {
      if (this.#sink !== sink) return;
      this.#unsent = 0;
      countRelayed(length);
      this.#pipe?.resume();
    });
  }

  /** Closes the pipe; a reader that is at it gets to the end first (the program is gone, so there is one). */
  [Symbol.dispose](): void {
    if (this.#disposed) return;
    this.#disposed = true;
    if (this.#pipe === undefined) closeSync(this.#fd);
    else if (this.#sink === undefined) this.#pipe.destroy();
  }
}

/** What the program reads from its stdin. */
export class Input implements Disposable {
  readonly #fd: number;
  #pipe: Socket | undefined;
  #closed = false;

  constructor(fd: number) {
    this.#fd = fd;
  }

  /**
   * Writes all chunks in order, then closes stdin. A program that has closed its stdin, or has ended, is no error: the
   * rest is read and dropped, as a shell's pipe would lose it.
   *
   * @throws AgentError failed-precondition when stdin has a writer or is closed; what `chunks` throws, after closing
   */
  async writeAll(chunks: AsyncIterable<Uint8Array>): Promise<void> {
    if (this.#closed) throw new AgentError('failed-precondition', 'stdin is closed');
    if (this.#pipe !== undefined) throw new AgentError('failed-precondition', 'stdin is being written already');
    this.#pipe = socketFromFd(this.#fd, 'write');
    const pipe = this.#pipe;
    pipe.on('error', () => {});
    try {
      for await (const chunk of chunks) {
        countRelayed(chunk.length);
        if (chunk.length > 0 && pipe.writable) await new Promise<void>((written) => pipe.write(chunk, () => written()));
      }
      await new Promise<void>((ended) => (pipe.writable ? pipe.end(ended) : ended()));
    } finally {
      this[Symbol.dispose]();
    }
  }

  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    if (this.#pipe === undefined) closeSync(this.#fd);
    else this.#pipe.destroy();
  }
}
