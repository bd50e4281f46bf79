import { type ChildProcess, spawn } from 'node:child_process';
import { closeSync, openSync, readFileSync, writeFileSync } from 'node:fs';
import { Readable } from 'node:stream';
import { KilnError } from '../errors.ts';

/** How a process ended. */
export interface ProcessExit {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
}

/** A long-running program of the host that belongs to one sandbox: a VMM, its vsock backend, the stand-in. */
export interface HelperProcess extends AsyncDisposable {
  readonly pid: number;
  /** Resolves when the process has ended; never rejects. */
  readonly exited: Promise<ProcessExit>;
  /** Everything the program wrote to its fd 3 until it closed it; empty without a status pipe. */
  readonly status: Promise<string>;
  /** The last lines that the program wrote to stdout or stderr. */
  lastWords(): string;
  /** SIGKILL, then waits for the end. Safe to call twice. */
  kill(): Promise<void>;
}

export interface HelperOptions {
  readonly program: string;
  readonly args: readonly string[];
  /** Where the program's output goes. */
  readonly logFile: string;
  /** What the program is, for errors: "QEMU (vm.qemu)". */
  readonly title: string;
  readonly hint: string;
  /** Give the program a pipe as its fd 3, on which it reports its start. */
  readonly statusPipe?: boolean;
}

/**
 * Starts a program in a session of its own, so that it outlives kilnd and no terminal signal reaches it.
 * Throws `failed-precondition` naming the program when it cannot be executed.
 */
export async function startHelper(options: HelperOptions): Promise<HelperProcess> {
  const { program, args, logFile, title, hint } = options;
  const log = openSync(logFile, 'a', 0o600);
  let child: ChildProcess;
  try {
    const status: 'pipe'[] = options.statusPipe ? ['pipe'] : [];
    child = spawn(program, args, {
      detached: true,
      cwd: '/',
      env: { PATH: process.env.PATH ?? '/usr/sbin:/usr/bin:/sbin:/bin' },
      stdio: ['ignore', log, log, ...status],
    });
  } finally {
    closeSync(log);
  }
  const exited = new Promise<ProcessExit>((resolve) => {
    child.once('exit', (code, signal) => resolve({ code, signal }));
  });
  await new Promise<void>((resolve, reject) => {
    child.once('spawn', resolve);
    child.once('error', (error: NodeJS.ErrnoException) => {
      reject(
        new KilnError('failed-precondition', `cannot run ${title} "${program}": ${error.code ?? error.message}`, {
          hint,
          cause: error,
        }),
      );
    });
  });
  const pid = child.pid as number;
  resetOomScore(pid);
  const statusStream = child.stdio[3];
  const status = statusStream instanceof Readable ? readAll(statusStream) : Promise.resolve('');
  const kill = async () => {
    if (child.exitCode === null && child.signalCode === null) child.kill('SIGKILL');
    await exited;
  };
  const lastWords = () => {
    try {
      return readFileSync(logFile, 'utf8').trim().split('\n').slice(-5).join('; ');
    } catch {
      return '';
    }
  };
  return { pid, exited, status, lastWords, kill, [Symbol.asyncDispose]: kill };
}

/**
 * kilnd itself is protected from the OOM killer, since it serves every container; what it starts must not inherit that.
 * proc(5), /proc/pid/oom_score_adj.
 */
function resetOomScore(pid: number): void {
  try {
    writeFileSync(`/proc/${pid}/oom_score_adj`, '0');
  } catch {
    // It has ended already; whoever waits for it will see why.
  }
}

async function readAll(stream: Readable): Promise<string> {
  const chunks: Buffer[] = [];
  try {
    for await (const chunk of stream as AsyncIterable<Buffer>) chunks.push(chunk);
  } catch {
    // The program died with the pipe open; what it said before still counts.
  }
  return Buffer.concat(chunks).toString();
}
