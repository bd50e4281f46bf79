import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, it, onTestFinished } from 'vitest';
import { replaceFile } from '../../../src/host/replace-file.ts';

function folder(): string {
  const path = mkdtempSync(join(tmpdir(), 'kt-replace-'));
  onTestFinished(() => rmSync(path, { recursive: true }));
  return path;
}

it('a file gets a new content', () => {
  const file = join(folder(), 'record');
  replaceFile(file, 'one');
  replaceFile(file, 'two');
  expect(readFileSync(file, 'utf8')).toBe('two');
});

it('a content that cannot be put in place leaves nothing', () => {
  const path = folder();
  mkdirSync(join(path, 'record'));
  expect(() => replaceFile(join(path, 'record'), 'one')).toThrow('EISDIR');
  expect(readdirSync(path)).toEqual(['record']);
});

it.skipIf(process.getuid?.() !== 0)('a full disk keeps the old content, and no half of the new one', () => {
  const path = folder();
  execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=64k', 'kt-small', path]);
  try {
    const file = join(path, 'record');
    replaceFile(file, 'old');
    expect(() => replaceFile(file, 'x'.repeat(100_000))).toThrow('ENOSPC');
    expect(readdirSync(path)).toEqual(['record']);
    expect(readFileSync(file, 'utf8')).toBe('old');
  } finally {
    execFileSync('umount', [path]);
  }
});
