/**
 * An agent as the tests have it: the real main.ts under the real Node, dialling a Unix socket instead of vsock, with
 * fake-crun.sh in place of crun.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { ClientUnaryCall, ServiceError } from '@grpc/grpc-js';
import {
  AgentClient,
  CreateContainerRequest,
  HelloRequest,
  type HelloResponse,
  type Mount,
  OutputStream,
  Protocol,
} from '../../../gen/kiln/agent/v1/agent.ts';
import { clientOverSocket, type SocketClient } from '../../../src/rpc/grpc/client-transport.ts';

const repository = join(import.meta.dirname, '../../..');

export class TestAgent implements AsyncDisposable {
  readonly directory = mkdtempSync(join(tmpdir(), 'kiln-agent-'));
  readonly #listener: Server;
  readonly #process: ChildProcess;
  #connection: SocketClient<AgentClient> | undefined;

  constructor() {
    const socket = join(this.directory, 'host.sock');
    this.#listener = createServer().listen(socket);
    this.#process = spawn(process.execPath, ['--no-warnings', join(repository, 'agent/main.ts')], {
      env: {
        PATH: process.env.PATH,
        KILN_AGENT_SOCKET: socket,
        KILN_AGENT_DIR: this.directory,
        KILN_CRUN: join(import.meta.dirname, 'fake-crun.sh'),
      },
      stdio: ['ignore', 'inherit', 'inherit'],
    });
  }

  /** The agent's next connection. */
  async accept(): Promise<AgentClient> {
    const [socket] = (await once(this.#listener, 'connection')) as [Socket];
    this.#connection = clientOverSocket(AgentClient, socket, { peer: 'the guest' });
    return this.#connection.client;
  }

  /** Breaks the connection from the host's side. */
  disconnect(): void {
    this.#connection?.close();
  }

  /** The connection's end, seen from the host. */
  get disconnected(): Promise<Error> | undefined {
    return this.#connection?.closed;
  }

  /** What the agent has left on its disk. */
  leftovers(): string[] {
    return readdirSync(this.directory, { recursive: true, encoding: 'utf8' }).filter((name) =>
      /(containers|crun)\//.test(name),
    );
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#connection?.close();
    this.#listener.close();
    if (this.#process.exitCode === null && this.#process.signalCode === null) {
      const exit = once(this.#process, 'exit');
      this.#process.kill();
      await exit;
    }
    rmSync(this.directory, { recursive: true });
  }
}

export function hello(client: AgentClient, request: Partial<HelloRequest> = {}): Promise<HelloResponse> {
  const whole = { protocol: Protocol.PROTOCOL_CURRENT, kilnVersion: '0.0.0-test', ...request };
  return unary((done) => client.hello(HelloRequest.fromPartial(whole), done));
}

/** A unary call as a promise. */
export function unary<Response>(
  call: (done: (error: ServiceError | null, response: Response) => void) => ClientUnaryCall,
): Promise<Response> {
  return new Promise((resolve, reject) => {
    call((error, response) => (error === null ? resolve(response) : reject(error)));
  });
}

/** Creates a container whose program is a shell script (without quotes and newlines). */
export async function create(client: AgentClient, id: string, script: string, mounts: Mount[] = []): Promise<number> {
  const spec = Buffer.from(JSON.stringify({ script }));
  const request = CreateContainerRequest.fromPartial({ id, spec, stdin: true, stdout: true, stderr: true });
  const response = await unary<{ pid: number }>((done) => client.createContainer({ ...request, mounts }, done));
  return response.pid;
}

export const start = (client: AgentClient, id: string) => unary((done) => client.startContainer({ id }, done));
export const wait = (client: AgentClient, id: string) =>
  unary<{ exitStatus: number; exitedAtNs: bigint }>((done) => client.waitContainer({ id }, done));
export const remove = (client: AgentClient, id: string, force = false) =>
  unary((done) => client.removeContainer({ id, force, guestEnds: false }, done));
export const signal = (client: AgentClient, id: string, number: number, all = false) =>
  unary((done) => client.signalContainer({ id, signal: number, all }, done));

/** Everything that comes on a stream until it ends. */
export async function read(client: AgentClient, id: string, stream: 'stdout' | 'stderr' = 'stdout'): Promise<Buffer> {
  const which = stream === 'stdout' ? OutputStream.OUTPUT_STREAM_STDOUT : OutputStream.OUTPUT_STREAM_STDERR;
  const received: Buffer[] = [];
  for await (const message of client.readOutput({ id, stream: which })) received.push(message.data);
  return Buffer.concat(received);
}

/** Writes to stdin and closes it. */
export function write(client: AgentClient, id: string, ...chunks: (string | Buffer)[]): Promise<void> {
  return new Promise((resolve, reject) => {
    const call = client.writeStdin((error) => (error === null ? resolve() : reject(error)));
    call.write({ id, data: Buffer.alloc(0) });
    for (const chunk of chunks) call.write({ id: '', data: Buffer.from(chunk) });
    call.end();
  });
}
