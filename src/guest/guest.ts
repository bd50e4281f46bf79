import { once } from 'node:events';
import type net from 'node:net';
import type { Readable, Writable } from 'node:stream';
import { type ServiceError, status } from '@grpc/grpc-js';
import { AgentClient, AgentService, type Mount, OutputStream, Protocol } from '../../gen/kiln/agent/v1/agent.ts';
import { KilnError } from '../errors.ts';
import { printable } from '../host/printable.ts';
import { clientOverSocket, type SocketClient } from '../rpc/grpc/client-transport.ts';
import { countRelayed } from '../sys/garbage.ts';
import { kilnVersion } from '../version.ts';
import { type ContainerStats, toContainerStats } from './stats.ts';

/** What the guest says of itself when it connects. */
export interface GuestFacts {
  readonly kernelRelease: string;
  readonly bootId: string;
  readonly memoryBytes: number;
  readonly vcpus: number;
  /** When the agent's process started, on the host's clock (epoch ms): kernel and init were done then. */
  readonly agentStartedAtMs: number;
}

/** One mount of a container's root filesystem, in the guest's terms. */
export interface GuestMount {
  /** A disk of the VM by its slot name, or any other source for mount(2). */
  readonly source: { readonly disk: string } | { readonly device: string };
  readonly target: string;
  readonly type: string;
  readonly options: readonly string[];
  /** Directories below target to create after the mount. */
  readonly directories: readonly string[];
}

export interface GuestContainer {
  readonly id: string;
  /** The guest's runtime-spec, JSON. */
  readonly spec: string;
  readonly mounts: readonly GuestMount[];
  readonly stdin: boolean;
  readonly stdout: boolean;
  readonly stderr: boolean;
}

export interface GuestOptions {
  /** The guest's hostname until a container sets its own. */
  readonly hostname: string;
  /** Milliseconds for the agent's answer to one call, before the call fails with `deadline-exceeded`. */
  readonly answerLimitMs: number;
}

/**
 * Milliseconds that RemoveContainer may take, at least: it writes all that the guest still holds in memory to the disk,
 * and a shorter limit would lose data where a longer one only costs patience.
 */
const removalLimitMs = 120_000;

/** The most bytes of stdin in one message: big enough to amortise a message, small against HTTP/2's window. */
const stdinChunkBytes = 128 * 1024;

const rebuildHint = 'build the guest image again with `npm run setup`';

/** One unary method of the generated service table. */
interface UnaryMethod<Req, Res> {
  readonly path: string;
  readonly requestSerialize: (request: Req) => Buffer;
  readonly responseDeserialize: (bytes: Buffer) => Res;
}

interface CallOptions {
  /** Milliseconds; no limit when absent. */
  readonly limitMs?: number;
  /** Gives the call up: it rejects with the signal's reason, and the agent is told. */
  readonly signal?: AbortSignal | undefined;
}

function toKilnError(error: unknown): KilnError {
  const { code, details } = error as Partial<ServiceError>;
  if (typeof code !== 'number') return KilnError.from(error);
  if (code === status.UNAVAILABLE) {
    return new KilnError('unavailable', 'the connection to the guest was lost', { cause: error });
  }
  return new KilnError(KilnError.codeOfStatus(code), printable(details || String(error)), { cause: error });
}

/** The agent of one VM. Every call fails with `unavailable` once the connection is gone. */
export class Guest implements Disposable {
  readonly facts: GuestFacts;
  readonly #connection: SocketClient<AgentClient>;
  readonly #answerLimitMs: number;

  private constructor(connection: SocketClient<AgentClient>, facts: GuestFacts, answerLimitMs: number) {
    this.#connection = connection;
    this.facts = facts;
    this.#answerLimitMs = answerLimitMs;
  }

