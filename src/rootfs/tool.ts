import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { KilnError } from '../errors.ts';
import { resetOomScore } from '../host/oom-score.ts';

/** So much of a program's output is kept, from its end. */
const keptOutputBytes = 16 * 1024;

export interface ToolOptions {
  readonly cwd?: string;
  readonly signal?: AbortSignal;
  /** What to do when the program is not there. */
  readonly hint: string;
}

export interface ToolResult {
  /** Exit code, or null when a signal ended the program. */
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  /** stdout and stderr together, lines in the order they came, the last 16 KiB. */
  readonly output: string;
}

/**
 * Runs a program to its end. Abort kills it with all its children, and this rejects with the signal's reason only when
 * they have ended: nothing writes any more.
 *
 * The environment is empty but for PATH and the C locale: mkfs.erofs changes every time stamp when SOURCE_DATE_EPOCH
 * is set, mke2fs reads MKE2FS_CONFIG.
 *
 * @throws KilnError failed-precondition when the program cannot be started
 */
export async function runTool(program: string, args: readonly string[], options: ToolOptions): Promise<ToolResult> {
  const { signal, cwd, hint } = options;
  signal?.throwIfAborted();
  const child = spawn(program, args, {
    // A process group of its own, which can be killed as a whole.
    detached: true,
    cwd: cwd ?? '/',
    env: {
      PATH: `${process.env.PATH ?? ''}:/usr/sbin:/usr/bin:/sbin:/bin`,
      LC_ALL: 'C',
      // The newer mount API cuts an option's value off at 256 bytes (fsconfig(2)); mount(2) takes a page.
      LIBMOUNT_FORCE_MOUNT2: 'always',
      MKE2FS_CONFIG: '/dev/null',
    },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  // Unheard, the error of a process that could not be made (no descriptors left) would end kilnd.
  child.on('error', () => {});
  const closed = once(child, 'close');
  closed.catch(() => {});
  if (child.pid !== undefined) resetOomScore(child.pid);
  let output = '';
  const keep = (chunk: string) => {
    output = (output + chunk).slice(-keptOutputBytes);
  };
  child.stdout?.setEncoding('utf8').on('data', keep);
  child.stderr?.setEncoding('utf8').on('data', keep);
  const kill = () => {
    if (child.pid === undefined) return;
    try {
      process.kill(-child.pid, 'SIGKILL');
    } catch {
      // All of them have ended by themselves.
    }
  };
  signal?.addEventListener('abort', kill, { once: true });
  try {
    const [code, endedBy] = (await closed) as [number | null, NodeJS.Signals | null];
    signal?.throwIfAborted();
    return { code, signal: endedBy, output };
  } catch (error) {
    signal?.throwIfAborted();
    throw new KilnError('failed-precondition', `cannot run ${program}: ${(error as Error).message}`, {
      hint,
      cause: error,
    });
  } finally {
    signal?.removeEventListener('abort', kill);
  }
}

/** What a program said last, for an error message; how it ended when it said nothing. */
export function lastLine({ output, code, signal }: ToolResult): string {
  const line = output.trimEnd().split('\n').at(-1)?.trim() ?? '';
  if (line !== '') return line;
  return signal === null ? `exit code ${code}` : `killed by ${signal}`;
}
