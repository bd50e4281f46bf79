import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync } from 'node:fs';
import type { Readable } from 'node:stream';
import { afterEach, beforeEach, expect, it } from 'vitest';
import { Reaper } from '../../../agent/reaper.ts';
import { ProcessHandle } from '../../../src/sys/pidfd.ts';
import { pipe2 } from '../../../src/sys/pipe.ts';
import { becomeChildSubreaper, type Exit, peekEndedChild } from '../../../src/sys/process.ts';

let reaper: Reaper;
beforeEach(() => {
  becomeChildSubreaper();
  reaper = new Reaper();
});
afterEach(() => reaper[Symbol.dispose]());

/** A process that is not Node's child: a shell prints its id and leaves it, so that it becomes ours. It waits for `go`. */
async function orphan(script: string): Promise<{ pid: number; go: () => void }> {
  // Node closes the stdin of a child that has ended, so the orphan needs a pipe of its own.
  const gate = pipe2();
  const shell = spawn('sh', ['-c', `exec 3<&0; sh -c 'read -r _; ${script}' <&3 >/dev/null 2>&1 & echo $!`], {
    stdio: [gate.read, 'pipe', 'inherit'],
  });
  closeSync(gate.read);
  reaper.leaveToNode(shell);
  const exit = once(shell, 'exit');
  const [line] = await once(shell.stdout as Readable, 'data');
  await exit;
  return { pid: Number(line), go: () => closeSync(gate.write) };
}

const ending = (pid: number) => new Promise<Exit>((resolve) => reaper.watch(pid, resolve));

it('reports the exit code of a process that it watches', async () => {
  const { pid, go } = await orphan('exit 42');
  const exit = ending(pid);
  go();
  expect(await exit).toEqual({ kind: 'exited', code: 42 });
});

it('reports the signal that ended a process', async () => {
  const { pid, go } = await orphan('exit 0');
  const exit = ending(pid);
  process.kill(pid, 'SIGKILL');
  expect(await exit).toEqual({ kind: 'signaled', signal: 9 });
  go();
});

it('keeps the status of a process that ends before it is watched, while held', async () => {
  const first = await orphan('exit 5');
  const second = await orphan('exit 6');
  const held = reaper.hold();
  const exit = ending(second.pid);
  first.go();
  second.go();
  // The second's end is seen although the first is not collected.
  expect(await exit).toEqual({ kind: 'exited', code: 6 });
  expect(await ending(first.pid)).toEqual({ kind: 'exited', code: 5 });
  held[Symbol.dispose]();
});

it('takes away orphans that nobody watches', async () => {
  const stray = await orphan('exit 1');
  const marker = await orphan('exit 2');
  const ended = ProcessHandle.open(stray.pid)?.ended;
  stray.go();
  // On a busy machine it may be late, and what comes now early.
  await ended;
  const exit = ending(marker.pid);
  marker.go();
  await exit;
  const last = await orphan('exit 3');
  const lastExit = ending(last.pid);
  last.go();
  await lastExit;
  expect(peekEndedChild()).toBeNull();
  expect(() => reaper.watch(stray.pid, () => {})).toThrow(/ECHILD/);
});

it("never takes the exit status of Node's own children", async () => {
  const codes = Array.from({ length: 20 }, async (_, i) => {
    const child = spawn('sh', ['-c', `(exit 9 &); exit ${i}`], { stdio: 'ignore' });
    reaper.leaveToNode(child);
    const [code] = await once(child, 'exit');
    return code;
  });
  expect(await Promise.all(codes)).toEqual(Array.from({ length: 20 }, (_, i) => i));
});

it('refuses to watch what is not a child', () => {
  expect(() => reaper.watch(1, () => {})).toThrow(/ECHILD/);
});
