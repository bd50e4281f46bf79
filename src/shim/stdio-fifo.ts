/**
 * The FIFOs that carry a task's stdin, stdout and stderr between containerd's client and us.
 *
 * The client makes a FIFO (fifo(7)) and opens its end; we open ours. Four properties of FIFOs shape this file:
 *
 * - open(2) of one end blocks until the other end is opened. With O_NONBLOCK opening to read succeeds at once, and
 *   opening to write succeeds at once if a reader exists. So we open to read first, then to write, and never block.
 * - A reader sees end of file when the last writer closes. By holding a write end of stdin ourselves, the client may
 *   come and go; closing ours is what CloseIO means.
 * - A writer gets EPIPE when the last reader closes. By holding a read end of stdout ourselves, and never reading from
 *   it, the client and containerd may come and go; what is written meanwhile waits in the pipe, 64 KiB of it.
 * - libuv reads and writes FIFOs by epoll, as it does sockets: a stalled client costs no thread of the pool.
 */
import { closeSync, constants, openSync, readSync } from 'node:fs';
import { Socket } from 'node:net';
import { Readable, Writable } from 'node:stream';

/** A pipe's default capacity in bytes. pipe(7). */
const pipeCapacity = 64 * 1024;

/** The most that an unprivileged process may make of a pipe: /proc/sys/fs/pipe-max-size. */
const maxPipeCapacity = 1024 * 1024;

const openToRead = (path: string): number => openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
const openToWrite = (path: string): number => openSync(path, constants.O_WRONLY | constants.O_NONBLOCK);

/** stdout or stderr. `end` hands everything written to the pipe, then lets the client see end of file. */
export class FifoWriter extends Writable {
  readonly path: string;
  readonly #socket: Socket;
  #spareReader: number | undefined;
  #discarding = false;
  #writing: ((error?: Error | null) => void) | undefined;

  /** @throws the error of open(2) */
  constructor(path: string) {
    super({ decodeStrings: true });
    this.path = path;
    const reader = openToRead(path);
    try {
      this.#socket = new Socket({ fd: openToWrite(path), readable: false, writable: true });
    } catch (error) {
      closeSync(reader);
      throw error;
    }
    this.#spareReader = reader;
    this.#socket.on('error', (error) => this.destroy(error));
  }

  /** For when nobody will ever read again: what is written from now on is lost, and holds nobody back. */
  discard(): void {
    this.#discarding = true;
    this.#release();
    this.#written(null);
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, callback: (error?: Error | null) => void): void {
    if (this.#discarding) {
      callback();
      return;
    }
    this.#writing = callback;
    this.#socket.write(chunk, (error) => this.#written(error ?? null));
  }

  /** Once a chunk: `discard` comes before the answer of a write that is under way. */
  #written(error: Error | null): void {
    const callback = this.#writing;
    this.#writing = undefined;
    callback?.(error);
  }

  override _final(callback: () => void): void {
    // Every write has called back, so all bytes are in the pipe.
    this.#release();
    callback();
  }

  override _destroy(error: Error | null, callback: (error: Error | null) => void): void {
    this.#release();
    callback(error);
  }

  #release(): void {
    this.#socket.destroy();
    if (this.#spareReader !== undefined) closeSync(this.#spareReader);
    this.#spareReader = undefined;
  }
}

export interface StartOptions {
  /**
   * Whether a client must hold its end when stdin is opened. True for a process that starts: no client means that it
   * has nothing to send, so stdin ends. False when a running task is taken over: the client may come back.
   */
  readonly endWithoutClient: boolean;
}

/**
 * stdin. Nothing is opened before `start`. It ends when all write ends are closed, ours (by `closeWriter`) and the
 * clients', and the pipe is empty.
 */
export class FifoReader extends Readable {
  readonly path: string;
  #socket: Socket | undefined;
  #heldWriter: number | undefined;
  #started = false;
  #writerClosed = false;
  #isEmpty = false;

  constructor(path: string) {
    super();
    this.path = path;
  }

  /** True from the start until our write end is closed. */
  get open(): boolean {
    return this.#heldWriter !== undefined;
  }

  /** It has ended at its start, and nothing was sent. */
  get isEmpty(): boolean {
    return this.#isEmpty;
  }

  /** Opens the FIFO. Later calls do nothing. @throws the error of open(2) */
  start({ endWithoutClient }: StartOptions): void {
    if (this.#started || this.destroyed) return;
    this.#started = true;
    const fd = openToRead(this.path);
    let owned = true;
    try {
      // Without a writer the pipe reads as ended, although epoll would never tell: it reports a hang-up only of a
      // writer that came after the reader.
      const ended = this.#readWhatIsThere(fd) === 'ended';
      if (ended && (endWithoutClient || this.#writerClosed)) {
        this.#isEmpty = this.readableLength === 0;
        this.push(null);
        return;
      }
      if (!this.#writerClosed) this.#heldWriter = openToWrite(this.path);
      this.#socket = new Socket({ fd, readable: true, writable: false });
      owned = false;
    } finally {
      if (owned) closeSync(fd);
    }
    this.#socket.on('data', (chunk: Buffer) => {
      if (!this.push(chunk)) this.#socket?.pause();
    });
    this.#socket.on('end', () => this.push(null));
    this.#socket.on('error', (error) => this.destroy(error));
  }

  /** Closes our write end, or sees to it that none is opened. */
  closeWriter(): void {
    this.#writerClosed = true;
    if (this.#heldWriter !== undefined) closeSync(this.#heldWriter);
    this.#heldWriter = undefined;
  }

  override _read(): void {
    this.#socket?.resume();
  }

  override _destroy(error: Error | null, callback: (error: Error | null) => void): void {
    this.#socket?.destroy();
    this.closeWriter();
    callback(error);
  }

  #readWhatIsThere(fd: number): 'ended' | 'open' {
    // Bounded, because a fast client could keep it up for ever.
    for (let total = 0; total < maxPipeCapacity; ) {
      const chunk = Buffer.allocUnsafe(pipeCapacity);
      const length = readNow(fd, chunk);
      if (length === 'would-block') return 'open';
      if (length === 0) return 'ended';
      this.push(chunk.subarray(0, length));
      total += length;
    }
    return 'open';
  }
}

function readNow(fd: number, into: Buffer): number | 'would-block' {
  try {
    return readSync(fd, into);
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'EAGAIN') return 'would-block';
    throw error;
  }
}
