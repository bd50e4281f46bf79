/** Child processes of the tests: whole output as bytes, or output as it comes. */
import { type ChildProcessByStdio, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { Readable, type Writable } from 'node:stream';
import { pipeline } from 'node:stream/promises';

export interface RunOptions {
  /** Fed to the program and closed; without it stdin is /dev/null. */
  readonly stdin?: string | Buffer | Readable;
  /** Milliseconds until the program is killed and the call fails. Default 120,000: emulated VMs are slow. */
  readonly timeout?: number;
  readonly env?: NodeJS.ProcessEnv;
  readonly cwd?: string;
}

export interface RunResult {
  /** The exit code; 128 + n when signal n ended the program itself. */
  readonly code: number;
  readonly stdout: Buffer;
  readonly stderr: string;
}

/** Runs a program to its end. Fails only on a time-out or when it cannot be started: an exit code is a result. */
export async function run(file: string, args: readonly string[], options: RunOptions = {}): Promise<RunResult> {
  await using child = stream(file, args, options);
  const [stdout, stderr, code] = await Promise.all([bytes(child.stdout), bytes(child.stderr), child.exit]);
  return { code, stdout, stderr: stderr.toString() };
}

/** As `run`, and anything but exit code 0 is an error with what the program said. */
export async function mustRun(file: string, args: readonly string[], options: RunOptions = {}): Promise<RunResult> {
  const result = await run(file, args, options);
  if (result.code !== 0) throw new Error(`${file} ${args.join(' ')} ended with ${result.code}: ${result.stderr}`);
  return result;
}

/** A program that is running; disposing it kills it. */
export interface RunningProgram extends AsyncDisposable {
  readonly pid: number;
  readonly stdin: Writable;
  readonly stdout: Readable;
  readonly stderr: Readable;
  /** The exit code (128 + n for signal n), after both outputs have ended. Fails on the time limit. */
  readonly exit: Promise<number>;
  kill(signal: NodeJS.Signals): void;
}

const signalNumbers: Partial<Record<NodeJS.Signals, number>> = { SIGHUP: 1, SIGINT: 2, SIGKILL: 9, SIGTERM: 15 };

/** Starts a program without collecting its output. With no `stdin` given, `child.stdin` stays open for the caller. */
export function stream(
  file: string,
  args: readonly string[],
  options: RunOptions & { interactive?: boolean } = {},
): RunningProgram {
  const child: ChildProcessByStdio<Writable, Readable, Readable> = spawn(file, args, {
    stdio: ['pipe', 'pipe', 'pipe'],
    env: options.env ?? process.env,
    ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
  });
  // The program may end without reading its input.
  child.stdin.on('error', () => undefined);
  if (options.stdin instanceof Readable) void pipeline(options.stdin, child.stdin).catch(() => undefined);
  else if (options.stdin !== undefined || options.interactive !== true) child.stdin.end(options.stdin ?? '');

  const limit = options.timeout ?? 120_000;
  let timedOut = false;
  const timer = setTimeout(() => {
    timedOut = true;
    child.kill('SIGKILL');
    // A grandchild may hold the pipes open: the caller's readers must end all the same.
    child.stdout.destroy();
    child.stderr.destroy();
  }, limit);
  const exit = new Promise<number>((resolve, reject) => {
    child.once('error', (error) => {
      clearTimeout(timer);
      reject(error);
    });
    child.once('close', (code, signal) => {
      clearTimeout(timer);
      if (timedOut) reject(new Error(`${file} ${args.join(' ')} did not end within ${limit} ms`));
      else resolve(code ?? 128 + (signal === null ? 0 : (signalNumbers[signal] ?? 0)));
    });
  });
  // Whoever needs the outcome awaits `exit`; the others must not bring the test process down.
  exit.catch(() => undefined);
  return {
    pid: child.pid ?? 0,
    stdin: child.stdin,
    stdout: child.stdout,
    stderr: child.stderr,
    exit,
    kill: (signal) => void child.kill(signal),
    async [Symbol.asyncDispose]() {
      clearTimeout(timer);
      if (child.exitCode === null && child.signalCode === null && child.pid !== undefined) {
        const ended = once(child, 'exit');
        child.kill('SIGKILL');
        await ended;
      }
      child.stdout.destroy();
      child.stderr.destroy();
    },
  };
}

/** Everything a stream carries; what came before an error (a destroyed pipe) counts. */
export async function bytes(readable: Readable): Promise<Buffer> {
  const chunks: Buffer[] = [];
  readable.on('data', (chunk: Buffer) => chunks.push(chunk));
  readable.resume();
  await new Promise<void>((resolve) => readable.once('close', resolve));
  return Buffer.concat(chunks);
}

/** The first line of a stream that nobody has read from, without its end; what follows stays in the stream. Undefined: it has none. */
export async function takeLine(readable: Readable): Promise<string | undefined> {
  let seen: Buffer = Buffer.alloc(0);
  while (!seen.includes('\n')) {
    const chunk: Buffer | null = readable.read();
    if (chunk !== null) seen = Buffer.concat([seen, chunk]);
    else if (readable.readableEnded || readable.destroyed) return undefined;
    else await Promise.race([once(readable, 'readable'), once(readable, 'close')]);
  }
  const end = seen.indexOf('\n');
  if (end + 1 < seen.length) readable.unshift(seen.subarray(end + 1));
  return seen.toString('utf8', 0, end);
}

/** SHA-256 (hex) and length of everything a stream carries, without keeping it. */
export async function digest(readable: Readable): Promise<{ sha256: string; length: number }> {
  const hash = createHash('sha256');
  let length = 0;
  for await (const chunk of readable as AsyncIterable<Buffer>) {
    hash.update(chunk);
    length += chunk.length;
  }
  return { sha256: hash.digest('hex'), length };
}

/** Reads a stream by lines and lets a test wait for one. Lines are kept from the moment this is called. */
export class Lines {
  readonly all: string[] = [];
  #rest = '';
  #ended = false;
  #waiters = new Set<() => void>();

  constructor(readable: Readable) {
    readable.on('data', (chunk: Buffer) => {
      const parts = (this.#rest + chunk.toString()).split('\n');
      this.#rest = parts.pop() ?? '';
      this.all.push(...parts);
      for (const waiter of this.#waiters) waiter();
    });
    readable.once('close', () => {
      this.#ended = true;
      for (const waiter of this.#waiters) waiter();
    });
  }

  /** The first line (old or new) that matches; fails when the stream ends or the milliseconds are over. */
  waitFor(match: (line: string) => boolean, what: string, timeout = 60_000): Promise<string> {
    return new Promise((resolve, reject) => {
      const settle = (action: () => void): void => {
        clearTimeout(timer);
        this.#waiters.delete(look);
        action();
      };
      const look = (): void => {
        const line = this.all.find(match);
        if (line !== undefined) settle(() => resolve(line));
        else if (this.#ended)
          settle(() => reject(new Error(`the output ended before ${what}:\n${this.all.join('\n')}`)));
      };
      const timer = setTimeout(
        () => settle(() => reject(new Error(`no ${what} within ${timeout} ms; got:\n${this.all.join('\n')}`))),
        timeout,
      );
      this.#waiters.add(look);
      look();
    });
  }
}
