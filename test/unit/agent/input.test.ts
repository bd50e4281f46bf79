import { closeSync, readSync } from 'node:fs';
import { expect, it, vi } from 'vitest';
import { Input } from '../../../agent/input.ts';
import { bytesInPipe, pipe2, socketFromFd } from '../../../src/sys/pipe.ts';

async function* chunks(...data: string[]): AsyncGenerator<Uint8Array> {
  for (const chunk of data) yield Buffer.from(chunk);
}

/** Reads what is there; an empty string is the end. */
function readNow(fd: number): string {
  const buffer = Buffer.alloc(65536);
  return buffer.toString('utf8', 0, readSync(fd, buffer));
}

it('what is written arrives in order, and its end closes stdin', async () => {
  const pipe = pipe2();
  using input = new Input(pipe.write);
  await input.writeAll(chunks('one ', '', 'two'));
  expect(readNow(pipe.read)).toBe('one two');
  expect(readNow(pipe.read)).toBe('');
  await expect(input.writeAll(chunks('x'))).rejects.toThrow(
    expect.objectContaining({ code: 'failed-precondition', message: 'stdin is closed' }),
  );
  closeSync(pipe.read);
});

it('a writer that breaks off leaves stdin open for the next one', async () => {
  const pipe = pipe2();
  using input = new Input(pipe.write);
  const broken = async function* () {
    yield Buffer.from('half ');
    throw new Error('the connection is lost');
  };
  await expect(input.writeAll(broken())).rejects.toThrow('the connection is lost');
  await input.writeAll(chunks('whole'));
  expect(readNow(pipe.read)).toBe('half whole');
  expect(readNow(pipe.read)).toBe('');
  closeSync(pipe.read);
});

it('a second writer is refused while one is at it, and the first goes on', async () => {
  const pipe = pipe2();
  using input = new Input(pipe.write);
  const gate = Promise.withResolvers<void>();
  const slow = async function* () {
    yield Buffer.from('first ');
    await gate.promise;
    yield Buffer.from('last');
  };
  const writing = input.writeAll(slow());
  await vi.waitFor(() => expect(bytesInPipe(pipe.read)).toBe(6), { interval: 1 });
  await expect(input.writeAll(chunks('x'))).rejects.toThrow('stdin is being written already');
  gate.resolve();
  await writing;
  expect(readNow(pipe.read)).toBe('first last');
  closeSync(pipe.read);
});

it('a program that does not read holds the writer back, and one that has gone does not', async () => {
  const pipe = pipe2();
  using input = new Input(pipe.write);
  let asked = 0;
  const endless = async function* () {
    for (; asked < 100; asked++) yield Buffer.alloc(65536);
  };
  const writing = input.writeAll(endless());
  await vi.waitFor(() => expect(bytesInPipe(pipe.read)).toBe(65536), { interval: 1 });
  for (let turn = 0; turn < 20; turn++) await new Promise((resolve) => setImmediate(resolve));
  expect(asked).toBeLessThan(3);
  closeSync(pipe.read);
  await writing;
  expect(asked).toBe(100);
});

it('the end of a writer does not close a terminal', async () => {
  const pipe = pipe2();
  using input = new Input(pipe.write, 'terminal');
  await input.writeAll(chunks('one'));
  await input.writeAll(chunks('two'));
  const reader = socketFromFd(pipe.read, 'read');
  let read = '';
  reader.on('data', (data) => (read += data));
  await vi.waitFor(() => expect(read).toBe('onetwo'), { interval: 1 });
  expect(reader.readableEnded).toBe(false);
  reader.destroy();
});

it('one that is never used gives its descriptor back', () => {
  const pipe = pipe2();
  const input = new Input(pipe.write);
  input[Symbol.dispose]();
  input[Symbol.dispose]();
  expect(readNow(pipe.read)).toBe('');
  closeSync(pipe.read);
});
