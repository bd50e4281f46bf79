/**
 * Telling the host that processes of a container were killed because memory ran out.
 *
 * memory.events counts them as `oom_kill`: victims of the group's own limit, and of an OOM of the whole machine. The
 * kernel counts before it kills, so that who sees the process end finds it counted. It tells of a change by inotify, at
 * most once in 10 ms, so that one OOM that kills several is one message.
 */
import { join } from 'node:path';
import { parseFlatKeyed, readIfThere, watchFile } from './cgroup-file.ts';

/** The part of a gRPC server stream that is used here. */
export interface OomSink {
  write(message: { kills: bigint }): unknown;
  end(): void;
  on(event: 'cancelled' | 'close', listener: () => void): unknown;
}

export class OomWatch implements Disposable {
  readonly #file: string;
  readonly #watch: Disposable;
  readonly #sinks = new Map<OomSink, bigint>();

  /** @param cgroup the group's directory; it exists */
  constructor(cgroup: string) {
    this.#file = join(cgroup, 'memory.events');
    this.#watch = watchFile(this.#file, () => this.#tell());
  }

  /** Sends the number of killed processes whenever it has grown; at once if it is not 0. Ends the sink with the watch. */
  relayTo(sink: OomSink): void {
    this.#sinks.set(sink, 0n);
    const leave = () => this.#sinks.delete(sink);
    sink.on('cancelled', leave);
    sink.on('close', leave);
    this.#tell();
  }

  #tell(): void {
    const kills = parseFlatKeyed(readIfThere(this.#file) ?? '').oom_kill ?? 0n;
    for (const [sink, told] of this.#sinks) {
      if (kills <= told) continue;
      this.#sinks.set(sink, kills);
      sink.write({ kills });
    }
  }

  [Symbol.dispose](): void {
    this.#watch[Symbol.dispose]();
    for (const sink of this.#sinks.keys()) sink.end();
    this.#sinks.clear();
  }
}
