import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import path from 'node:path';
import type { Duplex } from 'node:stream';
import { KilnError } from '../../errors.ts';
import { isEnding } from '../../host/process-identity.ts';

/** Beside the `kiln` command: the bundle is dist/lib/kiln.mjs. */
const program = path.resolve(import.meta.dirname, '../libexec/kiln-process');

export interface ProcessOptions {
  /** In the foreground it is our child; else it is left to the caller's subreaper. */
  readonly foreground: boolean;
  /** A path, "-" for a new one, "=" to stay in ours. */
  readonly networkNamespace: string;
  /** The container's root filesystem on the host. */
  readonly rootfs: string;
  /** Where the FIFOs of its stdio are made. */
  readonly directory: string;
  /** The path of the container's socket. */
  readonly address: string;
  /** kilnd's. */
  readonly id: string;
  /** Empty for the container's own process. */
  readonly execId: string;
  /** "none", "own", or the path of a console socket. */
  readonly terminal: string;
}

/** A process on the host that stands for one in the guest: native/process.c. */
export interface StandingProcess {
  readonly pid: number;
  /** The process exists in kilnd: it is followed from now on. */
  go(): void;
  /** Before `go`: it ends. */
  abandon(): void;
  /** Resolves with the exit status of one in the foreground. */
  readonly exited: Promise<number>;
}

/** The FIFOs that kilnd is to use, as Create and Exec name them. */
export function stdioPaths({ directory, terminal }: Pick<ProcessOptions, 'directory' | 'terminal'>) {
  return {
    stdin: path.join(directory, 'stdin'),
    stdout: path.join(directory, 'stdout'),
    stderr: terminal === 'none' ? path.join(directory, 'stderr') : '',
    terminal: terminal !== 'none',
  };
}

/** @throws KilnError failed-precondition with what it could not do */
export async function startProcess(options: ProcessOptions): Promise<StandingProcess> {
  const { foreground, networkNamespace, rootfs, directory, address, id, execId, terminal } = options;
  const args = [foreground ? 'fg' : 'bg', networkNamespace, rootfs, directory, address, id, execId, terminal];
  const child = spawn(program, args, { stdio: ['inherit', 'inherit', 'inherit', 'pipe'], detached: !foreground });
  const exited = exitOf(child);
  const status = child.stdio[3] as Duplex;
  const text = await answerOn(status);
  const pid = /^ready (\d+)$/.exec(text)?.[1];
  if (pid === undefined) {
    const reason = text.replace(/^error: /, '') || `${program} ended at once`;
    throw new KilnError('failed-precondition', `cannot start the process that stands for the container's: ${reason}`);
  }
  return {
    pid: Number(pid),
    go: () => status.end('go\n'),
    abandon: () => status.destroy(),
    exited,
  };
}

/** Its first line, or what it said before it ended. */
async function answerOn(status: Duplex): Promise<string> {
  let text = '';
  try {
    while (!text.includes('\n') && !status.readableEnded) {
      const [chunk] = await Promise.race([once(status, 'data'), once(status, 'end').then(() => [undefined])]);
      if (chunk === undefined) break;
      text += String(chunk);
    }
  } catch {
    // What it said is what counts.
  }
  return text.trim();
}

async function exitOf(child: ChildProcess): Promise<number> {
  const [code] = await once(child, 'exit');
  return code ?? 255;
}

/** Whether a process that was started for an exec or a container still runs. One that its parent has yet to wait for does not. */
export function runs(pid: number): boolean {
  try {
    return readFileSync(`/proc/${pid}/comm`, 'utf8').trim() === 'kiln-process' && !isEnding(pid);
  } catch {
    return false;
  }
}
