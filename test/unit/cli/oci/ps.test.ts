import { describe, expect, it } from 'vitest';
import { psTable } from '../../../../src/cli/oci/ps-command.ts';

const now = new Date(2026, 10, 26, 12, 0, 0);
const process = (more: object) => ({
  ...{ pid: 100, ppid: 90, uid: 0, startedAt: new Date(2026, 10, 26, 11, 59, 0), cpuMs: 0, tty: '', command: 'sh' },
  ...more,
});

describe('the table of `kiln ps`', () => {
  it('has the columns of ps -ef, in the order of the pids', () => {
    const processes = [
      process({ pid: 1012, ppid: 100, uid: 1000, cpuMs: 45_000, tty: 'pts/0', command: 'yes no' }),
      process({ startedAt: new Date(2026, 10, 20), cpuMs: 3_723_000 }),
      process({ pid: 101, startedAt: new Date(2020, 1, 1), command: 'old' }),
    ];
    expect(psTable(processes, now)).toBe(
      [
        'UID   PID PPID  C STIME TTY       TIME CMD',
        '0     100   90  0 Nov20 ?     01:02:03 sh',
        '0     101   90  0  2020 ?     00:00:00 old',
        '1000 1012  100 75 11:59 pts/0 00:00:45 yes no',
        '',
      ].join('\n'),
    );
  });

  it('has a head alone where there is no process', () => {
    expect(psTable([], now)).toBe('UID PID PPID C STIME TTY TIME CMD\n');
  });

  it('shows nothing that a terminal would obey', () => {
    const table = psTable([process({ command: 'a\u001b[2Jb\r\nc\u202ed', tty: 'x\u0007' })], now);
    expect(table).toContain('x?');
    expect(table).toContain('a?[2Jb??c?d');
  });
});
