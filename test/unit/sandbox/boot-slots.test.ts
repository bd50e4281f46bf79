import { expect, it } from 'vitest';
import { BootSlots } from '../../../src/sandbox/boot-slots.ts';

const never = new AbortController().signal;
const turn = () => new Promise((resolve) => setImmediate(resolve));

it('as many as there are slots boot at once, and the others one after the other, in order', async () => {
  const slots = new BootSlots(2);
  const [first, second] = [await slots.take(never), await slots.take(never)];
  const order: string[] = [];
  const third = slots.take(never).then((slot) => {
    order.push('third');
    return slot;
  });
  const fourth = slots.take(never).then((slot) => {
    order.push('fourth');
    return slot;
  });
  await turn();
  expect(order).toEqual([]);
  second[Symbol.dispose]();
  await turn();
  expect(order).toEqual(['third']);
  first[Symbol.dispose]();
  await turn();
  expect(order).toEqual(['third', 'fourth']);
  for (const slot of await Promise.all([third, fourth])) slot[Symbol.dispose]();
  // Both are free again.
  await slots.take(never);
  await slots.take(never);
});

it('who gives up waiting is passed over, and takes no slot with it', async () => {
  const slots = new BootSlots(1);
  const held = await slots.take(never);
  const giveUp = new AbortController();
  const impatient = slots.take(giveUp.signal);
  const patient = slots.take(never);
  giveUp.abort(new Error('enough'));
  await expect(impatient).rejects.toThrow('enough');
  held[Symbol.dispose]();
  (await patient)[Symbol.dispose]();
  await slots.take(never);
  await expect(slots.take(giveUp.signal)).rejects.toThrow('enough');
});
