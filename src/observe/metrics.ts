/**
 * What kilnd counts, in Prometheus's text format: names and units by its conventions (base units, `_total` for counters).
 */
import { collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client';
import type { Timeline, TimelineMark } from './timeline.ts';

/** Bounds of start times, in seconds: from a pool on fast hardware to a boot under emulation. */
const startBuckets = [0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30];

/** How a container came to its virtual machine, by the mark that its timeline has. */
const ways: readonly (readonly [TimelineMark, string])[] = [
  ['vm-taken', 'pool'],
  ['vm-restored', 'template'],
  ['vmm-spawned', 'boot'],
];

/** Figures that somebody else keeps, and that are read when they are asked for. */
export interface Sources {
  readonly containers: () => number;
  /** Counters of templates, by their names. */
  readonly templates: () => Readonly<Record<string, number>>;
  readonly pool: () => readonly PoolFigures[];
  /** Counters of all Firecrackers, by "group.name". */
  readonly firecracker: () => Readonly<Record<string, number>>;
}

export interface PoolFigures {
  readonly template: string;
  readonly waiting: number;
  readonly wanted: number;
  readonly hits: number;
  readonly misses: number;
  readonly died: number;
}

export class Metrics {
  readonly #registry = new Registry();
  readonly #starts: Histogram<'way'>;

  constructor(sources: Sources) {
    const registers = [this.#registry];
    collectDefaultMetrics({ register: this.#registry });
    this.#starts = new Histogram({
      name: 'kiln_container_start_seconds',
      help: "From containerd's call of the launcher until the container's process runs, by how it came to its virtual machine.",
      labelNames: ['way'],
      buckets: startBuckets,
      registers,
    });
    gauge(registers, 'kiln_containers', 'Containers that kilnd has.', (set) => set({}, sources.containers()));
    gauge(registers, 'kiln_template_events_total', 'What became of templates and of restores from them.', (set) => {
      for (const [event, count] of Object.entries(sources.templates())) set({ event: snakeCase(event) }, count);
    });
    gauge(registers, 'kiln_firecracker_events_total', 'What all Firecrackers have counted.', (set) => {
      for (const [event, count] of Object.entries(sources.firecracker())) set({ event }, count);
    });
    for (const [name, help, figure] of poolGauges) {
      gauge(registers, name, help, (set) => {
        for (const shelf of sources.pool()) set({ template: shelf.template }, shelf[figure]);
      });
    }
  }

  /** Notes the start of a container whose process runs. */
  noteStart(timeline: Timeline): void {
    const tookMs = timeline.between('launcher', 'started');
    const way = ways.find(([mark]) => timeline.at(mark) !== undefined)?.[1];
    if (tookMs !== undefined && way !== undefined) this.#starts.observe({ way }, tookMs / 1000);
  }

  get contentType(): string {
    return this.#registry.contentType;
  }

  text(): Promise<string> {
    return this.#registry.metrics();
  }
}

const poolGauges = [
  ['kiln_pool_waiting', 'Virtual machines that wait for a container.', 'waiting'],
  ['kiln_pool_wanted', 'Virtual machines that should wait.', 'wanted'],
  ['kiln_pool_hits_total', 'Containers that got a virtual machine that waited.', 'hits'],
  ['kiln_pool_misses_total', 'Containers that found none waiting.', 'misses'],
  ['kiln_pool_died_total', 'Virtual machines that ended while they waited.', 'died'],
] as const;

type Labels = Readonly<Record<string, string>>;

/** A figure that is read when it is asked for; also of what counts up elsewhere. */
function gauge(
  registers: Registry[],
  name: string,
  help: string,
  collect: (set: (labels: Labels, value: number) => void) => void,
): void {
  const labelNames = ['event', 'template'];
  const made: Gauge<string> = new Gauge({
    ...{ name, help, labelNames, registers },
    collect() {
      made.reset();
      collect((labels, value) => made.set({ ...labels }, value));
    },
  });
}

function snakeCase(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}
