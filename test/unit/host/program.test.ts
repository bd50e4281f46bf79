import {
  appendFileSync,
  chmodSync,
  mkdirSync,
  mkdtempSync,
  renameSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { fileIdentity, findProgram, programIdentity } from '../../../src/host/program.ts';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'kt-program-'));
});
afterEach(() => rmSync(folder, { recursive: true }));

function program(directory: string, name = 'tool'): string {
  mkdirSync(join(folder, directory), { recursive: true });
  const file = join(folder, directory, name);
  writeFileSync(file, '#!/bin/sh\n');
  chmodSync(file, 0o755);
  return file;
}

const pathOf = (...directories: string[]) => directories.map((name) => join(folder, name)).join(':');

describe('a program', () => {
  test('is found by its name in the first directory of PATH that has it', () => {
    const [first, second] = [program('one'), program('two')];
    expect(findProgram('tool', pathOf('none', 'one', 'two'))).toBe(first);
    expect(findProgram('tool', pathOf('two', 'one'))).toBe(second);
  });

  test('is found where it has moved to, and not where it was', () => {
    const file = program('two');
    const searchPath = pathOf('one', 'two', 'three');
    expect(findProgram('tool', searchPath)).toBe(file);
    const moved = program('three');
    rmSync(file);
    expect(findProgram('tool', searchPath)).toBe(moved);
    chmodSync(moved, 0o644);
    expect(findProgram('tool', searchPath)).toBeUndefined();
    chmodSync(moved, 0o755);
    expect(findProgram('tool', searchPath)).toBe(moved);
  });

  test('is found in an earlier directory of PATH, to which it came later, 10 s later at most', () => {
    const now = vi.spyOn(performance, 'now').mockReturnValue(1000);
    try {
      const later = program('two');
      const searchPath = pathOf('one', 'two');
      expect(findProgram('tool', searchPath)).toBe(later);
      const earlier = program('one');
      now.mockReturnValue(10_900);
      expect(findProgram('tool', searchPath)).toBe(later);
      now.mockReturnValue(11_000);
      expect(findProgram('tool', searchPath)).toBe(earlier);
    } finally {
      now.mockRestore();
    }
  });

  test('is found on the PATH of this process unless another is given', () => {
    expect(findProgram('sh')).toMatch(/^\/.*\/sh$/);
  });

  test('is found by its path, whatever PATH is', () => {
    const file = program('one');
    expect(findProgram(file, pathOf('two'))).toBe(file);
  });

  test('is not found where there is none', () => {
    expect(findProgram('tool', pathOf('one'))).toBeUndefined();
    expect(findProgram(join(folder, 'one/tool'))).toBeUndefined();
  });

  test('is not looked for in the working directory, which an empty part of PATH means to execvp(3)', () => {
    expect(findProgram('tool', '::')).toBeUndefined();
  });

  test('is neither a directory nor a file that may not be executed', () => {
    mkdirSync(join(folder, 'directory/tool'), { recursive: true });
    chmodSync(program('plain'), 0o644);
    for (const directory of ['directory', 'plain']) {
      expect(findProgram(join(folder, directory, 'tool'))).toBeUndefined();
    }
    const file = program('one');
    expect(findProgram('tool', pathOf('directory', 'plain', 'one'))).toBe(file);
  });
});

describe('the identity of a program', () => {
  test('is that of its file', () => {
    const file = program('one');
    expect(programIdentity(file)).toBe(fileIdentity(file));
  });

  test('is asked for in vain where there is none', () => {
    expect(() => programIdentity('no-such-program')).toThrow(
      expect.objectContaining({ code: 'failed-precondition', message: 'there is no program no-such-program' }),
    );
  });
});

describe('the identity of a file', () => {
  test('stays as long as the file does', () => {
    const file = program('one');
    expect(fileIdentity(file)).toBe(fileIdentity(file));
    expect(fileIdentity(file)).toContain(file);
  });

  test.each([
    ['grows', (file: string) => appendFileSync(file, 'more')],
    ['is written anew', (file: string) => utimesSync(file, 1, 1)],
    [
      'is replaced by one of the same length and time',
      (file: string) => {
        const other = program('other');
        utimesSync(other, 1, 2);
        renameSync(other, file);
      },
    ],
  ])('is another one when it %s', (_how, change) => {
    const file = program('one');
    utimesSync(file, 1, 2);
    const before = fileIdentity(file);
    change(file);
    expect(fileIdentity(file)).not.toBe(before);
  });

  test('is asked for in vain where there is none', () => {
    expect(() => fileIdentity(join(folder, 'none'))).toThrow(/ENOENT.*none/);
  });
});
