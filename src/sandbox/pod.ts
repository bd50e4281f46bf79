import { setTimeout as delay } from 'node:timers/promises';
import { forLog, KilnError } from '../errors.ts';
import { abortable } from '../host/abortable.ts';
import type { HostControlGroup } from '../host/control-group.ts';
import type { Logger } from '../observe/logger.ts';
import { clearLimitMs, destroyGraceMs } from './limits.ts';
import type { Sandbox } from './sandbox.ts';

/** How often a guest is asked to remove a container that is still being made, in milliseconds. */
const clearLookMs = 50;

/** A container that runs in a pod's VM, as the pod sees it. */
export interface PodMember {
  readonly id: string;
  /** Of the process that stands for it on the host. */
  readonly pid: number;
  /** Ends it, so that what it wrote is on its disk. Rejects when the guest cannot be asked. */
  quit(): Promise<void>;
}

export interface PodParts {
  /** Of the container that stands for the pod; the pod's name. */
  readonly directory: string;
  readonly sandbox: Sandbox;
  /** Of the process that stands for the pod on the host. */
  readonly pid: number;
  /** For what the pod has on the host. */
  readonly controlGroup?: HostControlGroup | undefined;
  /** Writes down what the next kilnd needs of the VM. */
  readonly save: () => void;
  /** Where the files are that each container gets in /etc; undefined where its spec says it all. */
  readonly filesDirectory?: string | undefined;
  readonly logger: Logger;
}

/** A pod: one VM in which any number of containers come and go. It lives as long as the container that stands for it. */
export class Pod implements AsyncDisposable {
  readonly #parts: PodParts;
  readonly #members = new Set<PodMember>();
  /** Undefined when all is released. */
  #held: AsyncDisposableStack | undefined = new AsyncDisposableStack();
  #end: Promise<void> | undefined;
  #vmHasEnded = false;
  #wasEnded = false;

  constructor(parts: PodParts) {
    this.#parts = parts;
    void parts.sandbox.vm.wait().then(() => {
      this.#vmHasEnded = true;
    });
  }

  get directory(): string {
    return this.#parts.directory;
  }

  get sandbox(): Sandbox {
    return this.#parts.sandbox;
  }

  get pid(): number {
    return this.#parts.pid;
  }

  get controlGroup(): HostControlGroup | undefined {
    return this.#parts.controlGroup;
  }

  get filesDirectory(): string | undefined {
    return this.#parts.filesDirectory;
  }

