import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { expect, test } from 'vitest';
import { identityOf, isAlive, isEnding, waitStatusOf } from '../../../src/host/process-identity.ts';

test('a process is known again as long as it lives, and not after', async () => {
  const child = spawn('cat', { stdio: ['pipe', 'ignore', 'ignore'] });
  await once(child, 'spawn');
  const identity = identityOf(child.pid!);
  expect(identity?.pid).toBe(child.pid);
  expect(isAlive(identity!)).toBe(true);
  expect(isAlive({ ...identity!, startTime: '1' })).toBe(false);
  expect(isAlive({ ...identity!, bootId: 'x' })).toBe(false);
  expect(isEnding(child.pid!)).toBe(false);
  expect(waitStatusOf(identity!)).toBeUndefined();
  child.stdin?.end();
  await once(child, 'exit');
  expect(isAlive(identity!)).toBe(false);
  expect(identityOf(child.pid!)).toBeUndefined();
  expect(isEnding(child.pid!)).toBe(true);
});

test('a process that has ended, and was not waited for, does not live, and tells how it ended', () => {
  const child = spawn('sleep', ['1000'], { stdio: 'ignore' });
  // Without a turn of the event loop nobody waits for it.
  const pid = child.pid!;
  const identity = identityOf(pid)!;
  process.kill(pid, 'SIGKILL');
  while (identityOf(pid) !== undefined) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1);
  expect(isEnding(pid)).toBe(true);
  expect(isAlive(identity)).toBe(false);
  expect(waitStatusOf(identity)).toBe(9);
  expect(waitStatusOf({ ...identity, startTime: '1' })).toBeUndefined();
});
