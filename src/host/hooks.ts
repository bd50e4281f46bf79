/**
 * Runs one hook of an OCI spec: a program of the host that is told the container's state on its stdin.
 *
 * Source: runtime-spec, config.md "POSIX-platform Hooks". What the hook gets is exactly what the spec says, and nothing
 * of kilnd's own: its argv, its environment (none, if none is given) and the state; its stdout goes nowhere. Its stderr
 * is what an error says when it fails. What it leaves running in the background is its own affair, also when that has
 * the hook's stderr open; only a hook that is stopped takes its process group with it.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, readSync } from 'node:fs';
import type { Socket } from 'node:net';
import { KilnError } from '../errors.ts';
import { type Pipe, pipe2, socketFromFd } from '../sys/pipe.ts';
import { describeExit, type ProcessExit } from './helper-process.ts';
import { resetOomScore } from './oom-score.ts';
import { printable } from './printable.ts';

export interface HookCommand {
  /** Absolute path of the program on the host. */
  readonly path: string;
  /** The program's whole argv; without it, the path alone. */
  readonly args?: readonly string[] | undefined;
  /** The program's whole environment, as NAME=VALUE. */
  readonly env?: readonly string[] | undefined;
  /** Milliseconds that it may take; no limit when absent. */
  readonly timeoutMs?: number | undefined;
}

export interface HookContext {
  /** What the hook reads from its stdin: the state of the container, JSON. */
  readonly state: string;
  /** The hook's working directory. */
  readonly cwd: string;
  /** Stops the hook; `runHook` then rejects with the signal's reason. */
  readonly signal?: AbortSignal | undefined;
}

/** The end of a hook's stderr that goes into an error message. */
const stderrBytes = 2048;

/** setTimeout takes no more (2^31 - 1 ms, 24 days) and would fire at once. */
const longestTimerMs = 2 ** 31 - 1;

/**
 * Resolves when the hook has ended with status 0.
 *
 * @throws KilnError failed-precondition when it cannot be executed, internal when it fails (with its stderr),
 * deadline-exceeded when it took too long and was killed; or the signal's reason
 */
export async function runHook(hook: HookCommand, { state, cwd, signal }: HookContext): Promise<void> {
  signal?.throwIfAborted();
  const { child, exited, stdin, stderr } = await start(hook, cwd);
  // A hook that does not read its stdin is none that failed (EPIPE).
  stdin.on('error', () => {});
  stdin.end(state);
  let reason: unknown;
  const stop = (why: unknown): void => {
    reason ??= why;
    killGroup(child.pid as number);
  };
  const aborted = (): void => stop(signal?.reason);
  if (signal?.aborted) aborted();
  signal?.addEventListener('abort', aborted, { once: true });
  const { timeoutMs } = hook;
  const timer =
    timeoutMs === undefined
      ? undefined
      : setTimeout(() => stop(tookTooLong(hook.path, timeoutMs, stderr)), Math.min(timeoutMs, longestTimerMs));
  try {
    const exit = await exited;
    if (reason !== undefined) throw reason;
    if (exit.code !== 0) throw new KilnError('internal', `${hook.path} failed ${describeExit(exit)}${quoted(stderr)}`);
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener('abort', aborted);
    stdin.destroy();
    stderr.close();
  }
}

interface Started {
  readonly child: ChildProcess;
  readonly exited: Promise<ProcessExit>;
  readonly stdin: Socket;
  readonly stderr: Stderr;
}

/** Real pipes, not the socket pairs of Node's child_process: a script may open /dev/stdin and /dev/stderr. */
async function start({ path, args, env = [] }: HookCommand, cwd: string): Promise<Started> {
  using ours = new DisposableStack();
  const [input, output] = [pipe2(), pipe2()];
  const theirs: Pipe = { read: input.read, write: output.write };
  try {
    const stdin = ours.adopt(socketFromFd(input.write, 'write'), (socket) => socket.destroy());
    const stderr = ours.adopt(new Stderr(output.read), (end) => end.close());
    const child = spawn(path, (args ?? []).slice(1), {
      argv0: args?.[0] ?? path,
      env: environment(env),
      cwd,
      // A session, and so a process group, of its own.
      detached: true,
      stdio: [theirs.read, 'ignore', theirs.write],
    });
    const exited = new Promise<ProcessExit>((resolve) => {
      child.once('exit', (code, by) => resolve({ code, signal: by }));
    });
    await once(child, 'spawn');
    resetOomScore(child.pid as number);
    ours.move();
    return { child, exited, stdin, stderr };
  } catch (cause) {
    const { code, message } = cause as NodeJS.ErrnoException;
    throw new KilnError('failed-precondition', `${path} cannot be executed: ${code ?? message}`, { cause });
  } finally {
    closeSync(theirs.read);
    closeSync(theirs.write);
  }
}

function environment(variables: readonly string[]): Record<string, string> {
  const values = new Map<string, string>();
  for (const variable of variables) {
    const [name = ''] = variable.split('=', 1);
    // getenv(3) finds the first of two.
    if (!values.has(name)) values.set(name, variable.slice(name.length + 1));
  }
  return Object.fromEntries(values);
}

/** The last words on a hook's stderr; all else that it says is read and forgotten. */
class Stderr {
  readonly #fd: number;
  readonly #socket: Socket;
  #tail = Buffer.alloc(0);

  constructor(fd: number) {
    this.#fd = fd;
    this.#socket = socketFromFd(fd, 'read');
    this.#socket.on('error', () => {});
    this.#socket.on('data', (chunk: Buffer) => this.#add(chunk));
  }

  /** What it has said up to now. Does not wait for the pipe's end: a process in the background may hold it open. */
  lastWords(): string {
    const chunk = Buffer.alloc(64 * 1024);
    // What a process wrote before its exit is in the pipe now; a pipe's capacity is 64 KiB, pipe(7).
    for (let read = 1; !this.#socket.destroyed && read > 0; ) {
      read = readNow(this.#fd, chunk);
      this.#add(chunk.subarray(0, read));
      if (read < chunk.length) break;
    }
    return printable(this.#tail.toString()).trim();
  }

  close(): void {
    this.#socket.destroy();
  }

  #add(chunk: Buffer): void {
    this.#tail = Buffer.concat([this.#tail, chunk]).subarray(-stderrBytes);
  }
}

/** read(2) of a non-blocking descriptor; 0 when nothing is there. */
function readNow(fd: number, into: Buffer): number {
  try {
    return readSync(fd, into);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EAGAIN') return 0;
    throw error;
  }
}

function quoted(stderr: Stderr): string {
  const words = stderr.lastWords();
  return words === '' ? '' : `: ${words}`;
}

function tookTooLong(path: string, timeoutMs: number, stderr: Stderr): KilnError {
  const message = `${path} took longer than its timeout of ${timeoutMs / 1000} s${quoted(stderr)}`;
  return new KilnError('deadline-exceeded', message);
}

function killGroup(pid: number): void {
  try {
    process.kill(-pid, 'SIGKILL');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}
