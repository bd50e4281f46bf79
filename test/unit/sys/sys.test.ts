import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, mkdtempSync, openSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { adjtime, CLOCK_BOOTTIME, CLOCK_REALTIME, clockGettime } from '../../../src/sys/clock.ts';
import { SysError } from '../../../src/sys/error.ts';
import { mkfifo } from '../../../src/sys/fifo.ts';
import { flock, funlock } from '../../../src/sys/lock.ts';
import { mount, umount2, umount2Async } from '../../../src/sys/mount.ts';
import { pipe2, socketFromFd } from '../../../src/sys/pipe.ts';
import { peekEndedChild, waitpid } from '../../../src/sys/process.ts';
import { syncfs } from '../../../src/sys/sync.ts';
import { parseSockaddrVm, sockaddrVm } from '../../../src/sys/vsock.ts';

it('names errno, call and path when a call fails', () => {
  try {
    umount2('/no/such/place', 0);
    expect.unreachable();
  } catch (error) {
    // Without CAP_SYS_ADMIN the kernel refuses before it looks at the path.
    expect(error).toBeInstanceOf(SysError);
    expect(error).toMatchObject({ syscall: 'umount2', path: '/no/such/place' });
    expect(['ENOENT', 'EPERM']).toContain((error as SysError).code);
  }
  expect(() => mount('none', '/no/such/place', 'tmpfs', 0, null)).toThrow(/mount '\/no\/such\/place'/);
});

it('carries errno over from a call on the thread pool', async () => {
  await expect(syncfs(99_999)).rejects.toMatchObject({ code: 'EBADF', syscall: 'syncfs' });
  await expect(umount2Async('/no/such/place', 0)).rejects.toMatchObject({ syscall: 'umount2' });
});

it('has a text for an errno that nobody knows', () => {
  expect(new SysError(2000, 'open').message).toBe('E2000: system error, open');
});

it('gives a lock to one open file at a time', () => {
  const directory = mkdtempSync(join(tmpdir(), 'kiln-lock-'));
  const path = join(directory, 'lock');
  const first = openSync(path, 'w');
  const second = openSync(path, 'w');
  try {
    expect(flock(first)).toBe(true);
    expect(flock(second)).toBe(false);
    funlock(first);
    expect(flock(second)).toBe(true);
  } finally {
    closeSync(first);
    closeSync(second);
    rmSync(directory, { recursive: true });
  }
});

it('makes a FIFO, once', () => {
  const directory = mkdtempSync(join(tmpdir(), 'kiln-fifo-'));
  const path = join(directory, 'fifo');
  try {
    mkfifo(path, 0o600);
    expect(statSync(path).isFIFO()).toBe(true);
    expect(statSync(path).mode & 0o777).toBe(0o600);
    expect(() => mkfifo(path, 0o600)).toThrow(expect.objectContaining({ code: 'EEXIST', syscall: 'mkfifo', path }));
  } finally {
    rmSync(directory, { recursive: true });
  }
});

it('moves bytes through a pipe and ends when the writer closes it', async () => {
  const pipe = pipe2();
  const writer = socketFromFd(pipe.write, 'write');
  const reader = socketFromFd(pipe.read, 'read');
  const sent = Buffer.alloc(1 << 20, 'kiln');
  writer.end(sent);
  const received: Buffer[] = [];
  for await (const chunk of reader) received.push(chunk as Buffer);
  expect(Buffer.concat(received).equals(sent)).toBe(true);
});

it('reports that the reader of a pipe has gone as EPIPE', async () => {
  const pipe = pipe2();
  closeSync(pipe.read);
  const writer = socketFromFd(pipe.write, 'write');
  writer.write('lost');
  const [error] = await once(writer, 'error');
  expect(error).toMatchObject({ code: 'EPIPE' });
});

it('sees a running child as running, and refuses one that is not ours', async () => {
  const child = spawn('cat', { stdio: ['pipe', 'ignore', 'ignore'] });
  await once(child, 'spawn');
  expect(waitpid(child.pid ?? -1)).toBeNull();
  expect(peekEndedChild()).toBeNull();
  child.stdin.end();
  await once(child, 'exit');
  expect(() => waitpid(child.pid ?? -1)).toThrow(/ECHILD/);
});

it('refuses to move a clock gradually by hours', () => {
  // At most some 2^31 microseconds.
  expect(() => adjtime(10_000n * 1_000_000_000n)).toThrow(/^EINVAL: .*adjtime/);
});

it('reads the clocks in nanoseconds', () => {
  const before = BigInt(Date.now()) * 1_000_000n;
  const now = clockGettime(CLOCK_REALTIME);
  expect(now - before).toBeLessThan(1_000_000_000n);
  expect(now).toBeGreaterThanOrEqual(before);
  expect(clockGettime(CLOCK_BOOTTIME)).toBeLessThanOrEqual(clockGettime(CLOCK_BOOTTIME));
});

it('lays a vsock address out as the kernel reads it', () => {
  expect(Buffer.from(sockaddrVm(2, 1024)).toString('hex')).toBe('28000000000400000200000000000000');
  expect(parseSockaddrVm(sockaddrVm(0xfffffffe, 4_000_000_000))).toEqual({ cid: 0xfffffffe, port: 4_000_000_000 });
});
