import { closeSync, writeSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { chunkSize, frameRoom, Output, type OutputSink } from '../../../agent/output.ts';
import { bytesInPipe, pipe2 } from '../../../src/sys/pipe.ts';

const cleanup: (() => void)[] = [];
afterEach(() => {
  for (const each of cleanup.splice(0)) each();
});

/** An output, and the program's end of its pipe. */
function piped() {
  const pipe = pipe2();
  const output = new Output(pipe.read, 'stdout');
  let open = true;
  const close = () => {
    if (open) closeSync(pipe.write);
    open = false;
  };
  cleanup.push(close, () => output[Symbol.dispose]());
  return { output, fd: pipe.read, write: (data: string | Buffer) => writeSync(pipe.write, data as Buffer), close };
}

/** Keeps what it gets. */
class Sink implements OutputSink {
  readonly #parts: Buffer[] = [];
  ends = 0;

  write(data: Buffer): void {
    expect(this.ends).toBe(0);
    // The room before it is the sink's.
    Buffer.from(data.buffer, data.byteOffset - frameRoom, frameRoom).fill(0xff);
    // The contract allows the memory to be used again once it is acknowledged.
    this.#parts.push(Buffer.from(data));
  }

  end(): void {
    this.ends += 1;
  }

  get bytes(): Buffer {
    return Buffer.concat(this.#parts);
  }

  get messages(): string[] {
    return this.#parts.map(String);
  }

  async has(length: number): Promise<Buffer> {
    await vi.waitFor(() => expect(this.bytes.length).toBeGreaterThanOrEqual(length), { interval: 1 });
    return this.bytes;
  }

  async ended(): Promise<Buffer> {
    await vi.waitFor(() => expect(this.ends).toBe(1), { interval: 1 });
    return this.bytes;
  }
}

/** Bytes that tell their offset in a stream. */
function numbered(from: number, length: number): Buffer {
  return Buffer.from(Uint8Array.from({ length }, (_, i) => (from + i) % 251));
}

/** As many turns as it takes for whatever could still be read to be read. */
async function quiet(): Promise<void> {
  for (let turn = 0; turn < 20; turn++) await new Promise((resolve) => setImmediate(resolve));
}

/** Fills pipe and window: each chunk is written when the one before was read. */
async function fillWindow({ write }: ReturnType<typeof piped>, sink: Sink): Promise<void> {
  for (let chunk = 0; chunk < 4; chunk++) {
    write(numbered(chunk * chunkSize, chunkSize));
    await sink.has((chunk + 1) * chunkSize);
  }
}

describe('the window', () => {
  it('bounds what is read ahead of what is delivered, and the rest waits in the pipe', async () => {
    const made = piped();
    const sink = new Sink();
    made.output.relayTo(sink, 0);
    await fillWindow(made, sink);
    made.write(numbered(4 * chunkSize, chunkSize));
    await quiet();
    expect(sink.bytes.length).toBe(4 * chunkSize);
    expect(bytesInPipe(made.fd)).toBe(chunkSize);
    expect(made.output.written()).toBe(5 * chunkSize);
  });

  it('moves on when a whole chunk is delivered, and not before', async () => {
    const made = piped();
    const sink = new Sink();
    made.output.relayTo(sink, 0);
    await fillWindow(made, sink);
    made.write(numbered(4 * chunkSize, chunkSize));
    made.output.acknowledge(chunkSize - 1);
    await quiet();
    expect(sink.bytes.length).toBe(4 * chunkSize);
    made.output.acknowledge(chunkSize);
    expect((await sink.has(5 * chunkSize)).equals(numbered(0, 5 * chunkSize))).toBe(true);
  });

  it('lets a long stream through byte for byte, with its memory used again and again', async () => {
    const { output, write, close } = piped();
    const sink = new Sink();
    output.relayTo(sink, 0);
    for (let at = 0; at < 40 * 10_000; at += 10_000) {
      write(numbered(at, 10_000));
      await sink.has(at + 10_000);
      output.acknowledge(at + 10_000);
    }
    close();
    expect((await sink.ended()).equals(numbered(0, 400_000))).toBe(true);
  });
});

describe('reads', () => {
  /** What this process has spent, in ms. */
  let cpuMs = 0;
  beforeEach(() => {
    cpuMs = 0;
    vi.useFakeTimers({ toFake: ['performance', 'setTimeout', 'clearTimeout'] });
    vi.spyOn(process, 'cpuUsage').mockImplementation(() => ({ user: 800 * cpuMs, system: 200 * cpuMs }));
    cleanup.push(() => {
      vi.useRealTimers();
      vi.restoreAllMocks();
    });
  });

  /** The CPU is this process's for so long. */
  function spend(ms: number): void {
    cpuMs += ms;
    vi.advanceTimersByTime(ms);
  }

  /** Writes pieces, each when the one before was read, if it is read at all. */
  async function writeEach({ write }: ReturnType<typeof piped>, ...pieces: string[]): Promise<void> {
    for (const piece of pieces) {
      write(piece);
      await quiet();
    }
  }

  it('that follow each other closely are put together, and the first goes out at once', async () => {
    const made = piped();
    const { output } = made;
    const sink = new Sink();
    output.relayTo(sink, 0);
    await writeEach(made, 'one,', 'two,', 'three,', 'four,', 'five,');
    expect(sink.messages).toEqual(['one,', 'two,']);
    // Nor does an answer of the host's end the rest.
    output.acknowledge(4);
    await quiet();
    expect(sink.messages).toEqual(['one,', 'two,']);
    vi.advanceTimersByTime(4);
    await quiet();
    expect(sink.messages).toEqual(['one,', 'two,', 'three,four,five,']);
    vi.advanceTimersByTime(4);
    await writeEach(made, 'six,', 'seven,');
    expect(sink.messages.slice(3)).toEqual(['six,']);
    // One that comes alone again goes out at once.
    output.acknowledge(16);
    vi.advanceTimersByTime(100);
    await quiet();
    vi.advanceTimersByTime(100);
    await writeEach(made, 'eight,');
    expect(sink.messages.slice(4)).toEqual(['seven,', 'eight,']);
  });

  it('rest longer where a message costs much, which does not count as time in between', async () => {
    const made = piped();
    const { output } = made;
    const sink = new Sink();
    output.relayTo(sink, 0);
    await writeEach(made, 'one,');
    spend(8);
    await writeEach(made, 'two,');
    expect(sink.messages).toEqual(['one,', 'two,']);
    // 4 ms, and twice what the first has cost.
    spend(8);
    await writeEach(made, 'three,');
    vi.advanceTimersByTime(11);
    await writeEach(made, 'four,');
    expect(sink.messages.length).toBe(2);
    vi.advanceTimersByTime(1);
    await quiet();
    expect(sink.messages).toEqual(['one,', 'two,', 'three,four,']);
    // Never longer than 40 ms.
    output.acknowledge(19);
    spend(20);
    await quiet();
    await writeEach(made, 'five,');
    expect(sink.messages.length).toBe(4);
    await writeEach(made, 'six,');
    vi.advanceTimersByTime(39);
    await quiet();
    expect(sink.messages.length).toBe(4);
    vi.advanceTimersByTime(1);
    await quiet();
    expect(sink.messages.at(-1)).toBe('six,');
  });

  it('rest no longer than the pipe takes to be half full', async () => {
    const made = piped();
    const { output } = made;
    const sink = new Sink();
    output.relayTo(sink, 0);
    const piece = 'x'.repeat(65_536);
    await writeEach(made, piece);
    vi.advanceTimersByTime(1);
    await writeEach(made, piece, 'y');
    expect(sink.messages).toEqual([piece, piece]);
    vi.advanceTimersByTime(1);
    await quiet();
    expect(sink.messages.length).toBe(2);
    vi.advanceTimersByTime(1);
    await quiet();
    expect(sink.messages).toEqual([piece, piece, 'y']);
  });

  it('do not rest where the pipe would be full at once', async () => {
    const made = piped();
    const sink = new Sink();
    made.output.relayTo(sink, 0);
    const piece = 'x'.repeat(65_536);
    await writeEach(made, piece, piece, piece);
    expect(sink.messages.length).toBe(3);
    expect(vi.getTimerCount()).toBe(0);
  });

  it('do not outlive the output', async () => {
    const made = piped();
    made.output.relayTo(new Sink(), 0);
    await writeEach(made, 'one,', 'two,', 'three');
    expect(vi.getTimerCount()).toBe(1);
    made.output[Symbol.dispose]();
    expect(vi.getTimerCount()).toBe(0);
  });
});

describe('a reader', () => {
  it('that comes after another gets the rest from the byte that it names', async () => {
    const { output, write, close } = piped();
    const first = new Sink();
    output.relayTo(first, 0);
    write('0123456789');
    await first.has(10);
    output.acknowledge(4);
    output.detach(first);
    write('abc');
    const second = new Sink();
    output.relayTo(second, 7);
    expect((await second.has(6)).toString()).toBe('789abc');
    close();
    output.acknowledge(13);
    await second.ended();
    expect(first.bytes.toString()).toBe('0123456789');
    expect(first.ends).toBe(0);
  });

  it('takes the stream over from an earlier one, which is ended', async () => {
    const { output, write } = piped();
    const [first, second] = [new Sink(), new Sink()];
    output.relayTo(first, 0);
    write('one');
    await first.has(3);
    output.relayTo(second, 0);
    expect(first.ends).toBe(1);
    // That the earlier one leaves now is nothing to the later one.
    output.detach(first);
    write('two');
    expect((await second.has(6)).toString()).toBe('onetwo');
    expect(first.bytes.toString()).toBe('one');
  });

  it('that names bytes which are delivered already, or were never written, is refused', async () => {
    const { output, write } = piped();
    const sink = new Sink();
    output.relayTo(sink, 0);
    write('0123456789');
    await sink.has(10);
    output.acknowledge(6);
    const refused = (from: number) => expect(() => output.relayTo(new Sink(), from));
    refused(5).toThrow('stdout cannot be read from byte 5: 6 are delivered already');
    refused(11).toThrow('stdout has 10 bytes so far, so byte 11 cannot be delivered');
    for (const from of [-1, 0.5, Number.NaN, 2 ** 63]) refused(from).toThrow(/cannot be delivered/);
    for (const offset of [11, -1, Number.NaN, 2 ** 64]) {
      expect(() => output.acknowledge(offset)).toThrow(expect.objectContaining({ code: 'out-of-range' }));
    }
    // Whoever was refused has changed nothing.
    write('x');
    expect((await sink.has(11)).toString()).toBe('0123456789x');
  });

  it('may acknowledge again what it has acknowledged', async () => {
    const { output, write } = piped();
    const sink = new Sink();
    output.relayTo(sink, 0);
    write('0123');
    await sink.has(4);
    output.acknowledge(3);
    output.acknowledge(1);
    const next = new Sink();
    output.relayTo(next, 3);
    expect(next.bytes.toString()).toBe('3');
  });
});

describe('the end', () => {
  it('of the program leaves its output here until it is removed, for one reader after the other', async () => {
    const { output, write, close } = piped();
    write('last words');
    close();
    for (const from of [0, 0, 5]) {
      const sink = new Sink();
      output.relayTo(sink, from);
      expect((await sink.has(10 - from)).toString()).toBe('last words'.slice(from));
    }
    const last = new Sink();
    output.relayTo(last, 10);
    expect((await last.ended()).length).toBe(0);
  });

  it('is told to a reader once it has acknowledged every byte', async () => {
    const made = piped();
    const sink = new Sink();
    made.output.relayTo(sink, 0);
    await fillWindow(made, sink);
    made.write('the end');
    made.close();
    await quiet();
    expect(sink.ends).toBe(0);
    made.output.acknowledge(4 * chunkSize);
    expect((await sink.has(4 * chunkSize + 7)).subarray(4 * chunkSize).toString()).toBe('the end');
    await quiet();
    expect(sink.ends).toBe(0);
    made.output.acknowledge(4 * chunkSize + 7);
    await sink.ended();
  });

  it('by removal ends the reader, whatever is left', async () => {
    const { output, write } = piped();
    const sink = new Sink();
    output.relayTo(sink, 0);
    write('x');
    await sink.has(1);
    output[Symbol.dispose]();
    output[Symbol.dispose]();
    expect(sink.ends).toBe(1);
  });
});

describe('how much is written', () => {
  it('counts what is in the pipe, before there is a reader and after', async () => {
    const { output, write } = piped();
    expect(output.written()).toBe(0);
    write('0123456789');
    expect(output.written()).toBe(10);
    const sink = new Sink();
    output.relayTo(sink, 0);
    await sink.has(10);
    write('abc');
    expect(output.written()).toBe(13);
    await sink.has(13);
    output.acknowledge(13);
    expect(output.written()).toBe(13);
  });

  it('can be told at every moment of the end', async () => {
    const { output, write, close } = piped();
    const sink = new Sink();
    output.relayTo(sink, 0);
    write('bye');
    await sink.has(3);
    output.acknowledge(3);
    close();
    // Between the closing of the descriptor and the event that tells of it, too: the check phase lies between.
    const told: (number | undefined)[] = [];
    while (sink.ends === 0) {
      told.push(output.written());
      await new Promise((resolve) => setImmediate(resolve));
    }
    told.push(output.written());
    output[Symbol.dispose]();
    told.push(output.written());
    expect(new Set(told)).toEqual(new Set([3]));
  });

  it('cannot be told of a terminal', () => {
    const pipe = pipe2();
    closeSync(pipe.write);
    using output = new Output(pipe.read, 'the terminal', 'terminal');
    expect(output.written()).toBeUndefined();
  });
});
