/**
 * kilnd's log: one JSON object a line in `<state>/kilnd.log`, made by pino.
 *
 * A container's environment holds passwords as often as not. So members called `env` are removed from whatever is
 * logged; apart from that nothing is hidden.
 */
import { join } from 'node:path';
import { type Logger, pino } from 'pino';
import { LogFile } from './log-file.ts';
import type { TaskLog, TaskLogLevel } from './task-log.ts';

export type { Logger } from 'pino';

export interface LoggerOptions {
  /** The folder that gets `kilnd.log`; it must exist. */
  readonly stateDir: string;
  readonly level: 'trace' | 'debug' | 'info' | 'warn' | 'error';
}

export interface DaemonLog extends Disposable {
  readonly logger: Logger;
  /**
   * A logger whose lines go to the same file and, from `level` on, to containerd through the task's own log. At level
   * debug these are logged even where the file does not take them.
   */
  forTask(taskLog: TaskLog, level: TaskLogLevel): Logger;
  readonly path: string;
  /** Opens the file anew, for after a rotation. */
  reopen(): void;
}

/** @throws the error of open(2) when the file cannot be opened at all; later failures only drop lines. */
export function createLogger({ stateDir, level }: LoggerOptions): DaemonLog {
  const path = join(stateDir, 'kilnd.log');
  const file = new LogFile(path, (dropped) => {
    return JSON.stringify({
      level: 'warn',
      time: new Date().toISOString(),
      pid: process.pid,
      msg: 'lost lines',
      dropped,
    });
  });
  return {
    logger: loggerTo(file, level),
    forTask: (taskLog, taskLevel) => {
      const finest = taskLevel === 'debug' && severity[level] > severity.debug ? 'debug' : level;
      const write = (line: string) => {
        const entry = JSON.parse(line) as Entry;
        if (severity[entry.level] >= severity[level]) file.write(line);
        relay(entry, taskLog, taskLevel);
      };
      return loggerTo({ write }, finest);
    },
    path,
    reopen: () => file.reopen(),
    [Symbol.dispose]: () => file.close(),
  };
}

/** What is read of a line. */
interface Entry {
  readonly level: keyof typeof severity;
  readonly msg?: string;
  readonly err?: { readonly message?: string };
}

/** pino's levels, and what containerd's log calls warn. */
const severity = { trace: 10, debug: 20, info: 30, warn: 40, warning: 40, error: 50, fatal: 60 } as const;

/** A line as one of the task's log; what is finer than containerd's own log is not its business. */
function relay({ level, msg, err }: Entry, taskLog: TaskLog, finest: TaskLogLevel): void {
  if (severity[level] < severity[finest]) return;
  const text = [msg, err?.message].filter((part) => part !== undefined).join(': ');
  if (severity[level] >= severity.error) taskLog.error(text);
  else if (level === 'warn') taskLog.warn(text);
  else if (level === 'info') taskLog.info(text);
  else taskLog.debug(text);
}

/** A logger of the same form to anything that takes lines. */
export function loggerTo(destination: { write(line: string): void }, level: LoggerOptions['level']): Logger {
  return pino(
    {
      level,
      base: { pid: process.pid },
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
      redact: { paths: ['env', '*.env', '*.*.env', '*.*.*.env'], remove: true },
    },
    destination,
  );
}
