/**
 * Firecracker's metrics: one line of JSON at the start, each minute and at the end, as groups of numbers that begin at zero
 * with each line (v1.16 src/vmm/src/logger/metrics.rs). Here they are added up.
 */

import { CounterSums } from '../../observe/counter-sums.ts';
import type { Logger } from '../../observe/logger.ts';
import { LineLimit } from './line-limit.ts';

/** Groups that say what others say as well (a drive's), or do not add up (durations). */
const leftOut = /^(block_|net_|pmem_|latencies_us$)/;

/** Counters of which none should ever be. */
const failures = /(_fails|failures|_faults|panic_count|^sig[a-z]+|missed_(log|metrics)_count|invalid_reqs_count)$/;

/** One a minute is what it writes. */
const linesPerMinute = 10;

/** Names of a Firecracker that was taken over are its own choice; the real one has some 300 counters. */
const maxCounters = 1000;

export class FirecrackerMetrics {
  readonly #logger: Logger;
  readonly #limit = new LineLimit(linesPerMinute);
  readonly #totals = new CounterSums(maxCounters);
  readonly #count: (counter: string, by: number) => void;

  /** @param count gets all that is counted, too */
  constructor(logger: Logger, count: (counter: string, by: number) => void = () => {}) {
    this.#logger = logger;
    this.#count = count;
  }

  /** Everything that was counted, by "group.name". */
  get totals(): Readonly<Record<string, number>> {
    return this.#totals.sums;
  }

  /** Adds a line; one that is torn, since the FIFO was full, is lost. New failures are told at warning level. */
  add(line: string): void {
    if (this.#limit.take(performance.now()) === 'no') return;
    const failed: Record<string, number> = {};
    for (const [name, value] of countersIn(line)) {
      this.#totals.add(name, value);
      this.#count(name, value);
      if (failures.test(name.slice(name.indexOf('.') + 1))) failed[name] = value;
    }
    if (Object.keys(failed).length > 0) this.#logger.warn({ failed }, 'Firecracker counts failures');
  }
}

/** The counters that are not zero. */
function countersIn(line: string): [string, number][] {
  const groups = Object.entries(parse(line)).filter(([group]) => !leftOut.test(group));
  return groups.flatMap(([group, counters]) => {
    if (typeof counters !== 'object' || counters === null) return [];
    const numbers = Object.entries(counters).filter(([name, value]) => isCount(value) && !name.endsWith('_us'));
    return numbers.map(([name, value]): [string, number] => [`${group}.${name}`, value]);
  });
}

function isCount(value: unknown): boolean {
  return typeof value === 'number' && Number.isSafeInteger(value) && value > 0;
}

function parse(line: string): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(line);
    return typeof value === 'object' && value !== null ? { ...value } : {};
  } catch {
    return {};
  }
}
