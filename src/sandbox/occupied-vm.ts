import type { Logger } from '../observe/logger.ts';
import type { Sandbox } from './sandbox.ts';
import type { Tenancy } from './tenancy.ts';
import { statusOfVmEnd, vmKilledStatus } from './vm-end.ts';

/** The VM that a container is in, as something that can be lost, ended, and left. */
export class OccupiedVm {
  readonly #sandbox: Sandbox;
  readonly #tenancy: Tenancy;
  readonly #logger: Logger;
  readonly #report: (error: unknown, message: string) => void;
  readonly #endIsWanted: () => boolean;
  /** Set when somebody has noticed that the guest was lost. */
  #lost: Promise<number> | undefined;

  /**
   * @param report for what nobody awaits
   * @param endIsWanted whether the container is being destroyed, so that its VM's end is nothing to report
   */
  constructor(
    { sandbox, tenancy }: { readonly sandbox: Sandbox; readonly tenancy: Tenancy },
    means: {
      readonly logger: Logger;
      readonly report: (error: unknown, message: string) => void;
      readonly endIsWanted: () => boolean;
    },
  ) {
    this.#sandbox = sandbox;
    this.#tenancy = tenancy;
    this.#logger = means.logger;
    this.#report = means.report;
    this.#endIsWanted = means.endIsWanted;
  }

  /** Somebody has noticed that the guest was lost. */
  get isLost(): boolean {
    return this.#lost !== undefined;
  }

  /** The exit status of whatever was in the guest when it was lost; a VM that lives on without its agent is ended. */
  lostStatus(cause?: unknown): Promise<number> {
    this.#lost ??= this.#awaitEnd(cause);
    return this.#lost;
  }

  /** Takes the container out of the guest, which flushes its filesystems. Never rejects. */
  async removeContainer(id: string): Promise<void> {
    try {
      await this.#sandbox.guest.removeContainer(id, { force: true, guestEnds: !this.#tenancy.shared });
    } catch (error) {
      this.#logger.warn({ err: error }, 'the guest did not remove the container: its last writes may be lost');
    }
  }

  /** Gives back what the container has of the VM: all its memory, or its disks in a pod's. Never rejects. */
  async leave(): Promise<void> {
    await this.#told('cannot give back what the container had of its VM', () => this.#tenancy[Symbol.asyncDispose]());
  }

  /** Ends the VM, which may be a pod's. Never rejects. */
  async end(): Promise<void> {
    await this.#told('cannot end the VM', () => this.#sandbox[Symbol.asyncDispose]());
  }

  async #awaitEnd(cause: unknown): Promise<number> {
    const end = await this.#sandbox.end();
    const wanted = this.#tenancy.wasEnded;
    const level = this.#endIsWanted() || wanted ? 'debug' : 'error';
    this.#logger[level]({ err: cause, ...end }, 'the VM ended while the container was alive');
    return wanted ? vmKilledStatus : statusOfVmEnd(end);
  }

  async #told(failure: string, action: () => PromiseLike<void>): Promise<void> {
    try {
      await action();
    } catch (error) {
      this.#report(error, failure);
    }
  }
}
