/**
 * An agent as the tests have it: the real main.ts under the real Node, dialling a Unix socket instead of vsock, with
 * fake-crun.sh in place of crun.
 */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { ClientDuplexStream, ClientReadableStream, ClientUnaryCall, ServiceError } from '@grpc/grpc-js';
import type { ProcessName } from '../../../agent/process.ts';
import {
  AgentClient,
  type DescribeContainerResponse,
  HelloRequest,
  type HelloResponse,
  type ListProcessesResponse,
  type Mount,
  OutputStream,
  Protocol,
  type ReadOutputRequest,
  type ReadOutputResponse,
  type Stdio,
  type WaitProcessResponse,
} from '../../../gen/kiln/agent/v1/agent.ts';
import { clientOverSocket, type SocketClient } from '../../../src/rpc/grpc/client-transport.ts';

const repository = join(import.meta.dirname, '../../..');

/** Compiled once for each test file that needs terminals. */
export function compileFakeConsole(out: string): void {
  execFileSync('gcc', ['-O1', '-Wall', '-Werror', '-o', out, join(import.meta.dirname, 'fake-console.c')]);
}

/** The real program, compiled once for each test file that needs it. */
export function compileListeners(out: string): void {
  execFileSync('gcc', ['-O1', '-Wall', '-Werror', '-o', out, join(repository, 'native/guest-listeners.c')]);
}

export class TestAgent implements AsyncDisposable {
  readonly directory = mkdtempSync(join(tmpdir(), 'kiln-agent-'));
  /** What makes the fake crun's terminals; see `compileFakeConsole`. */
  readonly fakeConsole = join(this.directory, 'fake-console');
  /** kiln-listeners, by a name that no search for leftovers knows; see `compileListeners`. */
  readonly listenersProgram = join(this.directory, 'listeners');
  /** Stands for kiln-nameservers. */
  readonly nameserversProgram = join(this.directory, 'nameservers');
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
        KILN_LISTENERS: this.listenersProgram,
        KILN_NAMESERVERS: this.nameserversProgram,
        FAKE_CONSOLE: this.fakeConsole,
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

/** How a process of these tests reads and writes unless it says otherwise. */
const pipes: Stdio = { stdin: true, stdout: true, stderr: true, terminal: false, width: 0, height: 0 };

/** Creates a container whose program is a shell script (without quotes and newlines). */
export async function create(
  client: AgentClient,
  id: string,
  script: string,
  { mounts = [], stdio = {}, linux }: { mounts?: Mount[]; stdio?: Partial<Stdio>; linux?: object } = {},
): Promise<number> {
  const spec = Buffer.from(JSON.stringify({ script, linux }));
  const none = { volumes: undefined, network: undefined, disks: [], awaitFiles: false };
  const request = { id, spec, mounts, stdio: { ...pipes, ...stdio }, ...none };
  const call = client.createContainer(request);
  return firstPid(call);
}

/** What the first answer of a call tells of; the call is given up then. */
async function firstPid(call: ClientReadableStream<{ readonly pid: number }>): Promise<number> {
  call.on('error', () => {});
  for await (const { pid } of call as AsyncIterable<{ readonly pid: number }>) return pid;
  throw new Error('the call told of nothing');
}

/** Runs one more shell script (without quotes and newlines) in a container. */
export async function exec(
  client: AgentClient,
  name: ProcessName,
  script: string,
  stdio: Partial<Stdio> = {},
  stdinEnded = false,
): Promise<number> {
  const process = Buffer.from(JSON.stringify({ args: [script.split(' ')[0]], script }));
  const request = { ...name, process, stdio: { ...pipes, ...stdio }, stdinEnded };
  return firstPid(client.execProcess(request));
}

/** A process: a container's init by the container's id, another by both ids. */
export type ProcessId = string | ProcessName;

function named(process: ProcessId): ProcessName {
  return typeof process === 'string' ? { id: process, execId: '' } : process;
}

export const start = (client: AgentClient, id: string, stdinEnded = false) =>
  unary((done) => client.startContainer({ id, network: undefined, stdinEnded }, done));
/** The last message of WaitProcess. */
export async function wait(client: AgentClient, process: ProcessId): Promise<WaitProcessResponse> {
  let last: WaitProcessResponse | undefined;
  for await (const message of client.waitProcess(named(process))) last = message;
  if (last === undefined) throw new Error('no exit was told');
  return last;
}
export const remove = (client: AgentClient, id: string, force = false) =>
  unary((done) => client.removeContainer({ id, force, guestEnds: false }, done));
export const removeProcess = (client: AgentClient, name: ProcessName) =>
  unary((done) => client.removeProcess(name, done));
export const signal = (client: AgentClient, process: ProcessId, number: number, all = false) =>
  unary((done) => client.signalProcess({ ...named(process), signal: number, all }, done));
export const list = async (client: AgentClient, id: string) =>
  (await unary<ListProcessesResponse>((done) => client.listProcesses({ id }, done))).processes;
export const describeContainer = (client: AgentClient, id: string) =>
  unary<DescribeContainerResponse>((done) => client.describeContainer({ id }, done));

/** One call of ReadOutput, which acknowledges nothing by itself. */
export class OutputReader {
  readonly call: ClientDuplexStream<ReadOutputRequest, ReadOutputResponse>;
  readonly #messages: AsyncIterator<ReadOutputResponse>;
  /** The offset of what comes next. */
  at: number;

