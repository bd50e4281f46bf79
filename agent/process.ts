/**
 * A process of a container that the host knows by a name: its init, or one that was exec'd. From when it exists until it
 * is removed; its exit is kept for whoever asks late.
 */
import { CLOCK_REALTIME, clockGettime } from '../src/sys/clock.ts';
import type { Exit } from '../src/sys/process.ts';
import { AgentError } from './errors.ts';
import type { Reaper } from './reaper.ts';
import type { ProcessStdio } from './stdio.ts';

/** A process of a container: the init process has the empty exec id. */
export interface ProcessName {
  readonly id: string;
  readonly execId: string;
}

export interface ProcessExit {
  /** 0 to 255; 128 + n for signal n. */
  readonly status: number;
  /** CLOCK_REALTIME in nanoseconds when it was seen. */
  readonly atNs: bigint;
  /** Bytes that each stream had when the process ended; undefined where there is none, or none can be told. */
  readonly stdoutBytes: number | undefined;
  readonly stderrBytes: number | undefined;
}

export class Process implements Disposable {
  readonly pid: number;
  readonly stdio: ProcessStdio;
  readonly #ended = Promise.withResolvers<ProcessExit>();
  #exit: ProcessExit | undefined;

  /**
   * Watches the process, which the reaper has been held for since before it existed; takes the stdio over.
   *
   * @param onExit told of the exit before anybody else; returns it as it is to be told
   */
  constructor(
    pid: number,
    stdio: ProcessStdio,
    reaper: Reaper,
    onExit: (seen: ProcessExit) => ProcessExit = (seen) => seen,
  ) {
    this.pid = pid;
    this.stdio = stdio;
    reaper.watch(pid, (exit) => {
      this.#exit = onExit({
        status: statusOf(exit),
        atNs: clockGettime(CLOCK_REALTIME),
        stdoutBytes: stdio.stdout?.written(),
        stderrBytes: stdio.stderr?.written(),
      });
      this.#ended.resolve(this.#exit);
    });
  }

  /** How it ended, or undefined while it runs. */
  get exit(): ProcessExit | undefined {
    return this.#exit;
  }

  /** Resolves when it has ended. */
  get ended(): Promise<ProcessExit> {
    return this.#ended.promise;
  }

  [Symbol.dispose](): void {
    this.stdio[Symbol.dispose]();
  }
}

/** As a shell tells it. */
function statusOf(exit: Exit): number {
  return exit.kind === 'exited' ? exit.code : 128 + exit.signal;
}

/**
 * kill(2).
 *
 * @returns false when the process has ended
 * @throws AgentError invalid-argument when there is no such signal
 */
export function kill(pid: number, signal: number): boolean {
  try {
    process.kill(pid, signal);
    return true;
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ESRCH') return false;
    // Node's own word for what is no number of 31 bits.
    if (code === 'EINVAL' || code === 'ERR_UNKNOWN_SIGNAL')
      throw new AgentError('invalid-argument', `there is no signal ${signal}`);
    throw error;
  }
}
