/**
 * kilnd's log: one JSON object a line in `<state>/kilnd.log`, made by pino.
 *
 * A container's environment holds passwords as often as not. So members called `env` are removed from whatever is
 * logged; apart from that nothing is hidden.
 */
import { join } from 'node:path';
import { type Logger, pino } from 'pino';
import { LogFile } from './log-file.ts';
import type { TaskLog } from './task-log.ts';

export type { Logger } from 'pino';

export interface LoggerOptions {
  /** The folder that gets `kilnd.log`; it must exist. */
  readonly stateDir: string;
  readonly level: 'trace' | 'debug' | 'info' | 'warn' | 'error';
}

export interface DaemonLog extends Disposable {
  readonly logger: Logger;
  /** A logger whose lines go to the same file and, from level info on, to containerd through the task's own log. */
  forTask(taskLog: TaskLog): Logger;
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
    forTask: (taskLog) => {
      const write = (line: string) => {
        file.write(line);
        relay(line, taskLog);
      };
      return loggerTo({ write }, level);
    },
    path,
    reopen: () => file.reopen(),
    [Symbol.dispose]: () => file.close(),
  };
}

/** One JSON line as a line of the task's log; the daemon's finer levels are not containerd's business. */
function relay(line: string, taskLog: TaskLog): void {
  const { level, msg, err } = JSON.parse(line) as { level: string; msg?: string; err?: { message?: string } };
  const text = [msg, err?.message].filter((part) => part !== undefined).join(': ');
  if (level === 'error' || level === 'fatal') taskLog.error(text);
  else if (level === 'warn') taskLog.warn(text);
  else if (level === 'info') taskLog.info(text);
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
