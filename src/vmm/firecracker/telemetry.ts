import type { Logger } from '../../observe/logger.ts';
import { FifoLines } from './fifo-lines.ts';
import { FirecrackerLog } from './log.ts';
import { FirecrackerMetrics } from './metrics.ts';
import type { FirecrackerOptions } from './options.ts';
import type { Place } from './place.ts';

/** A line of metrics has some 10 KiB; one that is longer than a FIFO would be torn anyway. pipe(7). */
const maxLogLine = 4 * 1024;
const maxMetricsLine = 64 * 1024;

type Listeners = Pick<FirecrackerOptions, 'logger' | 'count'>;

/** What a Firecracker says of itself, from its two FIFOs into Kiln's log. */
export class Telemetry implements Disposable {
  readonly log: FirecrackerLog;
  readonly #metrics: FirecrackerMetrics;
  readonly #logger: Logger;
  readonly #lines: readonly FifoLines[];
  #ended = false;

  private constructor(place: Place, { logger, count }: Listeners) {
    this.#logger = logger;
    this.log = new FirecrackerLog(logger);
    this.#metrics = new FirecrackerMetrics(logger, count);
    const log = new FifoLines(place.fifo('log').host, maxLogLine, (line) => this.log.add(line));
    const metrics = new FifoLines(place.fifo('metrics').host, maxMetricsLine, (line) => this.#metrics.add(line));
    this.#lines = [log, metrics];
  }

  /** Makes the FIFOs and listens. @returns the arguments that tell Firecracker of them, too */
  static begin(place: Place, listeners: Listeners): { telemetry: Telemetry; args: readonly string[] } {
    const [log, metrics] = [place.makeFifo('log'), place.makeFifo('metrics')];
    const args = ['--log-path', log.inside, '--level', 'Info', '--show-level', '--metrics-path', metrics.inside];
    return { telemetry: new Telemetry(place, listeners), args };
  }

  /** Listens again, for a VM that was taken over. What was said meanwhile and has found room is still there. */
  static resume(place: Place, listeners: Listeners): Telemetry {
    return new Telemetry(place, listeners);
  }

  /** Takes the last words of a Firecracker that has ended, and lets go of the FIFOs. Safe to call twice. */
  end(): void {
    if (this.#ended) return;
    this.#ended = true;
    for (const lines of this.#lines) lines.drain();
    this.#logger.debug({ counters: this.#metrics.totals }, "Firecracker's counters");
    for (const lines of this.#lines) lines[Symbol.dispose]();
  }

  [Symbol.dispose](): void {
    this.end();
  }
}
