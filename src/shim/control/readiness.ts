/**
 * How kilnd tells the launcher that started it whether it is ready.
 *
 * The launcher waits on a pipe whose write end is kilnd's descriptor KILN_READY_FD. It takes `ready\n` (connections are
 * accepted: containerd may dial at once) or `error: text`, which containerd shows to the user. A pipe that closes without
 * either means that kilnd died. A kilnd started by hand, or by systemd, has no such pipe, and nothing happens.
 */
import { closeSync, writeSync } from 'node:fs';
import { KilnError } from '../../errors.ts';

export class Readiness {
  #fd: number | null;

  private constructor(fd: number | null) {
    this.#fd = fd;
  }

  /** Takes the descriptor named in `environment`, and the variable out of it: children must not think it theirs. */
  static take(environment: NodeJS.ProcessEnv): Readiness {
    const value = environment.KILN_READY_FD;
    delete environment.KILN_READY_FD;
    return new Readiness(value !== undefined && /^[1-9]\d{0,3}$/.test(value) ? Number(value) : null);
  }

  /** Call once, when the control socket accepts connections. */
  ready(): void {
    this.#say('ready\n');
  }

  /** Call when the start failed. Does nothing after `ready`. */
  failed(error: unknown): void {
    this.#say(`error: ${KilnError.from(error).userMessage}\n`);
  }

  #say(text: string): void {
    const fd = this.#fd;
    if (fd === null) return;
    this.#fd = null;
    try {
      writeSync(fd, text);
      closeSync(fd);
    } catch (error) {
      // The launcher was killed while it waited: what it wanted to hear no longer matters, we serve the next one.
      const code = (error as NodeJS.ErrnoException).code;
      if (code !== 'EPIPE' && code !== 'EBADF') throw error;
      if (code === 'EPIPE') closeSync(fd);
    }
  }
}
