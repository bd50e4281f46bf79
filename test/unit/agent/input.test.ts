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

it('a second writer takes over from one that the program holds back, whose bytes come first', async () => {
  const pipe = pipe2();
  using input = new Input(pipe.write);
  const full = async function* () {
    yield Buffer.alloc(65536 + 3, 'a');
    yield Buffer.from('never taken');
  };
  const first = input.writeAll(full());
  const aborted = expect(first).rejects.toThrow(
    expect.objectContaining({ code: 'aborted', message: 'another writer of stdin took over' }),
  );
  await vi.waitFor(() => expect(bytesInPipe(pipe.read)).toBe(65536), { interval: 1 });
  const second = input.writeAll(chunks('second'));
  await aborted;
  const reader = socketFromFd(pipe.read, 'read');
  let read = '';
  for await (const data of reader) read += data;
  await second;
  expect(read).toBe(`${'a'.repeat(65536 + 3)}second`);
});

it('a third writer takes over from the second, and the end of one that was replaced leaves stdin alone', async () => {
  const pipe = pipe2();
  using input = new Input(pipe.write, 'terminal');
  const waiting = Promise.withResolvers<void>();
  const held = async function* (data: string) {
    yield Buffer.from(data);
    await waiting.promise;
    yield Buffer.from(' late');
  };
  const first = input.writeAll(held('one')).catch(String);
  await vi.waitFor(() => expect(bytesInPipe(pipe.read)).toBe(3), { interval: 1 });
  const writers = [first, input.writeAll(held(' two')).catch(String)];
  await vi.waitFor(() => expect(bytesInPipe(pipe.read)).toBe(7), { interval: 1 });
  await input.writeAll(chunks(' three'));
  waiting.resolve();
  const took = 'AgentError: another writer of stdin took over';
  expect(await Promise.all(writers)).toEqual([took, took]);
  expect(readNow(pipe.read)).toBe('one two three');
  closeSync(pipe.read);
});

it('one that was replaced and then ends in order does not close stdin for its successor', async () => {
  const pipe = pipe2();
  using input = new Input(pipe.write);
  const [first, second] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
  const until = async function* (data: string, goOn: Promise<void>) {
    yield Buffer.from(data);
    await goOn;
  };
  const replaced = input.writeAll(until('one', first.promise)).catch(String);
  await vi.waitFor(() => expect(bytesInPipe(pipe.read)).toBe(3), { interval: 1 });
  const later = input.writeAll(until(' two', second.promise));
  first.resolve();
  expect(await replaced).toBe('AgentError: another writer of stdin took over');
  expect(readNow(pipe.read)).toBe('one two');
  second.resolve();
  await later;
  expect(readNow(pipe.read)).toBe('');
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