  get #client(): AgentClient {
    return this.#connection.client;
  }

  /**
   * Speaks Hello on a connection that the agent dialled; the guest's clock is right afterwards.
   * Takes the socket over, also when it throws: `failed-precondition` when host and guest speak different protocols.
   */
  static async connect(socket: net.Socket, { hostname, answerLimitMs }: GuestOptions): Promise<Guest> {
    const connection = clientOverSocket(AgentClient, socket, { peer: 'the guest' });
    try {
      const hello = {
        protocol: Protocol.PROTOCOL_CURRENT,
        kilnVersion,
        features: [],
        realtimeNs: BigInt(Date.now()) * 1_000_000n,
        hostname,
      };
      const answer = await unary(connection.client, AgentService.hello, hello, { limitMs: answerLimitMs });
      const answeredAt = Date.now();
      if (answer.protocol !== Protocol.PROTOCOL_CURRENT) {
        throw new KilnError(
          'failed-precondition',
          `the guest image speaks agent protocol ${answer.protocol} (Kiln ${answer.kilnVersion}), ` +
            `this kilnd speaks ${Protocol.PROTOCOL_CURRENT} (Kiln ${kilnVersion})`,
          { hint: rebuildHint },
        );
      }
      const facts = {
        kernelRelease: answer.kernelRelease,
        bootId: answer.bootId,
        memoryBytes: Number(answer.memoryBytes),
        vcpus: answer.vcpus,
        agentStartedAtMs: answeredAt - Number(answer.answeredNs - answer.agentStartedNs) / 1e6,
      };
      return new Guest(connection, facts, answerLimitMs);
    } catch (error) {
      connection.close();
      // The agent found the mismatch: its message names both versions, and the remedy is the same.
      if (error instanceof KilnError && error.code === 'failed-precondition' && error.hint === undefined) {
        throw new KilnError(error.code, error.message, { hint: rebuildHint, cause: error });
      }
      throw error;
    }
  }

  /**
   * Everything short of the user's program; returns the init process's pid in the guest. An aborted signal rejects with
   * its reason; what the guest has made by then ends with the VM.
   */
  async createContainer(container: GuestContainer, signal?: AbortSignal): Promise<number> {
    const mounts: Mount[] = container.mounts.map((mount) => ({
      source:
        'disk' in mount.source
          ? { $case: 'disk', value: mount.source.disk }
          : { $case: 'device', value: mount.source.device },
      target: mount.target,
      type: mount.type,
      options: [...mount.options],
      directories: [...mount.directories],
    }));
    const { id, stdin, stdout, stderr } = container;
    const spec = Buffer.from(container.spec);
    const request = { id, spec, mounts, stdin, stdout, stderr };
    return (await this.#call(AgentService.createContainer, request, { signal })).pid;
  }

  async startContainer(id: string): Promise<void> {
    await this.#call(AgentService.startContainer, { id });
  }

  async signal(id: string, signal: number, all: boolean): Promise<void> {
    await this.#call(AgentService.signalContainer, { id, signal, all });
  }

  /** Resolves with the init process's exit status (128 + n for signal n) when it has ended. */
  async waitExit(id: string): Promise<number> {
    return (await unary(this.#client, AgentService.waitContainer, { id })).exitStatus;
  }

  /** The guest's process ids of a container, its init's apart. */
  async processes(id: string): Promise<{ pids: readonly number[]; initPid: number }> {
    return this.#call(AgentService.listProcesses, { id });
  }

  /** Freezes every process of a running container and flushes its filesystems. */
  async pauseContainer(id: string): Promise<void> {
    await this.#call(AgentService.pauseContainer, { id });
  }

  async resumeContainer(id: string): Promise<void> {
    await this.#call(AgentService.resumeContainer, { id });
  }

  /** What a container uses; also of one that has stopped, until it is removed. */
  async stats(id: string): Promise<ContainerStats> {
    return toContainerStats(await this.#call(AgentService.readStats, { id }));
  }

  /** Writes files of a container's control group, all or none; `invalid-argument` with the kernel's reason. */
  async setLimits(id: string, files: readonly { readonly name: string; readonly content: string }[]): Promise<void> {
    await this.#call(AgentService.setLimits, { id, files: [...files] });
  }

  /**
   * Calls `onKills` whenever processes of the container were killed for want of memory, with their number so far, until
   * the container is removed.
   */
  async watchOom(id: string, onKills: (kills: number) => void): Promise<void> {
    const call = this.#client.watchOom({ id });
    call.on('error', () => {});
    try {
      for await (const { kills } of call) onKills(Number(kills));
    } catch (error) {
      throw toKilnError(error);
    }
  }

  /** Removes a container and unmounts its filesystems, so that what it wrote is on the disk when this resolves. */
  async removeContainer(id: string, options: { readonly force: boolean; readonly guestEnds: boolean }): Promise<void> {
    const limitMs = Math.max(this.#answerLimitMs, removalLimitMs);
    await this.#call(AgentService.removeContainer, { id, ...options }, { limitMs });
  }

  /**
   * Copies one output stream to `sink` until its last writer has closed it, or the sink is destroyed. The sink's
   * back-pressure reaches the program.
   */
  async pipeOutput(id: string, stream: 'stdout' | 'stderr', sink: Writable): Promise<void> {
    const number = stream === 'stdout' ? OutputStream.OUTPUT_STREAM_STDOUT : OutputStream.OUTPUT_STREAM_STDERR;
    const call = this.#client.readOutput({ id, stream: number });
    // The loop below reports errors; one that comes after it (the cancellation is one) has nobody else to go to.
    call.on('error', () => {});
    const cancel = () => call.cancel();
    sink.once('close', cancel);
    try {
      for await (const { data } of call) {
        if (sink.destroyed) return;
        if (!sink.write(data)) await drainedOrClosed(sink);
        countRelayed(data.length);
      }
    } catch (error) {
      if (!sink.destroyed) throw toKilnError(error);
    } finally {
      sink.off('close', cancel);
      cancel();
    }
  }

  /**
   * Copies `source` to the program's stdin and closes it at the source's end, also when that is destroyed. Destroys the
   * source when nobody takes its bytes any more.
   */
  async pipeStdin(id: string, source: Readable): Promise<void> {
    const { promise: answered, resolve, reject } = Promise.withResolvers<void>();
    const call = this.#client.writeStdin((error) => (error === null ? resolve() : reject(toKilnError(error))));
    call.on('error', () => {});
    const stop = () => source.destroy();
    answered.then(stop, stop);
    try {
      call.write({ id, data: Buffer.alloc(0) });
      for await (const chunk of source as AsyncIterable<Buffer>) {
        for (let at = 0; at < chunk.length; at += stdinChunkBytes) {
          const data = chunk.subarray(at, at + stdinChunkBytes);
          if (!call.write({ id: '', data })) await Promise.race([once(call, 'drain'), answered]);
        }
        countRelayed(chunk.length);
      }
    } catch (error) {
      // Destroyed: by the owner because the program has ended, or above because of the answer, which tells why.
      if (!source.destroyed || source.errored !== null) throw error;
    } finally {
      call.end();
    }
    await answered;
  }

  #call<Req, Res>(method: UnaryMethod<Req, Res>, request: Req, options: CallOptions = {}): Promise<Res> {
    return unary(this.#client, method, request, { limitMs: this.#answerLimitMs, ...options });
  }

  [Symbol.dispose](): void {
    this.#connection.close();
  }
}

function drainedOrClosed(sink: Writable): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      sink.off('drain', done);
      sink.off('close', done);
      resolve();
    };
    sink.on('drain', done);
    sink.on('close', done);
  });
}

