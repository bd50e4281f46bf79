/**
 * Freezing a container: cgroup v2's freezer, "cgroup.freeze" in Documentation/admin-guide/cgroup-v2.rst.
 *
 * Writing 1 asks every process of the group, and of those below it, to stop; `frozen 1` in cgroup.events says that all
 * have. A frozen process takes no signal but SIGKILL, which ends it; the others wait for it to go on.
 */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseFlatKeyed, readIfThere, watchFile } from './cgroup-file.ts';
import { AgentError } from './errors.ts';

/**
 * Milliseconds that the processes may take to stop. They do so on their way out of the kernel; one that waits there for
 * a disk or a server (state D) comes late.
 */
const freezeLimitMs = 10_000;

export class Freezer {
  readonly #id: string;
  readonly #cgroup: string;
  readonly #limitMs: number;
  #state: 'running' | 'pausing' | 'paused' = 'running';

  /** @param id the container's id, for messages */
  constructor(id: string, cgroup: string, limitMs = freezeLimitMs) {
    this.#id = id;
    this.#cgroup = cgroup;
    this.#limitMs = limitMs;
  }

  /**
   * Freezes the group, then calls `settle`; resolves when that has. When either fails, the group goes on as before.
   *
   * @throws AgentError failed-precondition when it is frozen already, internal when it does not freeze in time
   */
  async pause(settle: () => Promise<void>): Promise<void> {
    if (this.#state !== 'running') throw this.#refusal('pause');
    this.#state = 'pausing';
    try {
      await this.#freeze();
      await settle();
      this.#state = 'paused';
    } catch (error) {
      this.#thaw();
      throw error;
    }
  }

  /** From the moment that it is to be frozen until it goes on. */
  get paused(): boolean {
    return this.#state !== 'running';
  }

  /** @throws AgentError failed-precondition when it is not frozen */
  resume(): void {
    if (this.#state !== 'paused') throw this.#refusal('resume');
    this.#thaw();
  }

  /** Resolves when all have stopped, or are gone. */
  async #freeze(): Promise<void> {
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const look = () => {
      const events = readIfThere(join(this.#cgroup, 'cgroup.events'));
      if (events === undefined || parseFlatKeyed(events).frozen === 1n) resolve();
    };
    using _watch = watchFile(join(this.#cgroup, 'cgroup.events'), look);
    const timer = setTimeout(() => {
      const seconds = this.#limitMs / 1000;
      reject(
        new AgentError(
          'internal',
          `container "${this.#id}" did not freeze within ${seconds} s: a process of it is busy in the kernel`,
        ),
      );
    }, this.#limitMs);
    try {
      this.#write('1');
      look();
      await promise;
    } finally {
      clearTimeout(timer);
    }
  }

  #thaw(): void {
    this.#write('0');
    this.#state = 'running';
  }

  #write(value: '0' | '1'): void {
    // r+, so that nothing is created where no such group is.
    writeFileSync(join(this.#cgroup, 'cgroup.freeze'), value, { flag: 'r+' });
  }

  #refusal(action: string): AgentError {
    return new AgentError('failed-precondition', `cannot ${action} container "${this.#id}": it is ${this.#state}`);
  }
}
