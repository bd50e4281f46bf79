/**
 * What a program writes to one stream, on its way to the host.
 *
 * Bytes leave here only when the host has said that it delivered them; until then they are kept, so that a connection
 * that breaks, or a host that dies, loses nothing: the next one says how far it got, and everything after that is sent
 * again. What is kept is bounded by the window. When it is full the pipe is not read, fills, and the program waits in
 * write(2). Nobody reading is the same as a slow reader: the bytes stay in the window and in the pipe, also after the
 * program's end.
 *
 * A program that writes a little at a time would wake this process for each write. What comes alone goes out at once; when
 * reads follow each other closely the pipe is left alone for a moment, and collects what comes.
 */
import { closeSync } from 'node:fs';
import type { Socket } from 'node:net';
import { bytesInPipe, growPipe, socketFromFd } from '../src/sys/pipe.ts';
import { socketFromDevice } from '../src/sys/terminal.ts';
import { AgentError } from './errors.ts';

/**
 * How much is read at once, in bytes, and what the program's pipe is made to hold. Each message costs the same whatever
 * its length, and under emulation more than its bytes: four times what a pipe holds by default (pipe(7)) about halves the
 * cost of a byte.
 */
export const chunkSize = 256 * 1024;

/** Chunks that the host need not have delivered yet. */
const windowChunks = 4;

/**
 * A read that comes within `hurryMs` of the one before, or of the end of a rest, is followed by a rest: until half of the
 * pipe would be full at the rate so far, and no longer than `restMs`. Below 1 ms there is none. What this process has spent
 * on what was read before does not count as time in between, and makes the rest longer, to a limit: where an emulated CPU
 * takes long for a message, the program would get to write no more than the next line.
 */
const hurryMs = 2;
const restMs = 4;
const longestRestMs = 40;
/** What no clock is trusted to tell from nothing. */
const momentMs = 0.01;

/** So many bytes in front of the data of a message belong to the sink: for the frame it goes out in. */
export const frameRoom = 16;

interface Moment {
  /** By performance.now(). */
  readonly ms: number;
  /** CPU time of this process until then. */
  readonly cpuMs: number;
}

const longAgo: Moment = { ms: Number.NEGATIVE_INFINITY, cpuMs: 0 };

function thisMoment(): Moment {
  const { user, system } = process.cpuUsage();
  return { ms: performance.now(), cpuMs: (user + system) / 1000 };
}

/** Where output goes. */
export interface OutputSink {
  /** Sends bytes, which stay as they are, and so do the `frameRoom` bytes before them, until they are acknowledged. */
  write(data: Buffer): unknown;
  end(): void;
}

interface Chunk {
  /** What was read stands behind `frameRoom` bytes. */
  readonly memory: Buffer;
  /** Offset in the stream of the first byte. */
  readonly start: number;
  readonly length: number;
}

export class Output implements Disposable {
  readonly #fd: number;
  readonly #kind: 'pipe' | 'terminal';
  readonly #name: string;
  /** Read and not delivered, in order. */
  readonly #kept: Chunk[] = [];
  /** Memory to read into next; made as it is needed, then used again. */
  readonly #spare: Buffer[] = [];
  #reading: Buffer = Buffer.alloc(0);
  #source: Socket | undefined;
  #sink: OutputSink | undefined;
  /** Offsets in the stream: up to where it was read, sent to this sink, and delivered. */
  #read = 0;
  #sent = 0;
  #delivered = 0;
  /** When something was read last. */
  #readAt: Moment = longAgo;
  /** The same, or when a rest has ended. */
  #readyAt: Moment = longAgo;
  #rest: NodeJS.Timeout | undefined;
  #ended = false;
  #disposed = false;

  constructor(fd: number, name: string, kind: 'pipe' | 'terminal' = 'pipe') {
    this.#fd = fd;
    this.#name = name;
    this.#kind = kind;
    // Where that is not allowed it goes on in smaller pieces.
    if (kind === 'pipe') growPipe(fd, chunkSize);
  }

  /**
   * Sends everything from offset `from` on to `sink`, and ends it when the last writer has closed its end and everything is
   * acknowledged. Another sink that is at it is ended: its reader is gone, or about to be.
   *
   * @throws AgentError out-of-range when these bytes are not here: forgotten, or never written
   */
  relayTo(sink: OutputSink, from: number): void {
    this.acknowledge(from);
    if (from < this.#delivered) {
      const kept = `${this.#delivered} are delivered already`;
      throw new AgentError('out-of-range', `${this.#name} cannot be read from byte ${from}: ${kept}`);
    }
    this.#sink?.end();
    this.#sink = sink;
    this.#sent = from;
    this.#source ??= this.#open();
    this.#send();
  }

