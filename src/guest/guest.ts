import type net from 'node:net';
import type { Readable } from 'node:stream';
import {
  type AdjustClockRequest,
  type AdjustClockResponse,
  AgentClient,
  AgentService,
  type SampleRandomnessResponse,
} from '../../gen/kiln/agent/v1/agent.ts';
import { KilnError } from '../errors.ts';
import type { NameAnswer, NameQuery } from '../network/ask.ts';
import type { NetworkConfig } from '../network/config.ts';
import { clientOverSocket, type SocketClient } from '../rpc/grpc/client-transport.ts';
import { type CallOptions, type UnaryMethod, unary } from './call.ts';
import { type ClockReading, type Correction, findCorrection, seemsRight, setClock, toMs, toNs } from './clock.ts';
import { type ListeningPorts, type LoopbackPort, relayConnection, watchListeners } from './connections.ts';
import { Creation } from './creation.ts';
import { type ChangesStream, type FilesTarget, provideFiles, readChanges, readFiles, writeFiles } from './files.ts';
import { type GuestFacts, type HelloOptions, sayHello } from './hello.ts';
import { encodeLoopback, relayQueries } from './nameservers.ts';
import { toNetwork } from './network.ts';
import { type ProcessDetails, toProcessDetails } from './process-details.ts';
import { type ContainerStats, toContainerStats } from './stats.ts';
import { type OutputTarget, type PipedOutput, pipeOutputs, pipeStdin } from './streams.ts';
import {
  type GuestContainer,
  type GuestPod,
  type GuestProcess,
  type GuestStdio,
  type ProcessRef,
  pidOf,
  type TerminalSize,
  toMount,
  toStdio,
} from './terms.ts';
import { type GuestExit, waitExit } from './wait.ts';

/**
 * Milliseconds that RemoveContainer may take, at least: it writes all that the guest still holds in memory to the disk,
 * and a shorter limit would lose data where a longer one only costs patience.
 */
const removalLimitMs = 120_000;

/** Milliseconds for the creation of a container that gets files from the host, at least: they may be many. */
const filesLimitMs = 600_000;

/** The most containers of a guest that are looked at: it may name as many as it likes, of any length. */
const maxContainers = 1000;
const maxIdChars = 255;

/** The agent of one VM. Every call fails with `unavailable` once the connection is gone. */
export class Guest implements Disposable {
  readonly facts: GuestFacts;
  readonly #connection: SocketClient<AgentClient>;
  readonly #answerLimitMs: number;
  /** Of containers and processes whose end nobody waits for yet. */
  readonly #creations = new Map<string, Creation>();

  private constructor(connection: SocketClient<AgentClient>, facts: GuestFacts, answerLimitMs: number) {
    this.#connection = connection;
    this.facts = facts;
    this.#answerLimitMs = answerLimitMs;
  }

