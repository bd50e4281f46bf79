import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { describe, expect, it } from 'vitest';
import { bootTimeMs, parseProcess, processDetails } from '../../../agent/process-details.ts';

const fields = (...values: (string | number)[]) => values.join(' ');
/** From the fourth field: ppid, pgrp, session, tty_nr, tpgid, flags, four faults, utime, stime, …, starttime. */
const stat = (name: string, tty = 0) =>
  `12 (${name}) S ${fields(3, 12, 12, tty, -1, 0, 0, 0, 0, 0, 150, 51, 0, 0, 20, 0, 1, 0, 4567, 1000, 5)}\n`;
const status = 'Name:\tx\nUid:\t1\t1234\t1\t1\nGid:\t0\t0\t0\t0\n';
const parse = (more: object = {}) =>
  parseProcess(12, { stat: stat('sh'), status, cmdline: 'sh\0-c\0a b\0', bootTimeMs: 1000, ...more });

describe('details of a process', () => {
  it('are read from its files', () => {
    expect(parse()).toEqual({
      ...{ pid: 12, ppid: 3, uid: 1234, startedMs: 46_670n, cpuMs: 2010n, tty: '', command: 'sh -c a b' },
    });
  });

  it('stand where a name tries to be more fields', () => {
    expect(parse({ stat: stat(') S 1 (x y'), cmdline: '' })).toMatchObject({ ppid: 3, command: '[) S 1 (x y]' });
  });

  it.each([
    [136 << 8, 'pts/0'],
    [(136 << 8) | 7, 'pts/7'],
    [(137 << 8) | 1, 'pts/257'],
    [(4 << 8) | 64, '4:64'],
  ])('have the terminal %i as %s', (number, name) => {
    expect(parse({ stat: stat('sh', number) }).tty).toBe(name);
  });

  it('know when the guest was booted', () => {
    expect(bootTimeMs('cpu 1 2\nbtime 1700000000\nprocesses 3\n')).toBe(1_700_000_000_000);
  });

  it('are those of a real process, and none when it has ended', async () => {
    const before = Date.now();
    const child = spawn('sleep', ['1000']);
    await once(child, 'spawn');
    const details = processDetails(child.pid!);
    expect(details).toMatchObject({
      pid: child.pid,
      ppid: process.pid,
      uid: process.getuid?.(),
      command: 'sleep 1000',
    });
    // Ticks, and a boot time in whole seconds.
    expect(Math.abs(Number(details?.startedMs) - before)).toBeLessThan(5000);
    child.kill('SIGKILL');
    await once(child, 'exit');
    expect(processDetails(child.pid!)).toBeUndefined();
  });
});
