/**
 * What a container writes, and what the host's tools see of it.
 *
 * A container's writes are on a disk of its own, which only guests mount; `nerdctl commit`, `diff`, `cp` and `export`, and
 * all else that asks containerd's snapshotter, look into the snapshot's directory on the host. So at certain moments the agent
 * sends what was written, and it is made there. Those moments are when nothing writes, and when somebody may look: the
 * container's pause, which `nerdctl commit` begins with, and its exit, before containerd knows of that. Whatever the host put
 * into the directory meanwhile goes the other way, at the container's creation and when it goes on after a pause.
 */
import { forLog, KilnError } from '../errors.ts';
import { describeLeftOut } from '../files/unpack.ts';
import type { Guest } from '../guest/guest.ts';
import type { Logger } from '../observe/logger.ts';
import { type Edits, type RootfsPlan, SnapshotUpper, sizeOf, type UpperDirectory } from '../rootfs/index.ts';

/** What `storage.changes` may say. */
export type ChangesSetting = 'auto' | 'keep' | 'discard';

/** When what a container has written comes to the host; written down, for the next kilnd. */
export interface ChangesPlan {
  readonly upper: UpperDirectory;
  readonly atPause: boolean;
  readonly atExit: boolean;
}

/** How long all that was written may take, in ms. Some tens of MiB/s come from an emulated guest. */
const limitMs = 600_000;

/** The keys of nerdctl's annotations begin so. */
const nerdctlPrefix = 'nerdctl/';

/**
 * "auto": what `nerdctl` starts can be committed, copied from and compared after its end, unless it is to be removed then
 * (`--rm`, whose end must not take longer). Others come at a pause only.
 *
 * @returns undefined where the snapshotter has no directory for it
 * @throws KilnError unimplemented for "keep" where that is so
 */
export function planChanges(
  setting: ChangesSetting,
  { upper, writable }: Pick<RootfsPlan, 'upper' | 'writable'>,
  annotations: Readonly<Record<string, string>> = {},
): ChangesPlan | undefined {
  if (upper === null) {
    if (setting !== 'keep' || writable === null) return undefined;
    throw new KilnError('unimplemented', 'what the container writes cannot be kept on the host with this snapshotter', {
      hint: 'use the overlayfs snapshotter, or storage.changes = "auto" (annotation io.kiln.changes=auto)',
    });
  }
  const isOfNerdctl = Object.keys(annotations).some((key) => key.startsWith(nerdctlPrefix));
  const isRemoved = annotations[`${nerdctlPrefix}auto-remove`] === 'true';
  return {
    upper,
    atPause: setting !== 'discard',
    atExit: setting === 'keep' || (setting === 'auto' && isOfNerdctl && !isRemoved),
  };
}

/** The writes of one container, on their way between guest and host. */
export class Changes {
  readonly plan: ChangesPlan;
  readonly #id: string;
  readonly #guest: () => Guest;
  readonly #disk: string;
  readonly #upper: SnapshotUpper;
  readonly #logger: Logger;
  /** By the guest's clock: what is older is on the host. 0 when nothing is. */
  #sinceNs = 0n;

  /** @param parts.disk the file of the disk that the container writes to */
  constructor(
    plan: ChangesPlan,
    parts: { readonly id: string; readonly guest: () => Guest; readonly disk: string; readonly logger: Logger },
  ) {
    this.plan = plan;
    this.#id = parts.id;
    this.#guest = parts.guest;
    this.#disk = parts.disk;
    this.#logger = parts.logger;
    this.#upper = new SnapshotUpper(plan.upper);
  }

  /** What the guest is still to get; undefined for nothing. */
  edits(): Promise<Edits | undefined> {
    return this.#upper.edits();
  }

  /** The guest has got what `edits` told. */
  editsTaken(): Promise<void> {
    return this.#upper.noteTaken();
  }

  /** The container is paused. @throws KilnError when what it has written did not come whole: then all is as it was */
  async paused(): Promise<void> {
    if (this.plan.atPause) await this.#bring();
  }

  /** The container is about to go on. */
  async resuming(): Promise<void> {
    if (!this.plan.atPause) return;
    using edits = await this.edits();
    if (edits === undefined) return;
    await this.#guest().provideFiles(this.#id, edits.stream);
    await this.editsTaken();
  }

  /** The container has ended; its filesystems are there still. Never rejects: what was here stays then. */
  async ended(): Promise<void> {
    if (!this.plan.atExit) return;
    try {
      await this.#bring();
    } catch (error) {
      this.#logger.error(
        { err: forLog(error) },
        'what the container has written did not come to the host: commit, diff and cp do not see it',
      );
    }
  }

  async #bring(): Promise<void> {
    try {
      await this.#bringSince(this.#sinceNs);
    } catch (error) {
      const isStale = error instanceof KilnError && error.code === 'failed-precondition' && this.#sinceNs !== 0n;
      if (!isStale) throw error;
      // Somebody has changed on the host what the guest takes for unchanged.
      this.#sinceNs = 0n;
      await this.#bringSince(0n);
    }
  }

  async #bringSince(sinceNs: bigint): Promise<void> {
    const started = performance.now();
    const { nowNs, pieces } = this.#guest().readChanges(this.#id, sinceNs, limitMs);
    const maxBytes = await sizeOf(this.#disk);
    const unpacked = await this.#upper.replace(pieces, { maxBytes });
    this.#sinceNs = await nowNs;
    const { files, bytes, leftOutCount } = unpacked;
    this.#logger.info(
      { files, bytes, ms: Math.round(performance.now() - started) },
      'brought what the container wrote',
    );
    if (leftOutCount === 0) return;
    const devices = describeLeftOut(unpacked);
    this.#logger.warn(
      { devices },
      'devices that the container has made are not made on the host: its snapshot lacks them',
    );
  }
}
