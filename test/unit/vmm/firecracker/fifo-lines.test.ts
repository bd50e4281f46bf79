import { appendFileSync, existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { mkfifo } from '../../../../src/sys/fifo.ts';
import { FifoLines } from '../../../../src/vmm/firecracker/fifo-lines.ts';

let folder: string;
let fifo: string;
beforeEach(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'kiln-f'));
  fifo = path.join(folder, 'fifo');
  mkfifo(fifo, 0o600);
});
afterEach(() => rmSync(folder, { recursive: true }));

test('lines come whole, however they were written, and from one writer after the other', async () => {
  const lines: string[] = [];
  using _reader = new FifoLines(fifo, 100, (line) => lines.push(line));
  for (const part of ['one\ntw', 'o\n', 'three\n']) appendFileSync(fifo, part);
  await vi.waitFor(() => expect(lines).toEqual(['one', 'two', 'three']));
  appendFileSync(fifo, 'four\n');
  await vi.waitFor(() => expect(lines.at(-1)).toBe('four'));
});

test('what lies in the FIFO at the end is taken at once', () => {
  const lines: string[] = [];
  using reader = new FifoLines(fifo, 100, (line) => lines.push(line));
  appendFileSync(fifo, 'last\nwords\n');
  reader.drain();
  expect(lines).toEqual(['last', 'words']);
  reader.drain();
  expect(lines).toHaveLength(2);
});

test('what came during a pause, which follows each read, is not lost and in order', async () => {
  const lines: string[] = [];
  using reader = new FifoLines(fifo, 100, (line) => lines.push(line));
  appendFileSync(fifo, 'one\n');
  await vi.waitFor(() => expect(lines).toEqual(['one']));
  appendFileSync(fifo, 'two\n');
  // Time for the stream to read it, if it does so while it is paused.
  await new Promise((resolve) => setTimeout(resolve, 20));
  appendFileSync(fifo, 'three\n');
  reader.drain();
  expect(lines).toEqual(['one', 'two', 'three']);
});

test('a line without end is cut', () => {
  const lines: string[] = [];
  using reader = new FifoLines(fifo, 10, (line) => lines.push(line));
  for (const _ of [1, 2, 3]) {
    appendFileSync(fifo, 'x'.repeat(30_000));
    reader.drain();
  }
  appendFileSync(fifo, '\nnext\n');
  reader.drain();
  expect(lines).toEqual(['xxxxxxxxxx', 'next']);
});

test('what is no FIFO is refused', () => {
  const file = path.join(folder, 'file');
  writeFileSync(file, '');
  expect(() => new FifoLines(file, 10, () => {})).toThrow(`${file} is no FIFO`);
  expect(() => new FifoLines('/no/fifo', 10, () => {})).toThrow('ENOENT');
  expect(existsSync(file)).toBe(true);
});
