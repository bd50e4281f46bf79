/**
 * The verbs on a container's control group: pause and resume, statistics, limits, and who was killed for want of memory.
 */
import type { CgroupFile, Mount, ReadStatsResponse } from '../gen/kiln/agent/v1/agent.ts';
import { Freezer } from './freezer.ts';
import { setLimits } from './limits.ts';
import { flushAll } from './mounts.ts';
import { OomWatch } from './oom.ts';
import { readStats } from './stats.ts';
import type { Volumes } from './volumes.ts';

export class Controls implements Disposable {
  readonly #cgroup: string;
  readonly #mounts: readonly Mount[];
  readonly #volumes: Volumes;
  readonly #freezer: Freezer;
  readonly #oom: OomWatch;

  /**
   * @param cgroup the group's directory
   * @param mounts of the container's root filesystem
   */
  constructor(id: string, cgroup: string, mounts: readonly Mount[], volumes: Volumes) {
    this.#cgroup = cgroup;
    this.#mounts = mounts;
    this.#volumes = volumes;
    this.#freezer = new Freezer(id, cgroup);
    this.#oom = new OomWatch(cgroup);
  }

  /** Afterwards no process of it runs, and what they have written is on the disks, and on the host's volumes. */
  pause(): Promise<void> {
    return this.#freezer.pause(async () => {
      await Promise.all([flushAll(this.#mounts), this.#volumes.flush()]);
    });
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

  /** See `OomWatch.follow`. */
  followOom(onKills: (kills: bigint) => void): Disposable {
    return this.#oom.follow(onKills);
  }

  [Symbol.dispose](): void {
    this.#oom[Symbol.dispose]();
  }
}
