import { expect, test } from 'vitest';
import { GuestConsole } from '../../../src/vmm/qemu/console.ts';
import type { QmpClient } from '../../../src/vmm/qemu/qmp.ts';

/** QEMU's ring buffer as it is: what has been read is not there any more. */
function consoleOf(...news: (string | Error)[]): GuestConsole {
  const execute = async () => {
    const next = news.shift() ?? '';
    if (next instanceof Error) throw next;
    return next;
  };
  return new GuestConsole({ execute } as unknown as QmpClient);
}

test('the console’s tail is the same for each reader, although QEMU gives its bytes away once', async () => {
  const guest = consoleOf('one\r\n', '', 'two\r\n');
  expect(await guest.tail(100)).toBe('one');
  expect(await guest.tail(100)).toBe('one');
  expect(await guest.tail(100)).toBe('one\ntwo');
  expect(await guest.tail(4)).toBe('two');
});

test('the console’s tail is what was read before, once QEMU does not answer any more', async () => {
  const guest = consoleOf('last words', new Error('gone'));
  await guest.tail(1);
  expect(await guest.tail(100)).toBe('last words');
});

test('the console’s tail has no characters that could do something to the terminal it is shown on', async () => {
  const guest = consoleOf('\u001b[1;31mred\u001b[0m\u0007 \u001b]0;title\u0007tab\there\u0000\u009b2J\u202eend\r');
  expect(await guest.tail(100)).toBe('red ]0;titletab\there2Jend');
});

test('the console keeps no more than QEMU’s buffer has', async () => {
  const guest = consoleOf('x'.repeat(65536), 'y'.repeat(10));
  await guest.tail(1);
  const all = await guest.tail(1 << 20);
  expect(all).toHaveLength(65536);
  expect(all.endsWith('xyyyyyyyyyy')).toBe(true);
});
