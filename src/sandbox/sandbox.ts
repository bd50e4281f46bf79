import { rmSync } from 'node:fs';
import { KilnError } from '../errors.ts';
import type { Guest } from '../guest/guest.ts';
import type { GuestContainer, GuestPod } from '../guest/terms.ts';
import { abortable } from '../host/abortable.ts';
import { claimDevice } from '../host/block-devices.ts';
import { TimeLimit } from '../host/time-limit.ts';
import type { NetworkConfig } from '../network/config.ts';
import type { ConnectedNetwork } from '../network/networks.ts';
import type { Logger } from '../observe/logger.ts';
import { tooMuchMemory } from '../oci/limits-check.ts';
import { guestOverheadMib } from '../oci/vm-size.ts';
import type { SlotName, Vm, VmExit, VmRecord } from '../vmm/vmm.ts';
import { type AttachedDisk, type DiskFile, DiskSlots } from './disk-slots.ts';
import { GuestNetwork } from './guest-network.ts';
import { guestStopGraceMs } from './limits.ts';
import { tailOf, vmmSilent } from './unresponsive.ts';
import type { SandboxVolumes, VolumeCache, VolumesRecord } from './volumes.ts';

/** How long after its first container's start a sandbox's network is followed, in ms: short containers do not pay for it. */
const followAfterMs = 500;

/** What a later kilnd needs to take a sandbox over. */
export interface SandboxRecord {
  readonly session: string;
  /** The VM's directory, where it is the sandbox's own and not its container's. */
  readonly vmDirectory?: string | undefined;
  readonly volumeCache?: VolumeCache | undefined;
  /** Time for each answer of VMM and agent, in ms. */
  readonly answerLimitMs: number;
  readonly vm: VmRecord;
  readonly volumes?: VolumesRecord | undefined;
}

/** What a sandbox is made of, new or taken over. */
export interface SandboxParts extends Pick<SandboxRecord, 'session' | 'answerLimitMs' | 'vmDirectory'> {
  readonly vm: Vm;
  /** Its agent, which has said hello. */
  readonly guest: Guest;
  /** An earlier kilnd may have put files behind any of its drive slots. */
  readonly adopted?: boolean;
  readonly logger: Logger;
}

/** How a sandbox's VM ended. */
export interface SandboxEnd extends VmExit {
  /** The VM lived on without its agent, and so was killed. */
  readonly agentLost: boolean;
}

/** One VM with its agent connected (see bring-up.ts). Containers attach their disks to it and run in it. */
export class Sandbox implements AsyncDisposable {
  readonly vm: Vm;
  readonly guest: Guest;
  /** What the guest keeps of the host's files; looked at when the first of its containers has some. */
  volumeCache: VolumeCache = 'mmap';
  readonly #disks: DiskSlots;
  readonly #session: string;
  readonly #answerLimitMs: number;
  readonly #vmDirectory: string | undefined;
  #volumes: SandboxVolumes | undefined;
  #startingVolumes: Promise<SandboxVolumes> | undefined;
  #network: GuestNetwork | undefined;
  readonly #logger: Logger;
  /** What containers may be promised. */
  #memoryBytes: number;

  constructor({ vm, guest, session, answerLimitMs, vmDirectory, adopted = false, logger }: SandboxParts) {
    this.vm = vm;
    this.guest = guest;
    this.#disks = new DiskSlots(adopted);
    this.#session = session;
    this.#answerLimitMs = answerLimitMs;
    this.#vmDirectory = vmDirectory;
    this.#logger = logger;
    this.#memoryBytes = guest.facts.memoryBytes;
  }

  /** The sandbox as it is now, for `reattachSandbox`. */
  record(): SandboxRecord {
    return {
      session: this.#session,
      answerLimitMs: this.#answerLimitMs,
      vmDirectory: this.#vmDirectory,
      volumeCache: this.volumeCache,
      vm: this.vm.record(),
      volumes: this.#volumes?.record(),
    };
  }

