/** What the tests of the fault matrix share: the commands of their containers, and how they note what a user saw. */
import { expect } from 'vitest';
import { cellName, type FaultRow, report } from './fault-matrix.ts';
import type { Scene } from './scene.ts';
import type { RunResult } from './spawn.ts';
import { signal } from './wait-for-end.ts';

export type Kind = 'SIGKILL' | 'SIGSTOP';
export const kinds = ['SIGKILL', 'SIGSTOP'] as const;

/** The longest that a user waits for the answer to whatever was under way, in seconds: emulated guests are slow. */
export const answerSeconds = 30;

/** What a user saw, as a row; fails where it took too long. */
export function note(row: Omit<FaultRow, 'seconds' | 'withinSeconds'> & { since: number; within?: number }): void {
  const { since, within = answerSeconds, ...rest } = row;
  const seconds = (performance.now() - since) / 1000;
  report({ rows: [{ ...rest, seconds: Math.ceil(seconds * 10) / 10, withinSeconds: within }] });
  expect(seconds, cellName(row)).toBeLessThan(within);
}

/** The last line of what ctr said, without the names that differ from run to run. */
export function lastLine(scene: Scene, said: string): string {
  const lines = said.trim().split('\n');
  const line = lines.find((text) => text.startsWith('ctr: ')) ?? lines.at(-1) ?? '';
  return line
    .replaceAll(scene.dir, '…')
    .replace(/^ctr: /, '')
    .replace(/\/[0-9a-f]{16,}\b/g, '/…')
    .replace(/\.\d+-\d+-\d+\.part/, '')
    .replace(/\bc-[0-9a-f]{4}-\d+\b/g, 'c-1')
    .slice(0, 400);
}

export const short = ['sh', '-c', 'echo ran; exit 5'];
export const idle = ['sh', '-c', 'echo up; while read -r line; do eval "$line"; done; exit 7'];
export const counting = [
  'sh',
  '-c',
  '(i=0; while :; do i=$((i+1)); echo $i; usleep 2000; done) & while read -r line; do eval "$line"; done; exit 7',
];
/** Ends with 5 while its output lies in a FIFO that nobody reads, so that its guest has to stay for a while. */
export const unread = ['sh', '-c', 'head -c 100000 /dev/zero; exit 5'];

export function goOn(pids: readonly number[]): void {
  for (const pid of pids) signal(pid, 'SIGCONT');
}

let execs = 0;

/** `ctr task exec`, to its end. */
export function execIn(scene: Scene, id: string, command: readonly string[]): Promise<RunResult> {
  execs += 1;
  const flags = ['--fifo-dir', scene.fifoDir, '--exec-id', `e${execs}`];
  return scene.containerd.ctr(['task', 'exec', ...flags, id, ...command]);
}
