import { closeSync, fstatSync, openSync, readFileSync, rmSync } from 'node:fs';
import { mkdtemp } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import { Readiness } from '../../../src/shim/control/readiness.ts';

let folder: string;
let file: string;
let fd: number;

beforeEach(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'kiln-t'));
  file = path.join(folder, 'said');
  fd = openSync(file, 'w');
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

test('ready is said once, the descriptor closed, and the variable gone', () => {
  const environment: NodeJS.ProcessEnv = { KILN_READY_FD: String(fd) };
  const readiness = Readiness.take(environment);
  expect(environment).toEqual({});
  readiness.ready();
  expect(() => fstatSync(fd)).toThrow('EBADF');
  readiness.failed(new Error('too late'));
  expect(readFileSync(file, 'utf8')).toBe('ready\n');
});

test('a failure is said with its hint', () => {
  const error = new KilnError('not-found', 'no guest image', { hint: 'run setup' });
  Readiness.take({ KILN_READY_FD: String(fd) }).failed(error);
  expect(readFileSync(file, 'utf8')).toBe('error: no guest image (run setup)\n');
});

test.each([undefined, '', '0', '-1', 'x', '3 '])('KILN_READY_FD=%j: nobody waits, nothing is written', (value) => {
  Readiness.take(value === undefined ? {} : { KILN_READY_FD: value }).ready();
  closeSync(fd);
});

test('a descriptor that is not open does not end kilnd', () => {
  closeSync(fd);
  Readiness.take({ KILN_READY_FD: '9999' }).ready();
});
