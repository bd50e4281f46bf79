/**
 * containerd's logging protocol (containerd's core/runtime/v2/README.md, "Shim Logging"), from the side that starts the
 * logger:
 *
 * - its descriptors 3 and 4 are the read ends of the container's stdout and stderr, 5 is the write end of the ready pipe;
 * - its environment is CONTAINER_ID and CONTAINER_NAMESPACE, and nothing else;
 * - with binary:// it is ready when it closes descriptor 5, or writes a byte there; with binary-v2:// only the byte counts;
 * - at the end it sees both streams end, writes what it still has, and exits. One that does not is sent SIGTERM, and
 *   12 s later SIGKILL, as runc's shim does.
 *
 * It runs in a session of its own and is found again by its record (logger-record.ts), so it can outlive kilnd.
 */
import type { ChildProcess } from 'node:child_process';
import { closeSync } from 'node:fs';
import type { Socket } from 'node:net';
import { constants } from 'node:os';
import path from 'node:path';
import { KilnError } from '../errors.ts';
import { ProcessHandle } from '../sys/pidfd.ts';
import { pipe2, socketFromFd } from '../sys/pipe.ts';
import { describeExit, type ProcessExit, spawned } from './helper-process.ts';
import { LastWords } from './last-words.ts';
import { readLoggerRecord, removeLoggerRecord, writeLoggerRecord } from './logger-record.ts';
import { resetOomScore } from './oom-score.ts';
import { isAlive, isEnding } from './process-identity.ts';

export interface LoggerOptions {
  readonly program: string;
  readonly args: readonly string[];
  /** CONTAINER_ID: the container's id; of an exec, the exec's, as under runc. */
  readonly id: string;
  /** CONTAINER_NAMESPACE. */
  readonly namespace: string;
  /** The private directory of the container or exec; the logger's record is kept there. */
  readonly directory: string;
  /** Blocking read ends, which stay the caller's to close. */
  readonly stdout: number;
  readonly stderr: number;
  /** What tells that the logger is ready: a byte, or the end of the ready pipe too. */
  readonly ready: 'byte' | 'byte-or-end';
  readonly limits?: LoggerLimits;
}

/** In milliseconds. */
export interface LoggerLimits {
  /** From its start until it is ready. */
  readonly readyMs: number;
  /** From the end of its streams until it is sent SIGTERM. */
  readonly endMs: number;
  /** From SIGTERM until SIGKILL; containerd's binaryIOProcTermTimeout. */
  readonly termMs: number;
}

/** The FIFO for what a logger itself says. */
const outputName = 'logger-output';

const defaultLimits: LoggerLimits = { readyMs: 10_000, endMs: 2_000, termMs: 12_000 };

export interface LoggerProcess {
  readonly pid: number;
  /** Resolves when the process has ended; never rejects. */
  readonly exited: Promise<ProcessExit>;
  /** The last lines that it wrote to stdout or stderr. */
  lastWords(): string;
  /**
   * For after the end of its streams: waits for the logger's exit, and helps it along when it takes too long. Safe to
   * call twice; never rejects.
   */
  end(): Promise<ProcessExit>;
}

/**
 * Starts a logger; resolves when it is ready. When that fails, nothing is left of it.
 *
 * @throws KilnError failed-precondition naming the program when it cannot be executed or ends before it is ready,
 *   deadline-exceeded when it takes too long
 */
export async function startLogger(options: LoggerOptions): Promise<LoggerProcess> {
  const { program, args, id, namespace, directory, limits = defaultLimits } = options;
  const words = new LastWords(path.join(directory, outputName));
  const readyPipe = pipe2();
  const ready = socketFromFd(readyPipe.read, 'read');
  let started: { child: ChildProcess; exited: Promise<ProcessExit> };
  try {
    const what = { program, args, title: 'the logger', hint: 'binary:// names the absolute path of a program' };
    started = await spawned(what, {
      detached: true,
      cwd: '/',
      env: { CONTAINER_ID: id, CONTAINER_NAMESPACE: namespace },
      stdio: ['ignore', words.writer, words.writer, options.stdout, options.stderr, readyPipe.write],
    });
  } catch (error) {
    ready.destroy();
    words[Symbol.dispose]();
    throw error;
  } finally {
    closeSync(readyPipe.write);
    words.closeWriter();
  }
  const { child, exited } = started;
  const signal = (name: NodeJS.Signals) => void child.kill(name);
  const logger = new RunningLogger({ pid: child.pid as number, exited, signal }, { words, ready, directory, limits });
  try {
    resetOomScore(logger.pid);
    // A kilnd that is killed before this holds the only write ends: then the logger sees its streams end, and ends too.
    writeLoggerRecord(directory, logger.pid);
    await logger.waitUntilReady(options);
    return logger;
  } catch (error) {
    logger.kill();
    await logger.exited;
    throw error;
  }
}