  /** The sink's reader is gone; what it has not acknowledged waits for the next one. */
  detach(sink: OutputSink): void {
    if (this.#sink === sink) this.#sink = undefined;
  }

  /** The first `offset` bytes of the stream are delivered. @throws AgentError out-of-range for what was never read */
  acknowledge(offset: number): void {
    if (!Number.isSafeInteger(offset) || offset < 0 || offset > this.#read) {
      throw new AgentError(
        'out-of-range',
        `${this.#name} has ${this.#read} bytes so far, so byte ${offset} cannot be delivered`,
      );
    }
    this.#delivered = Math.max(this.#delivered, offset);
    let first = this.#kept[0];
    for (; first !== undefined && first.start + first.length <= this.#delivered; first = this.#kept[0]) {
      this.#kept.shift();
      this.#spare.push(first.memory);
    }
    if (this.#mayRead()) this.#source?.resume();
    this.#endWhenDelivered();
  }

  /**
   * How many bytes the program has written by now; undefined when that cannot be told (a terminal hands bytes on a little
   * later).
   */
  written(): number | undefined {
    if (this.#kind === 'terminal') return undefined;
    // Its end has been read, so there is nothing in the pipe, whose descriptor is closed by now.
    if (this.#disposed || this.#source?.destroyed) return this.#read;
    return this.#read + bytesInPipe(this.#fd);
  }

  #open(): Socket {
    const into = { buffer: () => this.#nextMemory(), callback: (length: number) => this.#onRead(length) };
    const source =
      this.#kind === 'pipe' ? socketFromFd(this.#fd, 'read', into) : socketFromDevice(this.#fd, 'read', into);
    // 'close' follows the end of a pipe, and an error: of a pipe there is none, of a terminal EIO is the end.
    source.on('error', () => {});
    return source.on('close', () => {
      this.#ended = true;
      this.#send();
    });
  }

  #nextMemory(): Buffer {
    this.#reading = this.#spare.pop() ?? Buffer.allocUnsafeSlow(frameRoom + chunkSize);
    return this.#reading.subarray(frameRoom);
  }

  #onRead(length: number): boolean {
    this.#kept.push({ memory: this.#reading, start: this.#read, length });
    this.#read += length;
    this.#send();
    const now = thisMoment();
    if (now.ms - this.#readyAt.ms - (now.cpuMs - this.#readyAt.cpuMs) < hurryMs) {
      const msPerByte = Math.max(momentMs, now.ms - this.#readAt.ms) / length;
      const longest = Math.min(longestRestMs, restMs + 2 * (now.cpuMs - this.#readAt.cpuMs));
      const ms = Math.floor(Math.min(longest, (chunkSize / 2) * msPerByte));
      if (ms > 0) this.#takeRest(ms);
    }
    this.#readAt = now;
    this.#readyAt = now;
    return this.#mayRead();
  }

  #mayRead(): boolean {
    return this.#rest === undefined && this.#kept.length < windowChunks;
  }

  #takeRest(ms: number): void {
    this.#rest = setTimeout(() => {
      this.#rest = undefined;
      this.#readyAt = thisMoment();
      if (this.#mayRead()) this.#source?.resume();
    }, ms);
  }

  #send(): void {
    const sink = this.#sink;
    if (sink === undefined) return;
    for (const { memory, start, length } of this.#kept) {
      if (start + length <= this.#sent) continue;
      // The room before it may be a part of the chunk: that is delivered, or else this reader would want it.
      sink.write(memory.subarray(frameRoom + Math.max(0, this.#sent - start), frameRoom + length));
      this.#sent = start + length;
    }
    this.#endWhenDelivered();
  }

  /** A reader may acknowledge until then: on a call that has ended that would be an error. */
  #endWhenDelivered(): void {
    if (!this.#ended || this.#delivered < this.#read) return;
    this.#sink?.end();
    this.#sink = undefined;
  }

  /** Closes the pipe; what is left in it is lost. */
  [Symbol.dispose](): void {
    if (this.#disposed) return;
    this.#disposed = true;
    clearTimeout(this.#rest);
    if (this.#source === undefined) closeSync(this.#fd);
    else this.#source.destroy();
    this.#sink?.end();
    this.#sink = undefined;
  }
}