  get #client(): AgentClient {
    return this.#connection.client;
  }

  /**
   * Speaks Hello on a connection that the agent dialled; the guest has an identity of its own and the right time
   * afterwards. Takes the socket over, also when it throws.
   *
   * @throws KilnError as `sayHello`
   */
  static async connect(socket: net.Socket, options: HelloOptions): Promise<Guest> {
    const { answerLimitMs } = options;
    const connectedAtMs = Date.now();
    const connection = clientOverSocket(AgentClient, socket, { peer: 'the guest' });
    try {
      const { facts, reading } = await sayHello(connection.client, options, connectedAtMs);
      const guest = new Guest(connection, facts, answerLimitMs);
      if (reading !== undefined && !seemsRight(reading)) await guest.checkClock(answerLimitMs);
      return guest;
    } catch (error) {
      connection.close();
      throw error;
    }
  }

  /**
   * Everything short of the user's program; returns the init process's pid in the guest. An aborted signal rejects with
   * its reason; what the guest has made by then ends with the VM.
   */
  async createContainer(container: GuestContainer, signal?: AbortSignal): Promise<number> {
    const { id, stdio, volumeOptions, disks = [] } = container;
    const network = toNetwork(container.network);
    const volumes = volumeOptions === undefined ? undefined : { options: volumeOptions };
    const spec = Buffer.from(container.spec);
    const mounts = container.mounts.map(toMount);
    const common = { id, spec, mounts, stdio: toStdio(stdio), volumes, network, disks: [...disks] };
    const { files } = container;
    const create = (awaitFiles: boolean, limitMs: number) => {
      const begin = () => this.#client.createContainer({ ...common, awaitFiles });
      return Creation.of(begin, AgentService.createContainer, { signal, limitMs });
    };
    const limitMs = Math.max(this.#answerLimitMs, filesLimitMs);
    const creation = await (files === undefined
      ? create(false, this.#answerLimitMs)
      : provideFiles(this.#client, id, files, () => create(true, limitMs)));
    return this.#made({ id, execId: '' }, creation);
  }

  /**
   * The device numbers of disks, whose sizes the guest's kernel knows then. An aborted signal rejects with its reason.
   *
   * @throws KilnError internal for a disk that the guest does not find, or finds of another size
   */
  async findDisks(
    disks: readonly { readonly serial: string; readonly bytes: number }[],
    signal?: AbortSignal,
  ): Promise<readonly { readonly major: number; readonly minor: number }[]> {
    const wanted = disks.map(({ serial, bytes }) => ({ serial, bytes: BigInt(bytes) }));
    const { devices } = await this.#call(AgentService.findDisks, { disks: wanted }, { signal });
    if (devices.length === disks.length) return devices;
    throw new KilnError('internal', `the agent in the guest names ${devices.length} of ${disks.length} disks`);
  }

  /**
   * Makes what the containers of a pod share, once, and takes the network over; `invalid-argument` for a kernel parameter that
   * the guest refuses.
   */
  async preparePod({ shmBytes, sysctl, ...names }: GuestPod, network?: NetworkConfig): Promise<void> {
    const pod = { ...names, sysctl: { ...sysctl }, shmBytes: BigInt(shmBytes) };
    await this.#call(AgentService.preparePod, { ...pod, network: toNetwork(network) });
  }

  /** The ids of the containers that are there, also of those that are being made: at most a thousand. */
  async containers(): Promise<readonly string[]> {
    const { ids } = await this.#call(AgentService.listContainers, {});
    return ids.filter(({ length }) => length <= maxIdChars).slice(0, maxContainers);
  }

  /**
   * @param stdinEnded nothing will be piped to its stdin; for a guest that `takesEndedStdin`
   * @param network what the guest has to take over before; absent when there is nothing new
   */
  async startContainer(id: string, stdinEnded = false, network?: NetworkConfig): Promise<void> {
    await this.#call(AgentService.startContainer, { id, network: toNetwork(network), stdinEnded });
  }

  /**
   * Runs one more process in the container; returns its pid in the guest.
   *
   * @param process the guest's runtime-spec `process`, JSON
   * @param stdinEnded as of `startContainer`
   */
  async exec(ref: ProcessRef, process: string, stdio: GuestStdio, stdinEnded = false): Promise<number> {
    const request = { ...ref, process: Buffer.from(process), stdio: toStdio(stdio), stdinEnded };
    const begin = () => this.#client.execProcess(request);
    return this.#made(ref, await Creation.of(begin, AgentService.execProcess, { limitMs: this.#answerLimitMs }));
  }

  async signal({ id, execId }: ProcessRef, signal: number, all: boolean): Promise<void> {
    await this.#call(AgentService.signalProcess, { id, execId, signal, all });
  }

  /** See `waitExit` of wait.ts. The call that has made a process tells of it. */
  async waitExit(ref: ProcessRef, onOomKills?: (kills: number) => void): Promise<GuestExit> {
    return (await this.#takeCreation(ref)?.exit(onOomKills)) ?? waitExit(this.#client, ref, onOomKills);
  }

  #made(ref: ProcessRef, creation: Creation): number {
    this.#creations.set(keyOf(ref), creation);
    return creation.pid;
  }

  #takeCreation(ref: ProcessRef): Creation | undefined {
    const key = keyOf(ref);
    const creation = this.#creations.get(key);
    this.#creations.delete(key);
    return creation;
  }

  /** The container's processes. */
  async processes(id: string): Promise<readonly GuestProcess[]> {
    const { processes } = await this.#call(AgentService.listProcesses, { id });
    for (const process of processes) pidOf(process);
    return processes;
  }

  /** The same with what ps(1) shows of them. */
  async processTable(id: string): Promise<readonly ProcessDetails[]> {
    const { processes } = await this.#call(AgentService.readProcesses, { id });
    return processes.map(toProcessDetails);
  }

  /** Whether the container's program was started and is frozen, and which processes were exec'd and not removed. */
  async describe(
    id: string,
  ): Promise<{ readonly started: boolean; readonly paused: boolean; readonly execs: readonly GuestProcess[] }> {
    return this.#call(AgentService.describeContainer, { id });
  }

  /** Sets the size of a process's terminal. */
  async resize({ id, execId }: ProcessRef, { width, height }: TerminalSize): Promise<void> {
    await this.#call(AgentService.resizeTerminal, { id, execId, width, height });
  }

  /** Forgets an exec'd process that has ended, and what is left of its output. */
  async removeProcess({ id, execId }: ProcessRef): Promise<void> {
    this.#takeCreation({ id, execId })?.[Symbol.dispose]();
    await this.#call(AgentService.removeProcess, { id, execId });
  }

  /** Freezes every process of a running container and flushes its filesystems. */
  async pauseContainer(id: string): Promise<void> {
    await this.#call(AgentService.pauseContainer, { id });
  }

  async resumeContainer(id: string): Promise<void> {
    await this.#call(AgentService.resumeContainer, { id });
  }

  /** What all containers use together. */
  async totalStats(): Promise<ContainerStats> {
    return toContainerStats(await this.#call(AgentService.readStats, { id: '' }));
  }

  /** What a container uses; also of one that has stopped, until it is removed. */
  async stats(id: string): Promise<ContainerStats> {
    return toContainerStats(await this.#call(AgentService.readStats, { id }));
  }

  /** Writes files of a container's control group, all or none; `invalid-argument` with the kernel's reason. */
  async setLimits(id: string, files: readonly { readonly name: string; readonly content: string }[]): Promise<void> {
    await this.#call(AgentService.setLimits, { id, files: [...files] });
  }

  /** See `readChanges` of files.ts. */
  readChanges(id: string, changedSinceNs: bigint, limitMs: number): ChangesStream {
    return readChanges(this.#client, { id, changedSinceNs }, limitMs);
  }

  /**
   * Puts files from an upper directory into the root filesystem of a container that is paused: what its marks say is gone is
   * removed.
   */
  async provideFiles(id: string, stream: AsyncIterable<Buffer>): Promise<void> {
    await writeFiles(this.#client, { id, path: Buffer.alloc(0), keepOwners: true }, stream);
  }

  /** A file or directory as the container's processes see it, as a tar stream. */
  readFiles(id: string, path: Buffer): AsyncGenerator<Buffer> {
    return readFiles(this.#client, { id, path });
  }

  /** Puts the files of a tar stream into a directory that the container's processes see. */
  writeFiles(request: FilesTarget, stream: AsyncIterable<Buffer>): Promise<void> {
    return writeFiles(this.#client, request, stream);
  }

  /** Sets the clock right again. Throws when the guest does not answer within `limitMs`. */
  async checkClock(limitMs: number): Promise<void> {
    await setClock(await this.#readClock(0, limitMs), (byMs) => this.#readClock(byMs, limitMs));
  }

  /** Corrects the clock of a guest that runs, and tells how. Throws when the guest does not answer within `limitMs`. */
  async correctClock(limitMs: number): Promise<Correction> {
    const correction = await findCorrection(() => this.#readClock(0, limitMs));
    const { byMs, stepped } = correction;
    if (byMs !== 0) await this.#adjustClock({ deltaNs: toNs(byMs), slew: !stepped }, limitMs);
    return correction;
  }

  /** What the guest's clock says; for tests. */
  readClock(): Promise<ClockReading> {
    return this.#readClock(0);
  }

  /** Random bytes of each of the guest's generators, for tests. */
  sampleRandomness(): Promise<SampleRandomnessResponse> {
    return this.#call(AgentService.sampleRandomness, {});
  }

  /** Removes a container and unmounts its filesystems, so that what it wrote is on the disk when this resolves. */
  async removeContainer(id: string, options: { readonly force: boolean; readonly guestEnds: boolean }): Promise<void> {
    this.#takeCreation({ id, execId: '' })?.[Symbol.dispose]();
    const limitMs = Math.max(this.#answerLimitMs, removalLimitMs);
    await this.#call(AgentService.removeContainer, { id, ...options }, { limitMs });
  }

  /** Has the guest's network be as this says, and no more what was said before. */
  async setNetwork(network: NetworkConfig): Promise<void> {
    await this.#call(AgentService.setNetwork, { network: toNetwork(network) });
  }

  /** See `watchListeners` of connections.ts. */
  watchListeners(onPorts: (ports: ListeningPorts) => void, signal: AbortSignal): Promise<void> {
    return watchListeners(this.#client, onPorts, signal);
  }

  /** See `relayConnection` of connections.ts. */
  relayConnection(port: LoopbackPort, socket: net.Socket, signal: AbortSignal): Promise<void> {
    return relayConnection(this.#client, port, socket, signal);
  }

  /** Has the guest take queries for these, dotted quads or "::1", as ServeNameservers of the protocol does. */
  async serveNameservers(addresses: readonly string[]): Promise<void> {
    await this.#call(AgentService.serveNameservers, { addresses: addresses.map(encodeLoopback) });
  }

  /** See `relayQueries` of nameservers.ts. */
  relayQueries(answer: (query: NameQuery) => Promise<NameAnswer>, signal: AbortSignal): Promise<void> {
    return relayQueries(this.#client, answer, signal);
  }

  /** See `pipeOutputs` of streams.ts; with an agent of before it takes a call for each. */
  pipeOutputs<Target extends OutputTarget>(ref: ProcessRef, targets: readonly Target[]): PipedOutput<Target>[] {
    if (this.facts.joinsOutputs) return pipeOutputs(this.#client, ref, targets);
    return targets.flatMap((target) => pipeOutputs(this.#client, ref, [target]));
  }

  /** See `pipeStdin` of streams.ts. */
  pipeStdin(ref: ProcessRef, source: Readable): Promise<void> {
    return pipeStdin(this.#client, ref, source);
  }

  async #readClock(byMs: number, limitMs = this.#answerLimitMs): Promise<ClockReading> {
    const askedAt = Date.now();
    const { realtimeNs } = await this.#adjustClock({ deltaNs: toNs(byMs), slew: false }, limitMs);
    return { askedAt, answeredAt: Date.now(), guestMs: toMs(realtimeNs) };
  }

  #adjustClock(request: AdjustClockRequest, limitMs: number): Promise<AdjustClockResponse> {
    return this.#call(AgentService.adjustClock, request, { limitMs });
  }

  #call<Req, Res>(method: UnaryMethod<Req, Res>, request: Req, options: CallOptions = {}): Promise<Res> {
    return unary(this.#client, method, request, { limitMs: this.#answerLimitMs, ...options });
  }

  [Symbol.dispose](): void {
    this.#connection.close();
  }
}

function keyOf({ id, execId }: ProcessRef): string {
  return JSON.stringify([id, execId]);
}
