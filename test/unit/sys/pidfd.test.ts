import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, readdirSync, readlinkSync } from 'node:fs';
import { release } from 'node:os';
import { expect, it } from 'vitest';
import { exitStatusOf, ProcessHandle, pidfdOpen } from '../../../src/sys/pidfd.ts';

async function started(...command: [string, ...string[]]) {
  const [program, ...args] = command;
  const child = spawn(program, args, { stdio: ['pipe', 'ignore', 'ignore'] });
  const exit = once(child, 'exit') as Promise<[number | null, NodeJS.Signals | null]>;
  await once(child, 'spawn');
  return { child, exit, pid: child.pid! };
}

const openPidfds = () =>
  readdirSync('/proc/self/fd').filter((fd) => {
    try {
      return readlinkSync(`/proc/self/fd/${fd}`).includes('pidfd');
    } catch {
      return false;
    }
  });

it('tells the end of a process, and closes itself with it', async () => {
  const before = openPidfds().length;
  const { child, exit, pid } = await started('cat');
  using handle = ProcessHandle.open(pid)!;
  let ended = false;
  void handle.ended.then(() => {
    ended = true;
  });
  expect(openPidfds().length).toBe(before + 1);
  await new Promise(setImmediate);
  expect(ended).toBe(false);
  child.stdin.end();
  await handle.ended;
  expect((await exit)[0]).toBe(0);
  expect(openPidfds().length).toBe(before);
});

it('sends a signal to the process, and none to whoever has its pid afterwards', async () => {
  const { exit, pid } = await started('sleep', '1000');
  using handle = ProcessHandle.open(pid)!;
  handle.kill(15);
  await handle.ended;
  expect((await exit)[1]).toBe('SIGTERM');
  handle.kill(9);
  expect(ProcessHandle.open(pid)).toBeUndefined();
});

it('that is let go of does nothing to the process, and tells nothing any more', async () => {
  const before = openPidfds().length;
  const { child, exit, pid } = await started('cat');
  const handle = ProcessHandle.open(pid)!;
  handle[Symbol.dispose]();
  handle[Symbol.dispose]();
  expect(openPidfds().length).toBe(before);
  handle.kill(9);
  child.stdin.end();
  expect(await exit).toEqual([0, null]);
  const silence = new Promise((resolve) => setImmediate(resolve, 'silent'));
  expect(await Promise.race([handle.ended.then(() => 'told'), silence])).toBe('silent');
});

it('of a pid that cannot be one is an error with its number', () => {
  expect(() => ProcessHandle.open(-1)).toThrow(expect.objectContaining({ code: 'EINVAL', syscall: 'pidfd_open' }));
});

it('tells how a process ended, where the kernel does', async () => {
  const { child, exit, pid } = await started('sh', '-c', 'read -r _; exit 7');
  const pidfd = pidfdOpen(pid)!;
  try {
    expect(['unreaped', undefined]).toContain(exitStatusOf(pidfd));
    child.stdin.end();
    await exit;
    const known = supportsExitStatus() ? { kind: 'exited', code: 7 } : undefined;
    expect(exitStatusOf(pidfd)).toEqual(known);
  } finally {
    closeSync(pidfd);
  }
});

/** Linux 6.15, PIDFD_INFO_EXIT. */
function supportsExitStatus(): boolean {
  const [major = 0, minor = 0] = release().split('.').map(Number);
  return major > 6 || (major === 6 && minor >= 15);
}