  constructor(client: AgentClient, process: ProcessId, stream: 'stdout' | 'stderr' = 'stdout', from = 0) {
    const which = stream === 'stdout' ? OutputStream.OUTPUT_STREAM_STDOUT : OutputStream.OUTPUT_STREAM_STDERR;
    this.call = client.readOutput();
    this.call.on('error', () => {});
    this.call.write({ ...named(process), stream: which, delivered: BigInt(from) });
    this.#messages = this.call[Symbol.asyncIterator]() as AsyncIterator<ReadOutputResponse>;
    this.at = from;
  }

  /** The next bytes; undefined at the end. */
  async next(): Promise<Buffer | undefined> {
    const { done, value } = await this.#messages.next();
    if (done) return undefined;
    this.at += value.data.length;
    return value.data;
  }

  /** Reads until so many bytes have come. */
  async take(length: number): Promise<Buffer> {
    const parts: Buffer[] = [];
    for (let left = length; left > 0; ) {
      const data = await this.next();
      if (data === undefined) throw new Error(`the stream ended ${left} bytes early`);
      left -= data.length;
      parts.push(data);
    }
    return Buffer.concat(parts);
  }

  acknowledge(offset = this.at): void {
    this.call.write({ id: '', execId: '', stream: 0, delivered: BigInt(offset) });
  }
}

/** Everything that comes on a stream until it ends, acknowledged as it comes. */
export async function read(
  client: AgentClient,
  process: ProcessId,
  stream: 'stdout' | 'stderr' = 'stdout',
  from = 0,
): Promise<Buffer> {
  const reader = new OutputReader(client, process, stream, from);
  const received: Buffer[] = [];
  for (let data = await reader.next(); data !== undefined; data = await reader.next()) {
    received.push(data);
    reader.acknowledge();
  }
  return Buffer.concat(received);
}

/** Writes to stdin and closes it. */
export function write(client: AgentClient, process: ProcessId, ...chunks: (string | Buffer)[]): Promise<void> {
  return new Promise((resolve, reject) => {
    const call = client.writeStdin((error) => (error === null ? resolve() : reject(error)));
    call.write({ ...named(process), data: Buffer.alloc(0) });
    for (const chunk of chunks) call.write({ id: '', execId: '', data: Buffer.from(chunk) });
    call.end();
  });
}
