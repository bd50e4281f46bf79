/** The moments of a container's life that the start time is made of, in their usual order. */
export const timelineMarks = [
  'launcher',
  'request',
  'vmm-spawned',
  'vm-restored',
  'vm-taken',
  'kernel-up',
  'agent-connected',
  'rootfs-ready',
  'rootfs-attached',
  'created',
  'started',
  'exited',
  'deleted',
] as const;

export type TimelineMark = (typeof timelineMarks)[number];

export interface TimelineEntry {
  readonly name: TimelineMark;
  /** Milliseconds since the Unix epoch, with fractions. */
  readonly atMs: number;
  /** Milliseconds since the first mark. */
  readonly sinceStartMs: number;
  /** Milliseconds since the mark before. */
  readonly sincePreviousMs: number;
}

export interface TimelineJson {
  readonly marks: readonly TimelineEntry[];
  /** Milliseconds from the first mark to the last. */
  readonly totalMs: number;
}

/**
 * When what happened while a container was started and stopped. Marks come from three clocks (the launcher's, kilnd's,
 * the guest's) and in any order, so they are kept as wall-clock time and sorted when read.
 */
export class Timeline {
  readonly #marks = new Map<TimelineMark, number>();
  readonly #onMark: (name: TimelineMark) => void;

  /** @param onMark called once for each mark */
  constructor(onMark: (name: TimelineMark) => void = () => {}) {
    this.#onMark = onMark;
  }

  /**
   * Notes that something happened, now or at `atMs` (milliseconds since the Unix epoch). Only the first note counts:
   * a retried or idempotent call must not move a moment.
   */
  mark(name: TimelineMark, atMs: number = nowMs()): void {
    if (this.#marks.has(name)) return;
    this.#marks.set(name, atMs);
    this.#onMark(name);
  }

  /** Milliseconds since the Unix epoch, or undefined when it has not happened. */
  at(name: TimelineMark): number | undefined {
    return this.#marks.get(name);
  }

  /** Milliseconds between two marks, or undefined when one has not happened. */
  between(from: TimelineMark, to: TimelineMark): number | undefined {
    const [start, end] = [this.#marks.get(from), this.#marks.get(to)];
    return start === undefined || end === undefined ? undefined : end - start;
  }

  toJSON(): TimelineJson {
    // Equal times keep the usual order: sort is stable.
    const marks = timelineMarks
      .flatMap((name) => {
        const atMs = this.#marks.get(name);
        return atMs === undefined ? [] : [{ name, atMs }];
      })
      .sort((one, other) => one.atMs - other.atMs);
    const first = marks[0]?.atMs ?? 0;
    return {
      marks: marks.map(({ name, atMs }, index) => ({
        name,
        atMs,
        sinceStartMs: microseconds(atMs - first),
        sincePreviousMs: microseconds(atMs - (marks[index - 1]?.atMs ?? atMs)),
      })),
      totalMs: microseconds((marks.at(-1)?.atMs ?? 0) - first),
    };
  }
}

/**
 * The wall clock with fractions of a millisecond. Not `performance.timeOrigin + performance.now()`: that is fixed at
 * the process's start and would not follow a clock that is set while the daemon runs, so a daemon of a week and a new
 * launcher would disagree.
 */
function nowMs(): number {
  const monotonicMs = performance.now();
  // Between two ticks of Date.now() the monotonic clock fills in; a difference of over a tick means the clock was set.
  if (Math.abs(Date.now() - (offsetMs + monotonicMs)) > 2) offsetMs = Date.now() - monotonicMs;
  return offsetMs + monotonicMs;
}

let offsetMs = performance.timeOrigin;

function microseconds(ms: number): number {
  return Math.round(ms * 1000) / 1000;
}