/** Takes over the logger that an earlier kilnd has started in this directory; undefined when it has ended. */
export function adoptLogger({
  directory,
  limits = defaultLimits,
}: Pick<LoggerOptions, 'directory' | 'limits'>): LoggerProcess | undefined {
  const identity = readLoggerRecord(directory);
  const handle = identity && ProcessHandle.open(identity.pid);
  if (identity === undefined || handle === undefined) return undefined;
  // Looked at with the handle open, so that it is this process and no other.
  if (!isAlive(identity)) {
    handle[Symbol.dispose]();
    return undefined;
  }
  const words = new LastWords(path.join(directory, outputName), 'existing');
  words.closeWriter();
  const exited = handle.ended.then(() => ({ code: null, signal: null }));
  const signal = (name: NodeJS.Signals) => handle.kill(constants.signals[name]);
  return new RunningLogger({ pid: identity.pid, exited, signal }, { words, ready: undefined, directory, limits });
}

/** The process, be it our child or not. */
interface Started {
  readonly pid: number;
  readonly exited: Promise<ProcessExit>;
  readonly signal: (name: NodeJS.Signals) => void;
}

interface Belongings {
  readonly words: LastWords;
  /** Undefined once it was ready under an earlier kilnd. */
  readonly ready: Socket | undefined;
  readonly directory: string;
  readonly limits: LoggerLimits;
}

class RunningLogger implements LoggerProcess {
  readonly pid: number;
  readonly exited: Promise<ProcessExit>;
  readonly #signal: Started['signal'];
  readonly #belongings: Belongings;
  #ended = false;
  #lastWords: string | undefined;
  #end: Promise<ProcessExit> | undefined;

  constructor({ pid, exited, signal }: Started, belongings: Belongings) {
    this.#signal = signal;
    this.#belongings = belongings;
    this.pid = pid;
    this.exited = exited.then((exit) => {
      this.#ended = true;
      const { words, ready, directory } = belongings;
      this.#lastWords = words.text();
      words[Symbol.dispose]();
      ready?.destroy();
      removeLoggerRecord(directory);
      return exit;
    });
  }

  lastWords(): string {
    return this.#lastWords ?? this.#belongings.words.text();
  }

  end(): Promise<ProcessExit> {
    this.#end ??= this.#endInTime();
    return this.#end;
  }

  async waitUntilReady({ program, ready: wanted }: Pick<LoggerOptions, 'program' | 'ready'>): Promise<void> {
    const { ready, limits } = this.#belongings;
    const name = `the logger "${program}"`;
    const said = new Promise<'byte' | 'end'>((resolve) => {
      ready?.once('data', () => resolve('byte'));
      ready?.once('end', () => resolve('end'));
      // Who writes more than its byte must not be killed by SIGPIPE, so the pipe is read for as long as it lives.
      ready?.once('error', () => resolve('end'));
    });
    let answer = await within(limits.readyMs, Promise.race([said, this.exited]));
    // At its exit a process closes its descriptors first, and is known to have ended a moment later.
    if (answer === 'end' && isEnding(this.pid)) answer = await this.exited;
    if (answer === 'byte' || (answer === 'end' && wanted === 'byte-or-end')) return;
    const hint = `a logger ${wanted === 'byte' ? 'writes a byte to' : 'closes, or writes a byte to,'} descriptor 5`;
    if (answer === undefined) {
      throw new KilnError(
        'deadline-exceeded',
        this.#withLastWords(`${name} was not ready within ${limits.readyMs / 1000} s`),
        { hint },
      );
    }
    const what = answer === 'end' ? 'closed descriptor 5 without a byte' : `ended ${describeExit(answer)}`;
    throw new KilnError('failed-precondition', this.#withLastWords(`${name} ${what} before it was ready`), { hint });
  }

  /** With everything of its session's first process group: a script's children would keep the streams open. */
  kill(): void {
    if (this.#ended) return;
    try {
      process.kill(-this.pid, 'SIGKILL');
    } catch {
      // It has ended.
    }
  }

  #withLastWords(message: string): string {
    const words = this.lastWords();
    return words === '' ? message : `${message}: ${words}`;
  }

  async #endInTime(): Promise<ProcessExit> {
    const { endMs, termMs } = this.#belongings.limits;
    const byItself = await within(endMs, this.exited);
    if (byItself !== undefined) return byItself;
    // To the logger alone, as runc's shim does; a program that it runs may still be writing.
    this.#signal('SIGTERM');
    const told = await within(termMs, this.exited);
    if (told !== undefined) return told;
    this.kill();
    return this.exited;
  }
}

/** Undefined when the time is over. */
async function within<T>(ms: number, promise: Promise<T>): Promise<T | undefined> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<undefined>((resolve) => {
    timer = setTimeout(resolve, ms, undefined);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}
