import { expect, it } from 'vitest';
import { WaitableCell } from '../../../src/sandbox/waitable-cell.ts';

it('a cell gives its value to those who waited before and to those who come after', async () => {
  const cell = new WaitableCell<number>();
  const before = [cell.wait(), cell.wait()];
  expect(cell.peek()).toBeUndefined();
  expect(cell.set(7)).toBe(true);
  expect(cell.peek()).toBe(7);
  expect(await Promise.all([...before, cell.wait()])).toEqual([7, 7, 7]);
});

it('a cell is set once, also to undefined', async () => {
  const cell = new WaitableCell<number | undefined>();
  expect(cell.set(undefined)).toBe(true);
  expect(cell.set(2)).toBe(false);
  expect(await cell.wait()).toBeUndefined();
});

it('who gives up waiting is forgotten, and nobody else', async () => {
  const cell = new WaitableCell<string>();
  const patient = cell.wait();
  for (let round = 0; round < 1000; round++) {
    const abort = new AbortController();
    const impatient = cell.wait(abort.signal);
    abort.abort(new Error('gone'));
    await expect(impatient).rejects.toThrow('gone');
  }
  expect(cell.waiting).toBe(1);
  cell.set('done');
  expect(await patient).toBe('done');
  expect(cell.waiting).toBe(0);
});

it('a value that is there is given to who has given up, too; otherwise the reason', async () => {
  const cell = new WaitableCell<string>();
  await expect(cell.wait(AbortSignal.abort(new Error('early')))).rejects.toThrow('early');
  cell.set('done');
  expect(await cell.wait(AbortSignal.abort())).toBe('done');
});