  /** Puts a file behind a free drive slot; a read-only one that another container has is not put there twice. */
  async attachDisk(disk: DiskFile, signal: AbortSignal): Promise<AttachedDisk> {
    try {
      return await this.#disks.attach(disk, {
        free: this.vm.freeSlots,
        attach: (slot, file) => this.vm.attachDisk(slot, file),
        answer: (attached) => this.#vmm(`attach ${disk.file}`, () => attached, signal),
        detach: (slot) => this.#detach(slot),
        claim: claimDevice,
      });
    } catch (error) {
      if (signal.aborted) throw error;
      if (!(error instanceof KilnError && error.code === 'unavailable')) throw error;
      throw await this.#lostWhile(`${disk.file} was attached`, error);
    }
  }

  /** Resolves when the VM has nothing of a file whose attaching was given up. */
  diskGone(file: string): Promise<void> {
    return this.#vmm(`give up ${file}`, () => this.#disks.gone(file));
  }

  /** The opposite, for a container that was removed from a guest that goes on. */
  detachDisk(disk: AttachedDisk): Promise<void> {
    return this.#disks.release(disk, (slot) => this.#detach(slot));
  }

  /** Notes a disk of a container of an earlier kilnd. */
  async claimDisk(disk: AttachedDisk): Promise<void> {
    await this.#disks.claim(disk, claimDevice);
  }

  /** Of an adopted one, when the disks of all its containers are claimed: empties the other slots. */
  detachUnknown(): Promise<void> {
    return this.#disks.emptyDoubtful((slot) => this.#detach(slot));
  }

  #detach(slot: SlotName): Promise<void> {
    return this.#vmm(`empty the drive slot ${slot}`, () => this.vm.detachDisk(slot));
  }

  /** Has the VMM do something in the time that it has for an answer. */
  async #vmm<T>(what: string, action: () => Promise<T>, signal?: AbortSignal): Promise<T> {
    using limit = new TimeLimit(this.#answerLimitMs, signal);
    try {
      return await abortable(action(), limit.signal);
    } catch (error) {
      if (!limit.caused(error)) throw error;
      throw vmmSilent({ name: 'VMM' }, what, this.#answerLimitMs);
    }
  }

  /** The host's files that it has, or gets now. */
  volumes(start: () => Promise<SandboxVolumes>): Promise<SandboxVolumes> {
    if (this.#volumes !== undefined) return Promise.resolve(this.#volumes);
    this.#startingVolumes ??= start()
      .then((volumes) => {
        this.useVolumes(volumes);
        return volumes;
      })
      .finally(() => {
        this.#startingVolumes = undefined;
      });
    return this.#startingVolumes;
  }

  /** Gives the sandbox the host's files, which end with it. */
  useVolumes(volumes: SandboxVolumes): void {
    this.#volumes = volumes;
    volumes.belongTo(this.vm);
  }

  /** Takes volumes away from a guest that no longer uses them. Never rejects. */
  async removeVolumes(numbers: readonly number[]): Promise<void> {
    if (numbers.length > 0) await this.#volumes?.remove(numbers);
  }

  /** Gives the sandbox its network, which ends with it. */
  useNetwork(network: ConnectedNetwork): void {
    this.#network = new GuestNetwork({ network, guest: this.guest, logger: this.#logger });
  }

  /** Of an adopted one: goes on with what its network needs while containers run. */
  followNetwork(): void {
    this.#network?.follow(0);
  }

  /** As `GuestNetwork.followNameservers`. */
  async followNameservers(resolvConf: string): Promise<void> {
    await this.#network?.followNameservers(resolvConf);
  }

  /** Has the guest take over, with what it is asked for, the interfaces that have come since it was asked last. */
  #withNetwork<T>(ask: (network: NetworkConfig | undefined) => Promise<T>): Promise<T> {
    return this.#network === undefined ? ask(undefined) : this.#network.tell(ask);
  }

  /** As `Guest.preparePod`, which gets its network. */
  async preparePod(pod: GuestPod): Promise<void> {
    await this.#withNetwork((network) => this.guest.preparePod(pod, network));
  }

  /**
   * As `Guest.startContainer`, which gets the interfaces that have come since its creation.
   *
   * @param resolvConf the file of the host that is its /etc/resolv.conf, if it has one
   */
  async startContainer(id: string, stdinEnded: boolean, resolvConf?: string): Promise<void> {
    if (resolvConf !== undefined) await this.followNameservers(resolvConf);
    await this.#withNetwork((network) => this.guest.startContainer(id, stdinEnded, network));
    this.#network?.follow(followAfterMs);
  }

  /**
   * As `Guest.createContainer`, which gets its network and its volumes; when the VM ends meanwhile or the agent is silent, the
   * error shows the console.
   *
   * @param onVolumes called when the guest has its volumes: a later kilnd has to know it, since a guest asks for them once
   */
  async createContainer(container: GuestContainer, signal: AbortSignal, onVolumes = () => {}): Promise<void> {
    const failed = new AbortController();
    const either = AbortSignal.any([signal, failed.signal]);
    try {
      // The guest asks for its files meanwhile.
      const volumes = container.volumeOptions === undefined ? undefined : this.#volumes;
      const connected = volumes?.connect(this.vm, either).then(onVolumes);
      const created = this.#withNetwork((network) => this.guest.createContainer({ ...container, network }, either));
      await Promise.all([created, connected]);
    } catch (error) {
      failed.abort(error);
      if (!(error instanceof KilnError)) throw error;
      if (error.code === 'deadline-exceeded') {
        throw new KilnError(error.code, `${error.message}; the guest console's last lines:\n${await tailOf(this.vm)}`, {
          cause: error,
        });
      }
      if (error.code !== 'unavailable') throw error;
      throw await this.#lostWhile(`container ${container.id} was created`, error);
    }
  }

  /** How the VM ended, as an error, when VMM or agent no longer answer; a VM that lives on is ended. */
  async #lostWhile(what: string, cause: KilnError): Promise<KilnError> {
    const { code, signal: by, guestStopped, agentLost, consoleTail } = await this.end();
    const ended = guestStopped ? 'the guest stopped' : `the VM ended (${by ?? `exit code ${code}`})`;
    const how = agentLost ? 'the connection to the guest was lost' : ended;
    return new KilnError('unavailable', `${how} while ${what}\n${consoleTail}`.trim(), { cause });
  }

  /**
   * Makes sure that the VM has so many bytes for a container; it grows where its VMM can do that.
   *
   * @throws KilnError resource-exhausted with both numbers, deadline-exceeded when VMM or guest take too long, and what
   *   `MemoryGrowth.growTo` throws
   */
  async provideMemory(bytes: number): Promise<void> {
    if (bytes <= this.#memoryBytes) return;
    const { memoryGrowth } = this.vm;
    const neededMib = Math.ceil(bytes / 2 ** 20) + guestOverheadMib;
    if (memoryGrowth === null) throw tooMuchMemory(bytes, this.#memoryBytes);
    if (neededMib > memoryGrowth.limitMib) {
      throw tooMuchMemory(bytes, (memoryGrowth.limitMib - guestOverheadMib) * 2 ** 20);
    }
    using limit = new TimeLimit(this.#answerLimitMs);
    try {
      await abortable(memoryGrowth.growTo(neededMib), limit.signal);
    } catch (error) {
      if (limit.caused(error)) throw vmmSilent({ name: 'VMM' }, 'give the VM more memory', this.#answerLimitMs);
      throw error;
    }
    this.#memoryBytes = bytes;
  }

  /** After the agent was lost: how the VM ended. A VM that lives on without its agent is killed. */
  async end(): Promise<SandboxEnd> {
    let agentLost = false;
    const kill = () => {
      agentLost = true;
      // What cannot be released is told by whoever disposes of the sandbox.
      this.vm.kill().catch(() => {});
    };
    const timer = setTimeout(kill, guestStopGraceMs);
    void this.vm.channelLost.then(kill);
    try {
      const exit = await this.vm.wait();
      return { ...exit, agentLost };
    } finally {
      clearTimeout(timer);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#network?.stop();
    this.guest[Symbol.dispose]();
    // When the VM has ended, but also when something of it could not be released.
    await using others = new AsyncDisposableStack();
    others.use(this.#disks);
    others.defer(() => this.#volumes?.[Symbol.asyncDispose]());
    others.use(this.#network);
    await this.vm.kill();
    const directory = this.#vmDirectory;
    if (directory !== undefined) others.defer(() => rmSync(directory, { recursive: true, force: true }));
  }
}
