/**
 * A program as stdout and stderr: `binary:///usr/bin/logger?key=value&other=value2` runs `logger key value other value2`
 * and gives it both streams; see host/logger-process.ts for what the two of them agree on.
 *
 * Each stream is a FIFO in the container's private directory. It has a name, and is held open by the relay (stdio.ts), so
 * that logger and FIFO can outlive kilnd, and the next kilnd can open it again.
 */
import { closeSync, constants, openSync, rmSync } from 'node:fs';
import path from 'node:path';
import { KilnError } from '../errors.ts';
import { describeExit } from '../host/helper-process.ts';
import { adoptLogger, type LoggerLimits, type LoggerProcess, startLogger } from '../host/logger-process.ts';
import { listFiles } from '../host/logger-record.ts';
import { mkfifo } from '../sys/fifo.ts';
import { FifoWriter } from './stdio-fifo.ts';

export interface LoggerUri {
  readonly program: string;
  readonly args: readonly string[];
  /** binary-v2:// insists on the byte. */
  readonly ready: 'byte' | 'byte-or-end';
}

export interface LoggerOptions {
  readonly id: string;
  readonly namespace: string;
  /** Private, and existing. */
  readonly directory: string;
  readonly limits?: LoggerLimits;
  /** Told when the logger ends too early or badly: output is lost then. */
  readonly onError: (error: Error) => void;
}

const loggerSchemes = { 'binary:': 'byte-or-end', 'binary-v2:': 'byte' } as const;

/**
 * Null for what is no logger's URI. As in runc's shim a key's first value counts, and the order is that of the URI.
 *
 * @throws KilnError invalid-argument
 */
export function parseLoggerUri(target: string): LoggerUri | null {
  const scheme = /^(binary|binary-v2):\/\//i.exec(target)?.[1]?.toLowerCase();
  if (scheme === undefined) return null;
  const invalid = (reason: string, cause?: unknown): KilnError =>
    new KilnError('invalid-argument', `${target}: ${reason}`, {
      hint: `${scheme}:///path/of/program?key=value names a logger`,
      cause,
    });
  try {
    const { protocol, host, pathname, searchParams } = new URL(target);
    if (host !== '') throw invalid(`"${host}" is where a host stands, and the path must be absolute`);
    const program = decodeURIComponent(pathname);
    if (program === '' || program.endsWith('/')) throw invalid('it names no program');
    const args = [...new Set(searchParams.keys())].flatMap((key) => [key, searchParams.get(key) ?? '']);
    return { program, args, ready: loggerSchemes[protocol as keyof typeof loggerSchemes] };
  } catch (error) {
    throw error instanceof KilnError ? error : invalid('it is not a valid URI', error);
  }
}

/** A logger with its two streams. */
export class ContainerLogger {
  readonly stdout: FifoWriter;
  /** Also when there is nothing to write to it: descriptor 4 must not end before descriptor 3. */
  readonly stderr: FifoWriter;
  readonly #program: string;
  readonly #process: LoggerProcess;
  readonly #streams: readonly LoggerStream[];

  private constructor(program: string, process: LoggerProcess, streams: LoggerStreams) {
    this.stdout = streams.stdout.writer;
    this.stderr = streams.stderr.writer;
    this.#program = program;
    this.#process = process;
    this.#streams = [streams.stdout, streams.stderr];
  }

  /**
   * Starts the logger and waits until it is ready.
   *
   * @throws KilnError when it cannot be run, ends or does not get ready; nothing is left then
   */
  static async start(uri: LoggerUri, options: LoggerOptions): Promise<ContainerLogger> {
    const { directory, onError } = options;
    await using stack = new AsyncDisposableStack();
    const stdout = stack.use(new LoggerStream(streamFile(directory, 'stdout')));
    const stderr = stack.use(new LoggerStream(streamFile(directory, 'stderr')));
    const readers = { stdout: stdout.openReader(), stderr: stderr.openReader() };
    let process: LoggerProcess;
    try {
      process = await startLogger({ ...uri, ...options, ...readers });
    } finally {
      // The logger has its own.
      for (const reader of Object.values(readers)) closeSync(reader);
    }
    stack.move();
    return ContainerLogger.#watched(uri, process, { stdout, stderr }, onError);
  }

  /**
   * Takes over the logger that an earlier kilnd has started.
   *
   * @throws KilnError not-found when it has ended
   */
  static async adopt(uri: LoggerUri, options: LoggerOptions): Promise<ContainerLogger> {
    const { directory, limits, onError } = options;
    const process = adoptLogger({ directory, ...(limits === undefined ? {} : { limits }) });
    if (process === undefined) throw new KilnError('not-found', `the logger "${uri.program}" has ended`);
    const stdout = new LoggerStream(streamFile(directory, 'stdout'), 'existing');
    const stderr = new LoggerStream(streamFile(directory, 'stderr'), 'existing');
    return ContainerLogger.#watched(uri, process, { stdout, stderr }, onError);
  }

  static #watched(
    { program }: LoggerUri,
    process: LoggerProcess,
    streams: LoggerStreams,
    onError: LoggerOptions['onError'],
  ): ContainerLogger {
    const logger = new ContainerLogger(program, process, streams);
    void logger.#watch(onError);
    return logger;
  }

  /** After the end of both streams: resolves when the logger has ended. Safe to call twice; never rejects. */
  async end(): Promise<void> {
    await this.#process.end();
    for (const stream of this.#streams) stream[Symbol.dispose]();
  }

  async #watch(onError: LoggerOptions['onError']): Promise<void> {
    const { code, signal } = await this.#process.exited;
    const early = !this.stdout.closed || !this.stderr.closed;
    // SIGTERM is ours, for one that does not end with its streams. That is allowed.
    if (early || (code !== 0 && signal !== 'SIGTERM')) {
      const what = `the logger "${this.#program}" ended ${describeExit({ code, signal })}`;
      const words = [early ? `${what} before the output did` : what, this.#process.lastWords()];
      onError(new KilnError('unavailable', words.filter(Boolean).join(': ')));
    }
    this.stdout.discard();
    this.stderr.discard();
  }
}

/** The FIFOs of all loggers in a directory and below. */
export function loggerFifosBelow(directory: string): string[] {
  const names = [streamName('stdout'), streamName('stderr')];
  return listFiles(directory).filter((file) => names.includes(path.basename(file)));
}

interface LoggerStreams {
  readonly stdout: LoggerStream;
  readonly stderr: LoggerStream;
}

type StreamName = 'stdout' | 'stderr';

function streamName(name: StreamName): string {
  return `logger-${name}`;
}

function streamFile(directory: string, name: StreamName): string {
  return path.join(directory, streamName(name));
}

/** One of the two FIFOs. */
class LoggerStream implements Disposable {
  readonly writer: FifoWriter;
  readonly #file: string;

  /** @throws SysError, or the error of open(2) */
  constructor(file: string, how: 'new' | 'existing' = 'new') {
    this.#file = file;
    if (how === 'new') mkfifo(file, 0o600);
    try {
      this.writer = new FifoWriter(file);
      this.writer.on('error', () => {});
    } catch (error) {
      this[Symbol.dispose]();
      throw error;
    }
  }

  /** For the logger: it blocks when there is nothing to read, as programs expect. The caller closes it. */
  openReader(): number {
    // It does not wait for its other end, which the writer holds.
    return openSync(this.#file, constants.O_RDONLY);
  }

  [Symbol.dispose](): void {
    this.writer?.destroy();
    rmSync(this.#file, { force: true });
  }
}