function unary<Req, Res>(
  client: AgentClient,
  method: UnaryMethod<Req, Res>,
  request: Req,
  { limitMs, signal }: CallOptions = {},
): Promise<Res> {
  const { path, requestSerialize, responseDeserialize } = method;
  if (signal?.aborted) return Promise.reject(signal.reason);
  return new Promise((resolve, reject) => {
    const deadline = limitMs === undefined ? Number.POSITIVE_INFINITY : Date.now() + limitMs;
    const done = (error: ServiceError | null, response?: Res) => {
      signal?.removeEventListener('abort', cancel);
      if (error === null && response !== undefined) resolve(response);
      else if (signal?.aborted) reject(signal.reason);
      else if (error?.code === status.DEADLINE_EXCEEDED) reject(silent(path, limitMs ?? 0, error));
      else reject(toKilnError(error));
    };
    const call = client.makeUnaryRequest(path, requestSerialize, responseDeserialize, request, { deadline }, done);
    const cancel = () => call.cancel();
    signal?.addEventListener('abort', cancel, { once: true });
  });
}

function silent(path: string, limitMs: number, cause: unknown): KilnError {
  const name = path.slice(path.lastIndexOf('/') + 1);
  return new KilnError(
    'deadline-exceeded',
    `the agent in the guest did not answer ${name} within ${limitMs / 1000} s`,
    {
      cause,
    },
  );
}
