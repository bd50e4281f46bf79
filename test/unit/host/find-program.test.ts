import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { findProgram } from '../../../src/host/find-program.ts';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'kiln-p'));
});
afterEach(() => rmSync(folder, { recursive: true }));

test('a name is found in the first folder on PATH that has a program of it', () => {
  for (const [name, mode] of [
    ['a', 0o644],
    ['b', 0o755],
    ['c', 0o755],
  ] as const) {
    mkdirSync(path.join(folder, name));
    writeFileSync(path.join(folder, name, 'vmm'), '', { mode });
  }
  mkdirSync(path.join(folder, 'd', 'vmm'), { recursive: true });
  const search = ['d', 'none', 'a', 'b', 'c'].map((name) => path.join(folder, name)).join(':');
  expect(findProgram('vmm', search)).toBe(path.join(folder, 'b', 'vmm'));
  expect(findProgram('other', search)).toBeUndefined();
  // An empty part means the working directory to execvp(3); kilnd's is no place for programs.
  expect(findProgram('vmm', '::')).toBeUndefined();
});

test('a path is looked at as it is', () => {
  const file = path.join(folder, 'vmm');
  expect(findProgram(file)).toBeUndefined();
  writeFileSync(file, '', { mode: 0o755 });
  expect(findProgram(file)).toBe(file);
});
