import { expect, it } from 'vitest';
import { Undo } from '../../../agent/undo.ts';

/** Two steps that a guest which ends needs, and two within it; what is done of them. */
async function undone(guestEnds: boolean, move = false): Promise<string[]> {
  const done: string[] = [];
  let asked = !guestEnds;
  const undo = new Undo(() => asked);
  undo.defer(() => void done.push('flush one'));
  undo.deferWithin(async () => void done.push('unmount one'));
  undo.use({ [Symbol.dispose]: () => done.push('close') });
  undo.deferWithin(() => void done.push('unmount two'));
  undo.defer(async () => void done.push('flush two'));
  asked = guestEnds;
  if (!move) await undo[Symbol.asyncDispose]();
  else {
    const moved = undo.move();
    await undo[Symbol.asyncDispose]();
    expect(done).toEqual([]);
    await moved[Symbol.asyncDispose]();
  }
  return done;
}

it.each([false, true])('takes everything back in reverse where the guest goes on (moved: %s)', async (move) => {
  expect(await undone(false, move)).toEqual(['flush two', 'unmount two', 'close', 'unmount one', 'flush one']);
});

it.each([false, true])('does only what the host needs where the guest ends (moved: %s)', async (move) => {
  expect(await undone(true, move)).toEqual(['flush two', 'close', 'flush one']);
});

it('goes on after a step that fails, and tells it', async () => {
  const done: string[] = [];
  const undo = new Undo(() => false);
  undo.defer(() => void done.push('flush'));
  undo.deferWithin(() => Promise.reject(new Error('busy')));
  await expect(undo[Symbol.asyncDispose]()).rejects.toThrow('busy');
  expect(done).toEqual(['flush']);
});
