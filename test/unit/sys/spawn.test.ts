import { closeSync, openSync, readFileSync, readlinkSync } from 'node:fs';
import { expect, it, vi } from 'vitest';
import { ProcessHandle } from '../../../src/sys/pidfd.ts';
import { waitpid } from '../../../src/sys/process.ts';
import { posixSpawn, type Spawn } from '../../../src/sys/spawn.ts';

const nothing = { args: [], env: {}, workingDirectory: '/', fds: [null, null, null] };

/** What a program sees of itself a moment after it runs, which is when `posixSpawn` returns. */
const soon = (expected: () => void) => vi.waitFor(expected, { interval: 1 });

/** A process that waits until it is killed, at the end of the test. */
async function withSleep(options: Partial<Spawn>, look: (pid: number) => unknown): Promise<void> {
  const pid = posixSpawn({ ...nothing, path: '/bin/sleep', args: ['1000'], ...options });
  using handle = ProcessHandle.open(pid)!;
  try {
    await look(pid);
  } finally {
    handle.kill(9);
    await handle.ended;
    expect(waitpid(pid)).toEqual({ kind: 'signaled', signal: 9 });
  }
}

it('gives a program its descriptors, also those that lie where others are to go', async () => {
  const [zero, full] = [openSync('/dev/zero', 'r'), openSync('/dev/full', 'r')];
  const fds: (number | null)[] = Array.from({ length: Math.max(zero, full) + 1 }, () => null);
  [fds[zero], fds[full]] = [full, zero];
  await withSleep({ fds }, (pid) => {
    const place = (fd: number) => readlinkSync(`/proc/${pid}/fd/${fd}`);
    expect([0, zero, full].map(place)).toEqual(['/dev/null', '/dev/full', '/dev/zero']);
  });
  for (const fd of [zero, full]) closeSync(fd);
});

it('gives a program its descriptors from elsewhere, one also twice', async () => {
  const [zero, full] = [openSync('/dev/zero', 'r'), openSync('/dev/full', 'r')];
  await withSleep({ fds: [null, zero, zero, full] }, async (pid) => {
    const place = (fd: number) => readlinkSync(`/proc/${pid}/fd/${fd}`);
    expect([0, 1, 2, 3].map(place)).toEqual(['/dev/null', '/dev/zero', '/dev/zero', '/dev/full']);
    await soon(() => expect(() => place(zero)).toThrow('ENOENT'));
  });
  for (const fd of [zero, full]) closeSync(fd);
});

it('gives a program no descriptor beside its own', async () => {
  await withSleep({}, (pid) => soon(() => expect(() => readlinkSync(`/proc/${pid}/fd/3`)).toThrow('ENOENT')));
});

it('starts it in a session of its own, with this environment, in this directory', async () => {
  await withSleep({ env: { A: 'b', C: '' }, workingDirectory: '/usr' }, async (pid) => {
    await soon(() => expect(readFileSync(`/proc/${pid}/environ`, 'utf8')).toBe('A=b\0C=\0'));
    expect(readlinkSync(`/proc/${pid}/cwd`)).toBe('/usr');
    expect(
      readFileSync(`/proc/${pid}/stat`, 'utf8')
        .replace(/^.*\) /, '')
        .split(' ')
        .slice(2, 4),
    ).toEqual([String(pid), String(pid)]);
  });
});

it('starts it with no signal blocked or ignored, though Node ignores SIGPIPE', async () => {
  await withSleep({}, (pid) => {
    const status = readFileSync(`/proc/${pid}/status`, 'utf8');
    for (const set of ['SigBlk', 'SigIgn']) expect(status).toMatch(new RegExp(`^${set}:\\t0+$`, 'm'));
  });
});

it.each([
  ['a program that is not there', { path: '/nowhere' }, 'ENOENT'],
  ['a directory', { path: '/usr' }, 'EACCES'],
  ['a working directory that is not there', { path: '/bin/true', workingDirectory: '/nowhere' }, 'ENOENT'],
])('refuses %s, and leaves no process', (_name, options, code) => {
  expect(() => posixSpawn({ ...nothing, ...options })).toThrow(expect.objectContaining({ code }));
  expect(readFileSync(`/proc/self/task/${process.pid}/children`, 'utf8')).toBe('');
});
