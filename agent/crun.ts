/**
 * crun(1), the OCI runtime that makes the containers. This is the only file that knows it.
 *
 * `create` makes everything up to the user's program and leaves the container's init behind, which waits on a FIFO; it
 * inherits crun's own stdin, stdout and stderr. `start` lets it go on. `delete` removes what crun keeps, and the cgroup.
 * As crun's stderr is the container's, its errors come through a log file. The log is text, not JSON: when the program
 * turns out to be no program only after `start`, the container's init writes crun's message to the container's stderr,
 * in the log's format, and there a user reads it.
 */
import { closeSync, constants, openSync, readFileSync, rmSync, unlinkSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { type Exit, signalName } from '../src/sys/process.ts';
import { posixSpawn, type Spawn } from '../src/sys/spawn.ts';
import { AgentError } from './errors.ts';
import { type CommandLine, withOomScore } from './oom-score.ts';
import type { Reaper } from './reaper.ts';
import type { ProcessStdio, ProgramStdio } from './stdio.ts';

/** What crun has to know of a process's stdio. */
export type CrunStdio = Pick<ProcessStdio, 'forProgram' | 'consoleSocket'>;

export interface CrunOptions {
  /** The program; a name is looked up in PATH. */
  readonly command: string;
  /** Where crun keeps its state. */
  readonly root: string;
  /** kiln-oom-score, which starts crun with the OOM score of a container. */
  readonly oomScoreProgram: string;
  readonly reaper: Reaper;
}

/** What a container has whose spec names no oomScoreAdj, or 0, of which crun 1.8 makes no difference: it sets neither. */
const defaultOomScore = 0;

const noStdio: ProgramStdio = [null, null, null];

export class Crun {
  readonly #options: CrunOptions;

  constructor(options: CrunOptions) {
    this.#options = options;
  }

  /**
   * crun create. The caller holds the reaper meanwhile, and then watches the process.
   *
   * @param bundle the directory of config.json; crun's log and pid file go there, too
   * @returns the process id of the container's init
   * @throws AgentError invalid-argument with crun's reason, internal when crun was killed; nothing of the container is
   *   left then
   */
  async create(id: string, bundle: string, stdio: CrunStdio): Promise<number> {
    const pidFile = join(bundle, 'init.pid');
    const args = ['create', '--bundle', bundle, '--pid-file', pidFile, ...consoleOption(stdio), id];
    try {
      await this.#run(args, bundle, stdio.forProgram, defaultOomScore);
    } catch (error) {
      throw refused(error, join(bundle, 'config.json'));
    }
    return Number(readFileSync(pidFile, 'utf8'));
  }

  /**
   * crun exec --detach, with the process of process.json. The caller holds the reaper meanwhile, and then watches it.
   *
   * @param directory of process.json; crun's log and pid file go there, too
   * @param oomScore of the process
   * @returns its process id
   * @throws AgentError invalid-argument with crun's reason, internal when crun was killed; nothing of the process is left
   *   then
   */
  async exec(id: string, directory: string, stdio: CrunStdio, oomScore: number): Promise<number> {
    const pidFile = join(directory, 'pid');
    const file = join(directory, 'process.json');
    const args = ['exec', '--detach', '--process', file, '--pid-file', pidFile, ...consoleOption(stdio), id];
    try {
      await this.#run(args, directory, stdio.forProgram, oomScore);
    } catch (error) {
      throw refused(error, file);
    }
    return Number(readFileSync(pidFile, 'utf8'));
  }

  /**
   * What `crun start` does, without a process for it; where this crun does it in another way, it is asked.
   *
   * @throws AgentError internal with crun's reason
   */
  async start(id: string, bundle: string): Promise<void> {
    if (letGo(join(this.#options.root, id, 'exec.fifo'))) return;
    try {
      await this.#run(['start', id], bundle, noStdio);
    } catch (error) {
      if (error instanceof CrunFailure)
        throw new AgentError('internal', `cannot start container "${id}": ${error.message}`);
      throw error;
    }
  }

  /** crun delete --force: kills what is left of it. Deleting what is not there is no error. */
  async delete(id: string, bundle: string): Promise<void> {
    try {
      await this.#run(['delete', '--force', id], bundle, noStdio);
    } catch (error) {
      if (error instanceof CrunFailure)
        throw new AgentError('internal', `cannot delete container "${id}": ${error.message}`);
      throw error;
    }
  }

  /** @param oomScore of crun itself, and so of the container's process unless crun sets another; ours when absent */
  async #run(args: readonly string[], bundle: string, stdio: ProgramStdio, oomScore?: number): Promise<void> {
    const { command, root, oomScoreProgram, reaper } = this.#options;
    const log = join(bundle, 'crun.log');
    rmSync(log, { force: true });
    const global = ['--root', root, '--cgroup-manager=cgroupfs', '--log', log, '--log-format', 'text'];
    const line: CommandLine = [command, ...global, ...args];
    const [path, ...rest] = oomScore === undefined ? line : withOomScore(oomScore, oomScoreProgram, line);
    const exit = await run(reaper, { path, args: rest, env: process.env, workingDirectory: bundle, fds: stdio });
    const killed = exit.kind === 'signaled';
    if (!killed && exit.code === 0) return;
    const how = killed ? (signalName(exit.signal) ?? `signal ${exit.signal}`) : `status ${exit.code}`;
    throw new CrunFailure(lastError(log) ?? `crun ${args[0]} ended with ${how} and no message`, killed);
  }
}

/**
 * Has a container's init go on: crun (src/libcrun/status.c, libcrun_status_write_exec_fifo; the same in all versions up to 1.28)
 * takes the FIFO's name away, and writes one byte. A FIFO without a name is also how crun knows that a container was started.
 *
 * @returns false when there is no such FIFO, or nobody at its other end
 */
export function letGo(fifo: string): boolean {
  let fd: number;
  try {
    fd = openSync(fifo, constants.O_WRONLY | constants.O_NONBLOCK);
  } catch {
    return false;
  }
  try {
    unlinkSync(fifo);
    writeSync(fd, Buffer.alloc(1));
    return true;
  } finally {
    closeSync(fd);
  }
}

/** Runs a program to its end. Node's own `spawn` would copy the page tables of all that the agent has (sys/spawn.ts). */
async function run(reaper: Reaper, program: Spawn): Promise<Exit> {
  let pid: number;
  try {
    pid = posixSpawn(program);
  } catch (error) {
    const reason = (error as Error).message;
    throw new AgentError('internal', `cannot run ${program.path} in the guest: ${reason}`, { cause: error });
  }
  return new Promise((resolve) => reaper.watch(pid, resolve));
}

class CrunFailure extends Error {
  /** Whether crun was killed, so that the failure says nothing of what was asked for. */
  readonly killed: boolean;

  constructor(message: string, killed: boolean) {
    super(message);
    this.killed = killed;
  }
}

/** The last line of a crun log, its error; undefined when there is none. */
function lastError(log: string): string | undefined {
  try {
    return readFileSync(log, 'utf8').trimEnd().split('\n').at(-1) || undefined;
  } catch {
    return undefined;
  }
}

function consoleOption({ consoleSocket }: CrunStdio): string[] {
  return consoleSocket === undefined ? [] : ['--console-socket', consoleSocket];
}

interface ProcessJson {
  readonly args?: readonly unknown[];
}

/**
 * What the host is told when crun refuses to make a process.
 *
 * @param file the config.json or process.json that crun was given
 */
function refused(error: unknown, file: string): unknown {
  if (!(error instanceof CrunFailure)) return error;
  const code = error.killed ? 'internal' : 'invalid-argument';
  return new AgentError(code, explain(error.message, programOf(file)), { cause: error });
}

/** The program that a config.json or a process.json names; empty where there is none to be read. */
function programOf(file: string): string {
  try {
    const json = JSON.parse(readFileSync(file, 'utf8')) as ProcessJson & { readonly process?: ProcessJson };
    return String((json.process ?? json).args?.[0] ?? '');
  } catch {
    return '';
  }
}

/**
 * crun's reason in the words that users of runc and Docker know.
 *
 * @param program the first of the spec's args
 */
export function explain(message: string, program: string): string {
  const missing = /^executable file `(.*)` not found/.exec(message)?.[1];
  if (missing?.includes('/')) return `exec: "${missing}": stat ${missing}: no such file or directory`;
  if (missing !== undefined) return `exec: "${missing}": executable file not found in $PATH`;
  const unusable = /^open executable: (.*)$/.exec(message)?.[1];
  if (unusable !== undefined) return `exec: "${program}": ${unusable.toLowerCase()}`;
  if (message === 'error loading config.json') return 'the OCI spec is malformed: crun cannot load it as config.json';
  return message;
}
