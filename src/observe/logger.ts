/**
 * kilnd's log: one JSON object a line in `<state>/kilnd.log`, made by pino.
 *
 * A container's environment holds passwords as often as not. So members called `env` are removed from whatever is
 * logged; apart from that nothing is hidden.
 */
import { join } from 'node:path';
import { type DestinationStream, type Logger, pino } from 'pino';
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
  const logger = loggerTo(new Destination(file, severity[level]), level);
  return {
    logger,
    forTask: (taskLog, taskLevel) => {
      const finest = taskLevel === 'debug' && severity[level] > severity.debug ? 'debug' : level;
      // A logger made anew would compile what finds an `env` anew, 0.4 ms each.
      return Object.assign(logger.child({}, { level: finest }), { [ofTask]: { log: taskLog, finest: taskLevel } });
    },
    path,
    reopen: () => file.reopen(),
    [Symbol.dispose]: () => file.close(),
  };
}

/** A logger has the member of the one whose child it is: pino makes it with that as its prototype. */
const ofTask = Symbol('task');

interface TaskOfLogger {
  readonly [ofTask]?: { readonly log: TaskLog; readonly finest: TaskLogLevel };
}

/** Takes the lines of all of kilnd's loggers. pino says of which logger one is where a destination asks for that. */
class Destination implements DestinationStream {
  readonly [pino.symbols.needsMetadataGsym] = true;
  lastLevel = 0;
  lastMsg = '';
  lastObj: { readonly err?: unknown } = {};
  lastTime = '';
  declare lastLogger: Logger & TaskOfLogger;
  readonly #file: LogFile;
  readonly #finest: number;

  constructor(file: LogFile, finest: number) {
    this.#file = file;
    this.#finest = finest;
  }

  write(line: string): void {
    if (this.lastLevel >= this.#finest) this.#file.write(line);
    const task = this.lastLogger[ofTask];
    if (task === undefined || this.lastLevel < severity[task.finest]) return;
    // The line has an error's message with those of its causes.
    const words = this.lastObj.err === undefined ? undefined : (JSON.parse(line) as Entry).err?.message;
    tell(task.log, this.lastLevel, [this.lastMsg, words].filter((part) => part !== undefined).join(': '));
  }
}

/** What is read of a line. */
interface Entry {
  readonly err?: { readonly message?: string };
}

/** pino's levels, and what containerd's log calls warn. */
const severity = { trace: 10, debug: 20, info: 30, warn: 40, warning: 40, error: 50, fatal: 60 } as const;

function tell(log: TaskLog, level: number, text: string): void {
  if (level >= severity.error) log.error(text);
  else if (level >= severity.warn) log.warn(text);
  else if (level >= severity.info) log.info(text);
  else log.debug(text);
}

/** A logger of the same form to anything that takes lines. */
export function loggerTo(destination: DestinationStream, level: LoggerOptions['level']): Logger {
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
