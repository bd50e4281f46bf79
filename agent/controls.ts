/**
 * The verbs on a container's control group: pause and resume, statistics, limits, and who was killed for want of memory.
 */
import type { CgroupFile, Mount, ReadStatsResponse } from '../gen/kiln/agent/v1/agent.ts';
import { Freezer } from './freezer.ts';
import { setLimits } from './limits.ts';
import { flushAll } from './mounts.ts';
import { type OomSink, OomWatch } from './oom.ts';
import { readStats } from './stats.ts';

export class Controls implements Disposable {
  readonly #cgroup: string;
  readonly #mounts: readonly Mount[];
  readonly #freezer: Freezer;
  readonly #oom: OomWatch;

  /**
   * @param cgroup the group's directory
   * @param mounts of the container's root filesystem
   */
  constructor(id: string, cgroup: string, mounts: readonly Mount[]) {
    this.#cgroup = cgroup;
    this.#mounts = mounts;
    this.#freezer = new Freezer(id, cgroup);
    this.#oom = new OomWatch(cgroup);
  }

  /** Afterwards no process of it runs, and what they have written is on the disks. */
  pause(): Promise<void> {
    return this.#freezer.pause(() => flushAll(this.#mounts));
  }

  get paused(): boolean {
    return this.#freezer.paused;
  }

  resume(): void {
    this.#freezer.resume();
  }

  stats(): ReadStatsResponse {
    return readStats(this.#cgroup);
  }

  setLimits(files: readonly CgroupFile[]): Promise<void> {
    return setLimits(this.#cgroup, files);
  }

  watchOom(sink: OomSink): void {
    this.#oom.relayTo(sink);
  }

  [Symbol.dispose](): void {
    this.#oom[Symbol.dispose]();
  }
}
