import type { PreparedRootfs } from '../rootfs/index.ts';
import type { AttachedDisk, DiskFile } from './disk-slots.ts';
import type { Pod, PodMember } from './pod.ts';
import type { AloneRecord, MemberRecord } from './record.ts';
import type { Sandbox, SandboxRecord } from './sandbox.ts';

type AloneFields = Pick<AloneRecord, 'place' | 'vmm' | 'devices' | keyof SandboxRecord>;
type MemberFields = Pick<MemberRecord, 'place' | 'pod' | 'slots' | 'volumeNumbers'>;

/** What a container has of the VM in which it runs. */
export interface Tenancy extends AsyncDisposable {
  readonly sandbox: Sandbox;
  /** The VM goes on without the container. */
  readonly shared: boolean;
  /** Somebody has ended the VM, and with it whatever runs in it: its end is nothing to report. */
  readonly wasEnded: boolean;
  /** As the sandbox's. */
  attachDisk(disk: DiskFile, signal: AbortSignal): Promise<AttachedDisk>;
  /** For the container's record. */
  record(): AloneFields | MemberFields;
  /** Called once, when the container exists. */
  enter(member: PodMember): void;
  /**
   * Gives back what it has of the VM, when the container is removed from the guest, or the guest is lost. Safe to call
   * twice.
   */
  [Symbol.asyncDispose](): Promise<void>;
}

/** A container that has the VM to itself: it ends with the container. */
export class WholeVm implements Tenancy {
  readonly sandbox: Sandbox;
  readonly shared = false;
  readonly wasEnded = false;
  readonly #vmm: string;
  readonly #devices: AttachedDisk[];

  /**
   * @param vmm the name of what the VM runs under
   * @param devices those of the host that the VM has already
   */
  constructor(sandbox: Sandbox, vmm: string, devices: readonly AttachedDisk[]) {
    this.sandbox = sandbox;
    this.#vmm = vmm;
    this.#devices = [...devices];
  }

  async attachDisk(disk: DiskFile, signal: AbortSignal): Promise<AttachedDisk> {
    const attached = await this.sandbox.attachDisk(disk, signal);
    if (disk.device) this.#devices.push(attached);
    return attached;
  }

  record(): AloneFields {
    const devices = this.#devices.length === 0 ? undefined : [...this.#devices];
    return { place: 'alone', vmm: this.#vmm, devices, ...this.sandbox.record() };
  }

  enter(): void {}

  [Symbol.asyncDispose](): Promise<void> {
    return this.sandbox[Symbol.asyncDispose]();
  }
}

/** A place in a pod's VM, the root filesystem whose disks it has, and volumes: they leave with the container. */
export class PlaceInPod implements Tenancy {
  readonly shared = true;
  readonly #pod: Pod;
  readonly #id: string;
  readonly #rootfs: PreparedRootfs;
  readonly #disks: AttachedDisk[];
  /** Files that the VM may be about to open. */
  readonly #givenUp: string[] = [];
  readonly #volumeNumbers: readonly number[];
  #member: PodMember | undefined;
  #left: Promise<void> | undefined;

  /**
   * @param container its id
   * @param has the disks of the root filesystem that the VM has already, and the numbers of the container's volumes
   */
  constructor(
    pod: Pod,
    container: string,
    rootfs: PreparedRootfs,
    has: { readonly disks: readonly AttachedDisk[]; readonly volumeNumbers: readonly number[] },
  ) {
    this.#pod = pod;
    this.#id = container;
    this.#rootfs = rootfs;
    this.#disks = [...has.disks];
    this.#volumeNumbers = has.volumeNumbers;
  }

  get sandbox(): Sandbox {
    return this.#pod.sandbox;
  }

  get wasEnded(): boolean {
    return this.#pod.wasEnded;
  }

  async attachDisk(disk: DiskFile, signal: AbortSignal): Promise<AttachedDisk> {
    try {
      const attached = await this.sandbox.attachDisk(disk, signal);
      this.#disks.push(attached);
      this.#pod.save();
      return attached;
    } catch (error) {
      this.#givenUp.push(disk.file);
      throw error;
    }
  }

  record(): MemberFields {
    return {
      place: 'member',
      pod: this.#pod.directory,
      slots: [...this.#disks],
      volumeNumbers: [...this.#volumeNumbers],
    };
  }

  enter(member: PodMember): void {
    this.#member = member;
    this.#pod.add(member);
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.#left ??= this.#leave();
    return this.#left;
  }

  async #leave(): Promise<void> {
    if (this.#member !== undefined) this.#pod.remove(this.#member);
    try {
      // Behind a VM that has ended there is nothing.
      if (!this.#pod.vmHasEnded) {
        await this.#pod.clear(this.#id);
        for (const disk of this.#disks) await this.sandbox.detachDisk(disk);
        for (const file of this.#givenUp) await this.sandbox.diskGone(file);
        await this.sandbox.removeVolumes(this.#volumeNumbers);
        this.#pod.save();
      }
    } catch (error) {
      // The VM may have the files open still, and until it has ended nobody else may.
      this.#pod.holdUntilEnd(this.#rootfs);
      this.#pod.report(
        error,
        `cannot take the disks of container ${this.#id} from the VM: they stay until the pod ends`,
      );
      return;
    }
    if (this.#pod.vmHasEnded) this.#pod.holdUntilEnd(this.#rootfs);
    else await this.#rootfs.release();
  }
}
