import { expect, it } from 'vitest';
import { Turns } from '../../../src/host/turns.ts';

it('steps of one key run one after the other, in the order in which they were asked for', async () => {
  const turns = new Turns();
  const events: string[] = [];
  const gates = [Promise.withResolvers<void>(), Promise.withResolvers<void>(), Promise.withResolvers<void>()];
  const steps = gates.map((gate, index) =>
    turns.take('a', async () => {
      events.push(`begin ${index}`);
      await gate.promise;
      events.push(`end ${index}`);
      return index;
    }),
  );
  for (const gate of gates.toReversed()) gate.resolve();
  expect(await Promise.all(steps)).toEqual([0, 1, 2]);
  expect(events).toEqual(['begin 0', 'end 0', 'begin 1', 'end 1', 'begin 2', 'end 2']);
});

it('steps of different keys run side by side', async () => {
  const turns = new Turns();
  const first = Promise.withResolvers<string>();
  const second = turns.take('b', async () => {
    first.resolve('from b');
    return 'b';
  });
  expect(await turns.take('a', () => first.promise)).toBe('from b');
  expect(await second).toBe('b');
});

it("a step that fails is its caller's error, and the next one goes on", async () => {
  const turns = new Turns();
  const failing = turns.take('a', async () => {
    throw new Error('no');
  });
  const next = turns.take('a', async () => 'yes');
  await expect(failing).rejects.toThrow('no');
  expect(await next).toBe('yes');
});

it('nothing is kept of keys that are done with', async () => {
  const turns = new Turns();
  await Promise.all(Array.from({ length: 100 }, (_, key) => turns.take(`k${key % 10}`, async () => {})));
  expect(turns.size).toBe(0);
});
