/**
 * The host's side of a process's stdin, stdout and stderr, as containerd's Create and Exec requests name them.
 *
 * Each is "" (none), the path of a FIFO that the client has made, the path of a file, or a URI; `docs/stdio.md` has the
 * whole contract. In short: stdout and stderr are open from Create to Delete, whoever reads them; stdin is opened at
 * Start, and ends by CloseIO.
 *
 * stdin is opened as late as Start because of how `ctr` and other clients send the end of stdin. When theirs ends, they
 * call CloseIO, but only if the task exists already; and they begin to copy before Create. If we opened the FIFO in
 * Create, a short input would be copied and ended before Create returns, CloseIO would never come, and the container
 * would wait for ever (containerd issue 4489). A client cannot get past its first byte before we open the FIFO. And one
 * that had no byte to send has closed its end by then, which `start` can see.
 */
import { type Stats, statSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { dirname, isAbsolute } from 'node:path';
import { type Readable, Writable } from 'node:stream';
import { fileURLToPath } from 'node:url';
import { KilnError } from '../errors.ts';
import type { LoggerLimits } from '../host/logger-process.ts';
import { FifoReader, FifoWriter } from './stdio-fifo.ts';
import { FileWriter } from './stdio-file.ts';
import { ContainerLogger, parseLoggerUri } from './stdio-logger.ts';

/** As in containerd's CreateTaskRequest and ExecProcessRequest. */
export interface StdioPaths {
  readonly stdin: string;
  readonly stdout: string;
  readonly stderr: string;
  /** A terminal has one output: stderr is not looked at. */
  readonly terminal: boolean;
}

export const noStdio: StdioPaths = { stdin: '', stdout: '', stderr: '', terminal: false };

/** Has somebody who outlives kilnd keep FIFOs open; shim/endpoint.ts has it. Neither rejects. */
export interface FifoHolds {
  holdFifo(path: string): Promise<void>;
  releaseFifo(path: string): Promise<void>;
}

export interface StdioOptions {
  /** What a logger is told of: the container's id; of an exec, the exec's, as under runc. */
  readonly id: string;
  readonly namespace: string;
  /** Private to the container or exec, existing, and there until `dispose`: for a logger's FIFOs and record. */
  readonly directory: string;
  /** Keeps FIFOs open while no kilnd is there; without it their other side sees kilnd go. */
  readonly holds?: FifoHolds;
  /** The streams of a process that runs already, and belonged to an earlier kilnd. */
  readonly adopt?: boolean;
  /** How long a logger may take; for tests. */
  readonly loggerLimits?: LoggerLimits;
  /** Told when output to a file or a logger is being lost. The process is not disturbed by it. */
  readonly onError?: (name: StreamName, error: Error) => void;
}

type StreamName = 'stdin' | 'stdout' | 'stderr';

export interface Stdio extends AsyncDisposable {
  /** What the client sends. May be piped from the start; bytes come after `startStdin`. Null: /dev/null. */
  readonly stdin: Readable | null;
  /** Where the process's output goes, with back-pressure. Call `finish`, not `end`: both may be the same stream. */
  readonly stdout: Writable | null;
  /** The same stream as `stdout` when both have the same path. */
  readonly stderr: Writable | null;
  /**
   * Opens stdin; to be called when the process is started. If no client holds its end at that moment, stdin ends at
   * once, unless `clientMayReturn`: for a running process that is taken over after a restart of ours.
   *
   * @returns whether it has ended, and nothing was sent
   * @throws KilnError when the FIFO is gone
   */
  startStdin(options?: { readonly clientMayReturn?: boolean }): boolean;
  /** CloseIO: stdin ends once the clients have closed their ends too and the pipe is empty. Any time, any number. */
  closeStdin(): void;
  /**
   * After the last write: resolves when every byte is in the pipe or file and the readers have seen the end. Waits for as
   * long as a reader stalls; `dispose` ends the wait. A logger may still be at work on what it has read.
   */
  finish(): Promise<void>;
  /**
   * Closes everything at once; unwritten bytes are lost. Any time, any number. Resolves when nothing is open and a logger
   * has ended, which takes up to 14 s with one that does not want to.
   */
  dispose(): Promise<void>;
}

/**
 * Opens stdout and stderr, and checks stdin. A logger is ready when this resolves.
 *
 * @throws KilnError not-found for a path that does not exist, unimplemented for an unknown URI scheme, invalid-argument;
 *   for a logger failed-precondition and deadline-exceeded. Nothing for a process that is taken over: it runs, and what of
 *   its streams cannot be had any more is told to `onError`, and lost
 */
export async function openStdio(paths: StdioPaths, options: StdioOptions): Promise<Stdio> {
  if (!(options.adopt ?? false)) return open(paths, options);
  const lost = (name: StreamName) => (error: unknown) => {
    options.onError?.(name, error instanceof Error ? error : new Error(String(error)));
    return undefined;
  };
  const stdin = paths.stdin === '' ? null : await checkStdin(paths.stdin).catch(lost('stdin'));
  const opened = await open({ ...paths, stdin: '' }, options).catch(lost('stdout'));
  const outputs = opened ?? OpenStdio.ofNothing(paths);
  return stdin ? outputs.withStdin(stdin) : outputs;
}

async function open(paths: StdioPaths, options: StdioOptions): Promise<OpenStdio> {
  const { holds } = options;
  const stdin = paths.stdin === '' ? null : await checkStdin(paths.stdin);
  const logger = await startLogger(paths, options);
  if (logger !== null) {
    const stderr = paths.terminal ? null : logger.stderr;
    return OpenStdio.of({ stdin, stdout: logger.stdout, stderr, logger, holds });
  }
  const stdout = await openOutput('stdout', paths.stdout, options);
  if (paths.terminal || paths.stderr === '') return OpenStdio.of({ stdin, stdout, stderr: null, holds });
  if (paths.stderr === paths.stdout) return OpenStdio.of({ stdin, stdout, stderr: stdout, holds });
  try {
    return await OpenStdio.of({ stdin, stdout, stderr: await openOutput('stderr', paths.stderr, options), holds });
  } catch (error) {
    stdout?.destroy();
    throw error;
  }
}

/** As under runc, stdout decides: a logger that it names gets stderr too, unless that goes elsewhere. */
async function startLogger(paths: StdioPaths, options: StdioOptions): Promise<ContainerLogger | null> {
  const uri = parseLoggerUri(paths.stdout);
  const stderr = paths.terminal ? '' : paths.stderr;
  if (stderr !== '' && stderr !== paths.stdout && (uri !== null || parseLoggerUri(stderr) !== null)) {
    const hint = 'one logger gets both outputs: name it for both';
    throw new KilnError('invalid-argument', `stdout is ${paths.stdout}, but stderr is ${stderr}`, { hint });
  }
  if (uri === null) return null;
  const { id, namespace, directory, loggerLimits, onError, adopt = false } = options;
  const start = adopt ? ContainerLogger.adopt : ContainerLogger.start;
  return start(uri, {
    id,
    namespace,
    directory,
    onError: (error) => onError?.('stdout', error),
    ...(loggerLimits === undefined ? {} : { limits: loggerLimits }),
  });
}

interface Opened {
  readonly stdin: FifoReader | null;
  readonly stdout: Writable | null;
  readonly stderr: Writable | null;
  readonly logger?: ContainerLogger;
  readonly holds: FifoHolds | undefined;
}

class OpenStdio implements Stdio {
  readonly stdin: FifoReader | null;
  readonly stdout: Writable | null;
  readonly stderr: Writable | null;
  readonly #logger: ContainerLogger | undefined;
  readonly #holds: FifoHolds | undefined;
  /** By path: nothing is held again after its end, so each is released once. */
  readonly #released = new Map<string, Promise<void> | undefined>();

  private constructor({ stdin, stdout, stderr, logger, holds }: Opened) {
    this.stdin = stdin;
    this.stdout = stdout;
    this.stderr = stderr;
    this.#logger = logger;
    this.#holds = holds;
    // A stream that fails is destroyed, which whoever uses it sees; without a listener it would end the daemon.
    for (const stream of this.#streams()) stream.on('error', () => {});
  }

  /** Of a process whose outputs are lost: they are read, and dropped. */
  static ofNothing({ stdout, stderr, terminal }: StdioPaths): OpenStdio {
    const nowhere = () => new Writable({ write: (_chunk, _encoding, done) => done() });
    return new OpenStdio({
      stdin: null,
      stdout: stdout === '' ? null : nowhere(),
      stderr: stderr === '' || terminal ? null : nowhere(),
      holds: undefined,
    });
  }

  withStdin(stdin: FifoReader): OpenStdio {
    return new OpenStdio({
      stdin,
      stdout: this.stdout,
      stderr: this.stderr,
      holds: this.#holds,
      ...(this.#logger === undefined ? {} : { logger: this.#logger }),
    });
  }

  /** Once the FIFOs are held. stdin is held from its start on. */
  static async of(opened: Opened): Promise<OpenStdio> {
    const stdio = new OpenStdio(opened);
    await Promise.all(stdio.#outputFifos().map((path) => opened.holds?.holdFifo(path)));
    return stdio;
  }

  #outputFifos(): string[] {
    return this.#outputs().flatMap((stream) => (stream instanceof FifoWriter ? [stream.path] : []));
  }

  async #releaseAll(): Promise<void> {
    const paths = [...this.#outputFifos(), ...(this.stdin === null ? [] : [this.stdin.path])];
    await Promise.all(paths.map((path) => this.#release(path)));
  }

  /** An earlier kilnd may have had it held, so also where this one has not. */
  #release(path: string): Promise<void> | undefined {
    if (!this.#released.has(path)) this.#released.set(path, this.#holds?.releaseFifo(path));
    return this.#released.get(path);
  }

  startStdin({ clientMayReturn = false }: { readonly clientMayReturn?: boolean } = {}): boolean {
    try {
      this.stdin?.start({ endWithoutClient: !clientMayReturn });
      // Nobody waits for it: what it guards against is kilnd's death. CloseIO may have come before.
      if (this.stdin?.open) void this.#holds?.holdFifo(this.stdin.path);
      return this.stdin?.isEmpty ?? false;
    } catch (error) {
      throw cannotOpen('stdin', error);
    }
  }

  closeStdin(): void {
    this.stdin?.closeWriter();
    if (this.stdin !== null) void this.#release(this.stdin.path);
  }

  async finish(): Promise<void> {
    this.stdin?.destroy();
    for (const stream of this.#outputs()) stream.end();
    await this.#allClosed();
    await this.#releaseAll();
  }

  async dispose(): Promise<void> {
    for (const stream of this.#streams()) stream.destroy();
    await this.#allClosed();
    await this.#releaseAll();
    await this.#logger?.end();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }

  #streams(): Set<Readable | Writable> {
    return new Set([...(this.stdin === null ? [] : [this.stdin]), ...this.#outputs()]);
  }

  #outputs(): Writable[] {
    const outputs = [this.stdout, this.stderr, this.#logger?.stderr ?? null].filter((stream) => stream !== null);
    return [...new Set(outputs)];
  }

  async #allClosed(): Promise<void> {
    const closed = (stream: Readable | Writable): Promise<void> =>
      new Promise((resolve) => {
        if (stream.closed) resolve();
        else stream.once('close', resolve);
      });
    await Promise.all(Array.from(this.#streams(), closed));
  }
}

async function checkStdin(path: string): Promise<FifoReader> {
  requireAbsolute('stdin', path);
  const status = statOf('stdin', path);
  if (status === undefined) throw missing('stdin', path);
  if (!status.isFIFO()) throw new KilnError('invalid-argument', `stdin: ${path} is not a FIFO`);
  return new FifoReader(path);
}

/** /dev/null and its like never block. Linux Documentation/admin-guide/devices.txt: 1 char, memory devices. */
const memoryDevices = 1;

/** The major number in a dev_t. makedev(3): bits 8 to 19 hold the lower twelve of it, which is all there are. */
function majorOf(device: number): number {
  return (device >>> 8) & 0xfff;
}

async function openOutput(
  name: StreamName,
  target: string,
  { onError }: Pick<StdioOptions, 'onError'>,
): Promise<Writable | null> {
  if (target === '') return null;
  const { path, create } = outputPath(name, target);
  const report = (error: Error): void => onError?.(name, error);
  try {
    if (create) await mkdir(dirname(path), { recursive: true });
  } catch (error) {
    throw cannotOpen(name, error);
  }
  const status = statOf(name, path);
  if (status === undefined && !create) throw missing(name, path);
  // Opening or writing a terminal or the like can block the whole daemon.
  if (status?.isCharacterDevice() && majorOf(status.rdev) !== memoryDevices) {
    throw new KilnError('invalid-argument', `${name}: ${path} is a device, not a FIFO or a regular file`);
  }
  try {
    return status?.isFIFO() ? new FifoWriter(path) : new FileWriter(path, { create, onError: report });
  } catch (error) {
    throw cannotOpen(name, error);
  }
}

/** A bare path must exist: the client makes the FIFO. A file:// URI is a place for us to make a file. */
function outputPath(name: StreamName, target: string): { path: string; create: boolean } {
  const scheme = /^([a-z][a-z0-9+.-]*):\/\//i.exec(target)?.[1]?.toLowerCase();
  if (scheme === undefined) {
    requireAbsolute(name, target);
    return { path: target, create: false };
  }
  if (scheme !== 'file') {
    throw new KilnError('unimplemented', `${name}: ${scheme}:// is not supported yet: ${target}`, {
      hint: 'FIFOs, files, file://, binary:// and binary-v2:// are',
    });
  }
  try {
    return { path: fileURLToPath(target), create: true };
  } catch (error) {
    throw new KilnError('invalid-argument', `${name}: ${target} does not name a file of this host`, { cause: error });
  }
}

function requireAbsolute(name: StreamName, path: string): void {
  if (isAbsolute(path)) return;
  throw new KilnError('invalid-argument', `${name}: ${path} is neither an absolute path nor a URI`);
}

/** Undefined when there is no such file. */
function statOf(name: StreamName, path: string): Stats | undefined {
  try {
    return statSync(path, { throwIfNoEntry: false });
  } catch (error) {
    throw cannotOpen(name, error);
  }
}

function missing(name: StreamName, path: string): KilnError {
  return new KilnError('not-found', `${name}: ${path} does not exist`);
}

/** Node's own message has errno, call and path. */
function cannotOpen(name: StreamName, error: unknown): KilnError {
  const code = errnoOf(error) === 'ENOENT' ? 'not-found' : 'invalid-argument';
  const reason = error instanceof Error ? error.message : String(error);
  return new KilnError(code, `${name}: cannot be opened: ${reason}`, { cause: error });
}

function errnoOf(error: unknown): unknown {
  return error instanceof Error && 'code' in error ? error.code : undefined;
}