  /** The ids of the containers that are there. */
  get memberIds(): readonly string[] {
    return Array.from(this.#members, ({ id }) => id);
  }

  /** Whoever stands for it has ended it, and its VM has not ended before. */
  get wasEnded(): boolean {
    return this.#wasEnded;
  }

  /** Nothing in the VM is of any use any more. */
  get vmHasEnded(): boolean {
    return this.#vmHasEnded;
  }

  add(member: PodMember): void {
    this.#members.add(member);
    this.save();
  }

  /** To be called when anything about the VM has changed that the next kilnd has to know. */
  save(): void {
    if (!this.#vmHasEnded) this.#parts.save();
  }

  /** The id of the container for which a process of the host stands; undefined for none. */
  containerAt(pid: number): string | undefined {
    return Array.from(this.#members).find((member) => member.pid === pid)?.id;
  }

  remove(member: PodMember): void {
    this.#members.delete(member);
  }

  /** For what nobody can do anything about. */
  report(error: unknown, message: string): void {
    this.#parts.logger.warn({ err: forLog(error) }, message);
  }

  /** Releases it when the VM has ended. */
  holdUntilEnd(resource: AsyncDisposable): void {
    if (this.#held !== undefined) this.#held.use(resource);
    else
      resource[Symbol.asyncDispose]().then(undefined, (error) => this.report(error, 'cannot release what a pod had'));
  }

  /**
   * Makes sure that a container is not in the guest any more, be it half made, so that its disks can be taken away.
   *
   * @throws KilnError when the guest does not do it
   */
  async clear(id: string): Promise<void> {
    const deadline = performance.now() + clearLimitMs;
    for (;;) {
      try {
        await this.sandbox.guest.removeContainer(id, { force: true, guestEnds: false });
        return;
      } catch (error) {
        if (!(error instanceof KilnError)) throw error;
        if (error.code === 'not-found') return;
        // It is still being made: whoever wanted that has given up.
        if (error.code !== 'failed-precondition' || performance.now() > deadline) throw error;
      }
      await delay(clearLookMs);
    }
  }

  /**
   * After it was taken over from an earlier kilnd, with all containers that were written down: takes from the guest and the
   * VM what was being made then, or had just ended.
   */
  async removeUnknown(): Promise<void> {
    const { sandbox, logger } = this.#parts;
    const known = new Set(this.memberIds);
    const unknown = (await sandbox.guest.containers()).filter((id) => !known.has(id));
    const removals = unknown.map((id) => {
      logger.warn({ container: id }, 'removing a container from the guest that no kilnd knows');
      return sandbox.guest.removeContainer(id, { force: true, guestEnds: false });
    });
    // All are tried; the disks of one that stays do, too.
    await Promise.allSettled(removals);
    await Promise.all(removals);
    await sandbox.detachUnknown();
  }

  /**
   * Ends the containers, in little time, and the VM in any case. Safe to call twice.
   *
   * @param graceMs how much time
   */
  end(graceMs = destroyGraceMs): Promise<void> {
    this.#wasEnded ||= !this.#vmHasEnded;
    this.#end ??= this.#endAll(graceMs);
    return this.#end;
  }

  async #endAll(graceMs: number): Promise<void> {
    const { logger } = this.#parts;
    const quits = Array.from(this.#members, async (member) => {
      try {
        await member.quit();
      } catch (error) {
        logger.debug({ err: error, container: member.id }, 'a container of the pod ends with its VM');
      }
    });
    await Promise.race([Promise.all(quits), delay(graceMs, undefined, { ref: false })]);
    await this.#endVm();
  }

  async #endVm(): Promise<void> {
    this.#vmHasEnded = true;
    try {
      await this.sandbox[Symbol.asyncDispose]();
    } finally {
      const held = this.#held;
      this.#held = undefined;
      await held?.disposeAsync();
    }
  }

  /** Ends the VM at once. */
  [Symbol.asyncDispose](): Promise<void> {
    this.#wasEnded ||= !this.#vmHasEnded;
    this.#end ??= this.#endVm();
    return this.#end;
  }
}

/** The pods of this kilnd, by the directories of the containers that stand for them. */
export class Pods {
  readonly #pods = new Map<string, Promise<Pod>>();
  /** Resolved when all that an earlier kilnd has left is taken over. */
  #restored: Promise<unknown> = Promise.resolve();
  /** Of pods that were taken over: resolved when nothing is in the guest that nobody knows. Never rejects. */
  readonly #cleared = new Map<string, Promise<void>>();

  /** A pod that is there, or will be: who asks for it meanwhile waits. One whose making fails is none. */
  add(directory: string, pod: Promise<Pod>): void {
    this.#pods.set(directory, pod);
    pod.catch(() => this.#forget(directory, pod));
  }

  /** To be called when nothing is left of it. */
  remove(directory: string): void {
    this.#pods.delete(directory);
    this.#cleared.delete(directory);
  }

  #forget(directory: string, pod: Promise<Pod>): void {
    if (this.#pods.get(directory) === pod) this.#pods.delete(directory);
  }

  /**
   * @param name what the error calls it
   * @throws KilnError not-found for none, failed-precondition for one that ends; what has hindered its making
   */
  async find(directory: string, name: string): Promise<Pod> {
    const pod = await this.#pods.get(directory);
    if (pod === undefined) {
      throw new KilnError('not-found', `there is no pod ${name}`, {
        hint:
          'first comes the container that stands for the pod, with the same runtime and in the same namespace; ' +
          'CRI-O makes it with drop_infra_ctr = false',
      });
    }
    if (pod.wasEnded || pod.vmHasEnded) throw new KilnError('failed-precondition', `the pod ${name} has ended`);
    return pod;
  }

  /**
   * As `find`, for a new container: it has to wait until what an earlier kilnd has left is taken over. An aborted signal
   * rejects with its reason.
   */
  findForNew(directory: string, name: string, signal: AbortSignal): Promise<Pod> {
    const found = async () => {
      await this.#restored;
      await this.#cleared.get(directory);
      return this.find(directory, name);
    };
    return abortable(found(), signal);
  }

  /**
   * To be called with the taking over of all containers, which never rejects: afterwards each pod's guest is cleared. One
   * that takes its time for that holds up no other pod.
   */
  settleAfter(restored: Promise<unknown>, logger: Logger): void {
    this.#restored = restored.then(() => {
      for (const [directory, pod] of this.#pods) {
        const clear = async (made: Pod) => {
          await made.removeUnknown().catch((error: unknown) => {
            logger.warn({ err: forLog(error) }, 'cannot remove from a pod what no kilnd knows');
          });
        };
        // Of one that cannot be made, whoever makes it tells.
        this.#cleared.set(
          directory,
          pod.then(clear, () => {}),
        );
      }
    });
  }
}
