import { closeSync, ftruncateSync, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, it, onTestFinished } from 'vitest';
import { type Extent, nextExtent } from '../../../src/sys/sparse.ts';

/** More than a block of any filesystem, so that what lies between is a hole. */
const unit = 1 << 20;

/** A file of so many units, with data in some of them. */
function sparseFile(units: number, withData: readonly number[]): number {
  const folder = mkdtempSync(join(tmpdir(), 'kt-sparse-'));
  const fd = openSync(join(folder, 'file'), 'w+');
  onTestFinished(() => {
    closeSync(fd);
    rmSync(folder, { recursive: true });
  });
  ftruncateSync(fd, units * unit);
  for (const at of withData) writeSync(fd, Buffer.alloc(unit, 'x'), 0, unit, at * unit);
  return fd;
}

/** All pieces, in units. */
function extentsOf(fd: number): Extent[] {
  const found: Extent[] = [];
  for (let from = 0; ; ) {
    const extent = nextExtent(fd, from);
    if (extent === undefined) return found;
    found.push({ start: extent.start / unit, end: extent.end / unit });
    from = extent.end;
  }
}

it('finds the data before, between and behind holes', () => {
  expect(extentsOf(sparseFile(8, [1, 2, 5]))).toEqual([
    { start: 1, end: 3 },
    { start: 5, end: 6 },
  ]);
  expect(extentsOf(sparseFile(4, [0, 3]))).toEqual([
    { start: 0, end: 1 },
    { start: 3, end: 4 },
  ]);
});

it('begins where it is asked to, in the middle of data, too', () => {
  const fd = sparseFile(4, [1, 2]);
  expect(nextExtent(fd, unit + 4096)).toEqual({ start: unit + 4096, end: 3 * unit });
  expect(nextExtent(fd, 3 * unit)).toBeUndefined();
});

it('finds nothing in a file that is one hole, or empty, nor behind the end', () => {
  expect(nextExtent(sparseFile(4, []), 0)).toBeUndefined();
  expect(nextExtent(sparseFile(0, []), 0)).toBeUndefined();
  expect(nextExtent(sparseFile(1, [0]), 2 * unit)).toBeUndefined();
});

it('counts beyond 4 GiB', () => {
  const far = 5 * 1024;
  expect(extentsOf(sparseFile(far + 2, [far]))).toEqual([{ start: far, end: far + 1 }]);
});

it('fails with the system’s reason for what is no open file', () => {
  expect(() => nextExtent(99_999, 0)).toThrow(expect.objectContaining({ code: 'EBADF', syscall: 'lseek' }));
});
