/**
 * Telling the host that processes of a container were killed because memory ran out.
 *
 * memory.events counts them as `oom_kill`: victims of the group's own limit, and of an OOM of the whole machine. The
 * kernel counts before it kills, so that who sees the process end finds it counted. It tells of a change by inotify, at
 * most once in 10 ms, so that one OOM that kills several is one message.
 */
import { join } from 'node:path';
import { parseFlatKeyed, readIfThere, watchFile } from './cgroup-file.ts';

export class OomWatch implements Disposable {
  readonly #file: string;
  readonly #watch: Disposable;
  readonly #told = new Map<(kills: bigint) => void, bigint>();

  /** @param cgroup the group's directory; it exists */
  constructor(cgroup: string) {
    this.#file = join(cgroup, 'memory.events');
    this.#watch = watchFile(this.#file, () => this.#tell());
  }

  /** Calls `onKills` with the number of killed processes whenever it has grown, until disposed; at once if it is not 0. */
  follow(onKills: (kills: bigint) => void): Disposable {
    this.#told.set(onKills, 0n);
    this.#tell();
    return { [Symbol.dispose]: () => void this.#told.delete(onKills) };
  }

  #tell(): void {
    const kills = parseFlatKeyed(readIfThere(this.#file) ?? '').oom_kill ?? 0n;
    for (const [onKills, told] of this.#told) {
      if (kills <= told) continue;
      this.#told.set(onKills, kills);
      onKills(kills);
    }
  }

  [Symbol.dispose](): void {
    this.#watch[Symbol.dispose]();
    this.#told.clear();
  }
}
