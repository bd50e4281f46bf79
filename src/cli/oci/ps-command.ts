/**
 * `ps`: the processes of a container. runc calls ps(1) and shows its lines for the container's pids; here the guest tells what
 * these lines have. Its pids are of no use on the host: with `--format json`, which is for callers, those of the host are
 * told, one for the container and one for each exec.
 */
import { readdirSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { type Command, Option } from 'commander';
import { KilnError } from '../../errors.ts';
import type { ProcessDetails } from '../../sandbox/container.ts';
import { runs } from './process.ts';
import type { OciRuntime } from './runtime.ts';

export function addPs(program: Command, runtime: () => OciRuntime): void {
  program
    .command('ps <id> [options...]')
    .description('list the processes of a container')
    .addOption(
      new Option('-f, --format <format>', 'the guest’s "table", or the pids on the host as "json"').default('table'),
    )
    .passThroughOptions()
    .action(async (id: string, options: string[], { format }: { format: string }) => {
      const found = runtime();
      const state = found.states.read(id);
      if (format !== 'table' && format !== 'json') {
        throw new KilnError('invalid-argument', `invalid format option: ${format}; it is table or json`);
      }
      if ((await found.status(state)) === 'stopped') {
        process.stdout.write(format === 'json' ? 'null' : psTable([], new Date()));
        return;
      }
      if (format === 'json') {
        process.stdout.write(JSON.stringify([state.pid, ...execPids(found.states.directory(id))]));
        return;
      }
      if (options.some((option) => option !== '-ef' && option !== 'ef')) {
        throw new KilnError('unimplemented', `ps ${options.join(' ')}: the table is that of ps -ef, and no other`);
      }
      const processes = await found.withTask(id, (task, kilndId) => task.processes(kilndId));
      process.stdout.write(psTable(processes, new Date()));
    });
}

/** Of the processes on the host that stand for execs that run. */
function execPids(directory: string): number[] {
  return readdirSync(directory).flatMap((name) => {
    if (!name.startsWith('exec-')) return [];
    try {
      const pid = Number(readFileSync(path.join(directory, name, 'pid'), 'utf8'));
      return runs(pid) ? [pid] : [];
    } catch {
      // It is just being started, or has just ended.
      return [];
    }
  });
}

const columns = ['UID', 'PID', 'PPID', 'C', 'STIME', 'TTY', 'TIME', 'CMD'] as const;
const dayMs = 86_400_000;
const months = ['Jan', 'Feb', 'Mar', 'Apr', 'May', 'Jun', 'Jul', 'Aug', 'Sep', 'Oct', 'Nov', 'Dec'];

/** The columns of `ps -ef`. Users are told by number, as only the container knows their names. */
export function psTable(processes: readonly ProcessDetails[], now: Date): string {
  const rows = [...processes]
    .sort((one, other) => one.pid - other.pid)
    .map(({ uid, pid, ppid, startedAt, cpuMs, tty, command }) => {
      const aliveMs = Math.max(now.getTime() - startedAt.getTime(), 1);
      const percent = Math.min(Math.floor((100 * cpuMs) / aliveMs), 99);
      return [
        String(uid),
        String(pid),
        String(ppid),
        String(percent),
        startOf(startedAt, now),
        printable(tty) || '?',
        timeOf(cpuMs),
        printable(command),
      ];
    });
  const lines = [[...columns] as string[], ...rows];
  const widths = columns.map((_, column) => Math.max(...lines.map((line) => line[column]?.length ?? 0)));
  const isText = (column: number) => [0, 5, 7].includes(column);
  const format = (cell: string, column: number) => {
    if (column === columns.length - 1) return cell;
    const width = widths[column] ?? 0;
    return isText(column) ? cell.padEnd(width) : cell.padStart(width);
  };
  return lines.map((line) => `${line.map(format).join(' ')}\n`).join('');
}

/** The hour of today, else the day, else the year. */
function startOf(at: Date, now: Date): string {
  const ageMs = now.getTime() - at.getTime();
  if (ageMs < dayMs) return `${two(at.getHours())}:${two(at.getMinutes())}`;
  if (ageMs < 365 * dayMs) return `${months[at.getMonth()]}${two(at.getDate())}`;
  return String(at.getFullYear());
}

function timeOf(ms: number): string {
  const seconds = Math.floor(ms / 1000);
  return `${two(Math.floor(seconds / 3600))}:${two(Math.floor(seconds / 60) % 60)}:${two(seconds % 60)}`;
}

function two(number: number): string {
  return String(number).padStart(2, '0');
}

/** The guest may call its processes what it likes; a terminal must not obey it. */
function printable(text: string): string {
  return text.replaceAll(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, '?');
}
