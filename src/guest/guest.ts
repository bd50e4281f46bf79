import { once } from 'node:events';
import type net from 'node:net';
import type { Readable, Writable } from 'node:stream';
import { type ServiceError, status } from '@grpc/grpc-js';
import { AgentClient, AgentService, type Mount, OutputStream, Protocol } from '../../gen/kiln/agent/v1/agent.ts';
import { KilnError } from '../errors.ts';
import { clientOverSocket, type SocketClient } from '../rpc/grpc/client-transport.ts';
import { kilnVersion } from '../version.ts';

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

/** The most bytes of stdin in one message: big enough to amortise a message, small against HTTP/2's window. */
const stdinChunkBytes = 128 * 1024;

/** One unary method of the generated service table. */
interface UnaryMethod<Req, Res> {
  readonly path: string;
  readonly requestSerialize: (request: Req) => Buffer;
  readonly responseDeserialize: (bytes: Buffer) => Res;
}

function toKilnError(error: unknown): KilnError {
  const { code, details } = error as Partial<ServiceError>;
  if (typeof code !== 'number') return KilnError.from(error);
  if (code === status.UNAVAILABLE) {
    return new KilnError('unavailable', 'the connection to the guest was lost', { cause: error });
  }
  return new KilnError(KilnError.codeOfStatus(code), details || String(error), { cause: error });
}

/** The agent of one VM. Every call fails with `unavailable` once the connection is gone. */
export class Guest implements Disposable {
  readonly facts: GuestFacts;
  readonly #connection: SocketClient<AgentClient>;

  private constructor(connection: SocketClient<AgentClient>, facts: GuestFacts) {
    this.#connection = connection;
    this.facts = facts;
  }

  get #client(): AgentClient {
    return this.#connection.client;
  }

  /**
   * Speaks Hello on a connection that the agent dialled; the guest's clock is right afterwards.
   * Throws `failed-precondition` when host and guest speak different protocols.
   */
  static async connect(socket: net.Socket, hostname: string): Promise<Guest> {
    const connection = clientOverSocket(AgentClient, socket, { peer: 'the guest' });
    try {
      const answer = await unary(connection.client, AgentService.hello, {
        protocol: Protocol.PROTOCOL_CURRENT,
        kilnVersion,
        features: [],
        realtimeNs: BigInt(Date.now()) * 1_000_000n,
        hostname,
      });
      const answeredAt = Date.now();
      if (answer.protocol !== Protocol.PROTOCOL_CURRENT) {
        throw new KilnError(
          'failed-precondition',
          `the guest image speaks agent protocol ${answer.protocol} (Kiln ${answer.kilnVersion}), ` +
            `this kilnd speaks ${Protocol.PROTOCOL_CURRENT} (Kiln ${kilnVersion})`,
          { hint: 'build the guest image again with `npm run setup`' },
        );
      }
      return new Guest(connection, {
        kernelRelease: answer.kernelRelease,
        bootId: answer.bootId,
        memoryBytes: Number(answer.memoryBytes),
        vcpus: answer.vcpus,
        agentStartedAtMs: answeredAt - Number(answer.answeredNs - answer.agentStartedNs) / 1e6,
      });
    } catch (error) {
      connection.close();
      throw error;
    }
  }

  /** Everything short of the user's program; returns the init process's pid in the guest. */
  async createContainer(container: GuestContainer): Promise<number> {
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
    return (await unary(this.#client, AgentService.createContainer, request)).pid;
  }

  async startContainer(id: string): Promise<void> {
    await unary(this.#client, AgentService.startContainer, { id });
  }

  async signal(id: string, signal: number, all: boolean): Promise<void> {
    await unary(this.#client, AgentService.signalContainer, { id, signal, all });
  }

  /** Resolves with the init process's exit status (128 + n for signal n) when it has ended. */
  async waitExit(id: string): Promise<number> {
    return (await unary(this.#client, AgentService.waitContainer, { id })).exitStatus;
  }

  /** The guest's process ids of a container, its init's apart. */
  async processes(id: string): Promise<{ pids: readonly number[]; initPid: number }> {
    return unary(this.#client, AgentService.listProcesses, { id });
  }

  /** Removes a container and unmounts its filesystems, so that what it wrote is on the disk when this resolves. */
  async removeContainer(id: string, force: boolean): Promise<void> {
    await unary(this.#client, AgentService.removeContainer, { id, force });
  }

  /** Copies one output stream to `sink` until its last writer has closed it. The sink's back-pressure reaches the program. */
  async pipeOutput(id: string, stream: 'stdout' | 'stderr', sink: Writable): Promise<void> {
    const number = stream === 'stdout' ? OutputStream.OUTPUT_STREAM_STDOUT : OutputStream.OUTPUT_STREAM_STDERR;
    const call = this.#client.readOutput({ id, stream: number });
    try {
      for await (const { data } of call) {
        if (sink.destroyed) return;
        if (!sink.write(data)) await drainedOrClosed(sink);
      }
    } catch (error) {
      throw toKilnError(error);
    } finally {
      call.cancel();
    }
  }

  /** Copies `source` to the program's stdin and closes it at the source's end. Ends early when the program is gone. */
  async pipeStdin(id: string, source: Readable): Promise<void> {
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const call = this.#client.writeStdin((error) => (error === null ? resolve() : reject(toKilnError(error))));
    call.on('error', () => {});
    promise.catch(() => source.destroy());
    try {
      call.write({ id, data: Buffer.alloc(0) });
      for await (const chunk of source as AsyncIterable<Buffer>) {
        for (let at = 0; at < chunk.length; at += stdinChunkBytes) {
          const data = chunk.subarray(at, at + stdinChunkBytes);
          if (!call.write({ id: '', data })) await Promise.race([once(call, 'drain'), promise]);
        }
      }
    } finally {
      call.end();
    }
    await promise;
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

function unary<Req, Res>(client: AgentClient, method: UnaryMethod<Req, Res>, request: Req): Promise<Res> {
  const { path, requestSerialize, responseDeserialize } = method;
  return new Promise((resolve, reject) => {
    client.makeUnaryRequest(path, requestSerialize, responseDeserialize, request, (error, response) => {
      if (error !== null || response === undefined) reject(toKilnError(error));
      else resolve(response);
    });
  });
}
