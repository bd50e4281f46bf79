import { type ChildProcess, type SpawnOptions, spawn } from 'node:child_process';
import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';
import path from 'node:path';
import type { Readable } from 'node:stream';
import { KilnError } from '../errors.ts';
import type { NetworkNamespace } from '../sys/netns.ts';
import { ProcessHandle } from '../sys/pidfd.ts';
import { pipe2, socketFromFd } from '../sys/pipe.ts';
import { signalName, waitpid } from '../sys/process.ts';
import { posixSpawn } from '../sys/spawn.ts';
import type { ControlGroup } from './control-group.ts';
import { limitLog } from './log-limit.ts';
import { resetOomScore } from './oom-score.ts';
import { lastLines, printable } from './printable.ts';
import { identityOf, isAlive, type ProcessIdentity } from './process-identity.ts';
import { findProgram } from './program.ts';

/** How a process ended; both null of one that was not our child. */
export interface ProcessExit {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
}

/** "(SIGKILL)" or "(exit code 1)". */
export function describeExit({ code, signal }: ProcessExit): string {
  if (code === null && signal === null) return '(nobody knows how)';
  return `(${signal ?? `exit code ${code}`})`;
}

/** A long-running program of the host that belongs to one sandbox: a VMM, its vsock backend, the stand-in. */
export interface HelperProcess extends AsyncDisposable {
  readonly pid: number;
  /** By which a later kilnd knows the process again; undefined for one that has ended. */
  readonly identity: ProcessIdentity | undefined;
  /** Resolves when the process has ended; never rejects. */
  readonly exited: Promise<ProcessExit>;
  /** Everything the program wrote to its fd 3 until it closed it; empty without a status pipe. */
  readonly status: Promise<string>;
  /** The last lines that the program wrote to stdout or stderr, on one. */
  lastWords(): string;
  /** At most the last `maxBytes` of what it wrote, without what a terminal would obey. */
  outputTail(maxBytes: number): string;
  /** SIGKILL, then waits for the end. Safe to call twice. */
  kill(): Promise<void>;
}

export interface HelperOptions {
  readonly program: string;
  readonly args: readonly string[];
  /** The sandbox's private directory. A later kilnd knows by it that the process is ours; see stale.ts. */
  readonly directory: string;
  /** The file in `directory` that the program's output goes to; emptied first, and cut to its end when it is long. */
  readonly logName: string;
  /** It says a line or two, whatever anybody does: the file is not watched. */
  readonly quiet?: boolean;
  /** What the program is, for errors: "QEMU (vm.qemu)". */
  readonly title: string;
  readonly hint: string;
  /** Give the program a pipe as its fd 3, on which it reports its start. */
  readonly statusPipe?: boolean;
  /** Descriptors of ours that the program gets as its fds 3, 4 and so on; from 4 on with a status pipe. */
  readonly inherit?: readonly number[];
  /** "/" where it is absent. */
  readonly workingDirectory?: string;
  /** The network namespace that it runs in; ours where it is absent. */
  readonly network?: Pick<NetworkNamespace, 'run'>;
  /** The control group that it is moved to at once; ours where it is absent. */
  readonly controlGroup?: Pick<ControlGroup, 'add'> | undefined;
}

/** The variable in a helper's environment that says which sandbox's directory it works for. */
export const sandboxVariable = 'KILN_SANDBOX_DIR';

/** signal(7). */
const SIGKILL = 9;

/** What of a program's output goes into an error message. */
const lastWordsBytes = 2048;

/**
 * Starts a program in a session of its own, so that no signal of a terminal reaches it.
 * Throws `failed-precondition` naming the program when it cannot be executed.
 */
export async function startHelper(options: HelperOptions): Promise<HelperProcess> {
  const { directory, statusPipe = false, inherit = [] } = options;
  const logFile = path.join(directory, options.logName);
  using stack = new DisposableStack();
  // Appending, so that the program's own processes do not overwrite each other's lines.
  const { O_WRONLY, O_CREAT, O_TRUNC, O_APPEND } = constants;
  const log = stack.adopt(openSync(logFile, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0o600), closeSync);
  let status = Promise.resolve('');
  const fds: (number | null)[] = [null, log, log];
  if (statusPipe) {
    const { read, write } = pipe2();
    stack.defer(() => closeSync(write));
    status = readAll(socketFromFd(read, 'read'));
    fds.push(write);
  }
  const pid = run(options, [...fds, ...inherit]);
  // Nobody else knows it, should kilnd have no descriptor left for it.
  const unknown = stack.use(new DisposableStack());
  unknown.defer(() => void process.kill(pid, 'SIGKILL'));
  resetOomScore(pid);
  // There as long as nobody has waited for it, and that is only us.
  const handle = ProcessHandle.open(pid);
  if (handle === undefined) throw new KilnError('internal', `${options.title} (pid ${pid}) was taken from Kiln`);
  const grouped = options.controlGroup?.add(pid);
  // Until we have waited for it, its pid is nobody else's.
  const exited = Promise.allSettled([handle.ended, grouped]).then(() => exitOf(pid));
  const kill = async () => {
    handle.kill(SIGKILL);
    await exited;
  };
  try {
    await grouped;
  } catch (error) {
    unknown.move();
    await kill();
    throw error;
  }
  const identity = identityOf(pid);
  if (!options.quiet) limitUntil(exited, logFile);
  unknown.move();
  return { pid, identity, exited, status, ...wordsIn(logFile), kill, [Symbol.asyncDispose]: kill };
}

