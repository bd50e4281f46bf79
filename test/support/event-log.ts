/** containerd's events, as `ctr events` prints them. */
import { Lines, type RunningProgram } from './spawn.ts';

export interface ContainerdEvent {
  readonly namespace: string;
  readonly topic: string;
  readonly event: Record<string, unknown>;
}

/** What `ctr events` prints. Disposing it ends ctr. */
export class EventLog implements AsyncDisposable {
  readonly lines: Lines;
  readonly #program: RunningProgram;

  constructor(program: RunningProgram) {
    this.#program = program;
    this.lines = new Lines(program.stdout);
  }

  /** All events so far whose container (or id) is the given one. */
  of(containerId: string): ContainerdEvent[] {
    return this.lines.all
      .flatMap((line) => {
        // 2024-01-31 12:00:00.123456789 +0000 UTC NAMESPACE TOPIC JSON
        const match = /^\S+ \S+ \S+ \S+ (\S+) (\/\S+) (.*)$/.exec(line);
        if (match === null) return [];
        const [, namespace = '', topic = '', json = ''] = match;
        return [{ namespace, topic, event: JSON.parse(json || '{}') as Record<string, unknown> }];
      })
      .filter(({ event }) => event.container_id === containerId || event.id === containerId);
  }

  /** Waits until the topic was seen for the container; returns that event. */
  async waitFor(topic: string, containerId: string, timeout = 60_000): Promise<ContainerdEvent> {
    const mine = new RegExp(`"(container_id|id)":"${containerId}"`);
    await this.lines.waitFor(
      (line) => line.includes(` ${topic} `) && mine.test(line),
      `${topic} of ${containerId}`,
      timeout,
    );
    const found = this.of(containerId).find((event) => event.topic === topic);
    if (found === undefined) throw new Error(`${topic} of ${containerId} does not parse`);
    return found;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#program[Symbol.asyncDispose]();
  }
}
