import {
  closeSync,
  cpSync,
  existsSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  rmSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { TemplateParts } from '../../../src/template/key.ts';
import { digestOf, readTemplateRecord, recordName, sizeOf, writeTemplateRecord } from '../../../src/template/record.ts';

const mib = 2 ** 20;
const never = new AbortController().signal;
let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'kiln-template-'));
});
afterEach(() => rmSync(directory, { recursive: true }));

const path = (name: string) => join(directory, name);
const digest = (...names: string[]) => digestOf(directory, names, never);

/** A file of 8 MiB that is a hole but for some bytes at 3 MiB and a half. */
function sparse(name: string, text = 'data'): void {
  const fd = openSync(path(name), 'w');
  ftruncateSync(fd, 8 * mib);
  writeSync(fd, text, 3.5 * mib);
  closeSync(fd);
}

describe("a template's digest", () => {
  test('is the same for the same content, however the filesystem keeps its zeroes', async () => {
    sparse('memory');
    const before = await digest('memory');
    const whole = Buffer.alloc(8 * mib);
    whole.write('data', 3.5 * mib);
    rmSync(path('memory'));
    writeFileSync(path('memory'), whole);
    expect(await digest('memory')).toBe(before);
    expect(sizeOf(directory, ['memory'])).toBeGreaterThanOrEqual(8 * mib);
  });

  test.each<[string, () => void]>([
    ['a byte is another', () => sparse('memory', 'date')],
    ['a zero is none any more', () => writeAt('memory', 'x', 7 * mib)],
    ['the file is shorter, by zeroes', () => truncateSync(path('memory'), 7 * mib)],
    ['the file is longer, by zeroes', () => truncateSync(path('memory'), 9 * mib)],
    ['what it holds has moved', () => moveData()],
  ])('is another one when %s', async (_what, change) => {
    sparse('memory');
    const before = await digest('memory');
    change();
    expect(await digest('memory')).not.toBe(before);
  });

  test('is of all files, by their names', async () => {
    sparse('memory');
    writeFileSync(path('state'), 'state');
    const both = await digest('memory', 'state');
    expect(await digest('memory')).not.toBe(both);
    cpSync(path('state'), path('other'));
    expect(await digest('memory', 'other')).not.toBe(both);
  });

  test('of a file that is not there cannot be had, and the work can be given up', async () => {
    await expect(digest('memory')).rejects.toMatchObject({ code: 'ENOENT' });
    sparse('memory');
    const reason = new Error('enough');
    await expect(digestOf(directory, ['memory'], AbortSignal.abort(reason))).rejects.toBe(reason);
  });
});

function writeAt(name: string, text: string, at: number): void {
  const fd = openSync(path(name), 'r+');
  writeSync(fd, text, at);
  closeSync(fd);
}

function moveData(): void {
  rmSync(path('memory'));
  const fd = openSync(path('memory'), 'w');
  ftruncateSync(fd, 8 * mib);
  writeSync(fd, 'data', 4.5 * mib);
  closeSync(fd);
}

describe("a template's record", () => {
  const record = {
    version: 1,
    parts: { format: 1 } as TemplateParts,
    madeAt: '2026-01-02T03:04:05.678Z',
    sha256: 'ab'.repeat(32),
  } as const;

  test('is read as it was written', () => {
    writeTemplateRecord(directory, record);
    expect(readTemplateRecord(directory)).toEqual(record);
  });

  test.each([
    ['no JSON', '{'],
    ['of another version', JSON.stringify({ ...record, version: 2 })],
    ['without a digest', JSON.stringify({ ...record, sha256: undefined })],
  ])('that is %s is none', (_what, text) => {
    writeFileSync(path(recordName), text);
    expect(() => readTemplateRecord(directory)).toThrow(
      expect.objectContaining({
        code: 'invalid-argument',
        message: `${path(recordName)} is not the record of a template`,
      }),
    );
  });

  test('that is missing is not found', () => {
    expect(existsSync(path(recordName))).toBe(false);
    expect(() => readTemplateRecord(directory)).toThrow(expect.objectContaining({ code: 'not-found' }));
  });
});