/** @returns the process id of the program, which is our child and none of Node's: see spawn.ts */
function run(options: HelperOptions, fds: (number | null)[]) {
  const { program, args, directory, workingDirectory = '/', network, ...named } = options;
  const searchPath = process.env.PATH ?? '/usr/sbin:/usr/bin:/sbin:/bin';
  const env = { PATH: searchPath, [sandboxVariable]: directory };
  try {
    const how = { path: findProgram(program, searchPath) ?? program, args, env, workingDirectory, fds };
    return network === undefined ? posixSpawn(how) : network.run(() => posixSpawn(how));
  } catch (cause) {
    throw cannotRun({ program, ...named }, cause);
  }
}

/** How a child of ours has ended. */
function exitOf(pid: number): ProcessExit {
  const exit = waitpid(pid);
  if (exit?.kind !== 'signaled') return { code: exit?.code ?? null, signal: null };
  return { code: null, signal: signalName(exit.signal) ?? 'SIGKILL' };
}

/** Takes over a helper that an earlier kilnd has started; undefined when it has ended. */
export function adoptHelper(
  identity: ProcessIdentity,
  { directory, logName, quiet = false }: Pick<HelperOptions, 'directory' | 'logName' | 'quiet'>,
): HelperProcess | undefined {
  const handle = ProcessHandle.open(identity.pid);
  if (handle === undefined) return undefined;
  // Looked at with the handle open, so that it is this process and no other.
  if (!isAlive(identity)) {
    handle[Symbol.dispose]();
    return undefined;
  }
  const logFile = path.join(directory, logName);
  const exited = handle.ended.then(() => ({ code: null, signal: null }));
  if (!quiet) limitUntil(exited, logFile);
  const kill = async () => {
    handle.kill(SIGKILL);
    await exited;
  };
  return {
    pid: identity.pid,
    identity,
    exited,
    status: Promise.resolve(''),
    ...wordsIn(logFile),
    kill,
    [Symbol.asyncDispose]: kill,
  };
}

function limitUntil(exited: Promise<ProcessExit>, logFile: string): void {
  const limit = limitLog(logFile);
  void exited.then(() => limit[Symbol.dispose]());
}

/**
 * The process once it runs: a program that ends at once can be told from one that was not found.
 * Throws `failed-precondition` naming the program when it cannot be executed.
 */
export async function spawned(
  options: Pick<HelperOptions, 'program' | 'args' | 'title' | 'hint'>,
  how: SpawnOptions,
): Promise<{ child: ChildProcess; exited: Promise<ProcessExit> }> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  try {
    // Some errors (the path is a directory, no memory) are thrown, the others are events.
    const child = spawn(options.program, options.args, how);
    child.once('spawn', resolve);
    // For good: a signal that cannot be sent is an error event later, and unheard it would end kilnd.
    child.on('error', reject);
    const exited = new Promise<ProcessExit>((end) => {
      child.once('exit', (code, signal) => end({ code, signal }));
    });
    await promise;
    return { child, exited };
  } catch (cause) {
    throw cannotRun(options, cause);
  }
}

function cannotRun({ title, program, hint }: Pick<HelperOptions, 'program' | 'title' | 'hint'>, cause: unknown) {
  const { code, message } = cause as NodeJS.ErrnoException;
  return new KilnError('failed-precondition', `cannot run ${title} "${program}": ${code ?? message}`, { hint, cause });
}

function wordsIn(logFile: string): Pick<HelperProcess, 'lastWords' | 'outputTail'> {
  return {
    lastWords: () => lastLines(endOf(logFile, lastWordsBytes)),
    outputTail: (maxBytes) => printable(endOf(logFile, maxBytes)).trim(),
  };
}

/** The end of a log, which can be long: a guest can make its VMM complain. */
function endOf(logFile: string, maxBytes: number): string {
  let fd: number | undefined;
  try {
    fd = openSync(logFile, 'r');
    const size = fstatSync(fd).size;
    const bytes = Buffer.alloc(Math.min(size, maxBytes));
    const length = readSync(fd, bytes, 0, bytes.length, size - bytes.length);
    return bytes.toString('utf8', 0, length);
  } catch {
    return ''; // The sandbox's directory is gone.
  } finally {
    if (fd !== undefined) closeSync(fd);
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
