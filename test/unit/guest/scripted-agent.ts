/** The guest's end of a connection, played by a real gRPC server whose answers a test chooses. */
import { once } from 'node:events';
import { connect, createServer, type Socket } from 'node:net';
import type { Writable } from 'node:stream';
import { type handleUnaryCall, type ServerUnaryCall, type ServerWritableStream, status } from '@grpc/grpc-js';
import {
  type AgentServer,
  AgentService,
  type CreateContainerRequest,
  type CreateContainerResponse,
  type ExecProcessRequest,
  type ExecProcessResponse,
  HelloResponse,
  Protocol,
  type ReadOutputRequest,
  ReadOutputResponse,
  ReadStatsResponse,
  SampleRandomnessResponse,
  type WaitProcessRequest,
  WaitProcessResponse,
  type WriteStdinRequest,
} from '../../../gen/kiln/agent/v1/agent.ts';
import { Guest } from '../../../src/guest/guest.ts';
import type { HelloOptions } from '../../../src/guest/hello.ts';
import type { OutputTarget } from '../../../src/guest/streams.ts';
import type { ProcessRef } from '../../../src/guest/terms.ts';
import { type ServedSocket, serveOverSocket } from '../../../src/rpc/grpc/server-transport.ts';

let pairs = 0;

/** Both ends of a connection, over a Unix socket in the abstract namespace. */
export async function socketPair(): Promise<[Socket, Socket]> {
  const path = `\0kiln-test-${process.pid}-${pairs++}`;
  const listener = createServer().listen(path);
  const ours = connect(path);
  const [theirs] = (await once(listener, 'connection')) as [Socket];
  listener.close();
  return [ours, theirs];
}

/** What the scripted agent's container consists of: its init, and a child of it. */
export const guestProcesses = [
  { pid: 12, execId: '', init: true },
  { pid: 13, execId: '', init: false },
];

/** Handlers in the form of the generated service; what is left out is answered as below. */
export interface Script
  extends Partial<Pick<AgentServer, Exclude<keyof typeof AgentService, 'createContainer' | 'execProcess'>>> {
  /** Tells of the container that was made, and no more. */
  readonly createContainer?: handleUnaryCall<CreateContainerRequest, { readonly pid: number }>;
  /** The same of a process: the call ends then, as an agent of before ends it. */
  readonly execProcess?: handleUnaryCall<ExecProcessRequest, { readonly pid: number }>;
  /** Goes on with the call of a process that is made, instead of ending it. */
  readonly tellOfExec?: (call: ExecCall) => unknown;
  /**
   * Goes on with the call when the container is made. Without it the exit is told; where there is a script for WaitProcess, the
   * call ends, as an agent of before ends it.
   */
  readonly tellOfCreated?: (call: CreateCall) => unknown;
}

/** One call of CreateContainer. */
export type CreateCall = ServerWritableStream<CreateContainerRequest, CreateContainerResponse>;

/** One call of ExecProcess. */
export type ExecCall = ServerWritableStream<ExecProcessRequest, ExecProcessResponse>;

/**
 * An agent that says Hello, creates, starts, removes and lists containers, and whose one container runs until a signal
 * comes; it then exits with 128 + the signal. So does each process that is exec'd; the end of the container's own is the
 * end of all. stdin is read and dropped, outputs end with the exit of their process.
 */
export class ScriptedAgent {
  readonly calls: string[] = [];
  readonly stdin: Buffer[] = [];
  /** By exec id; the container's own has the empty one. */
  readonly #exits = new Map<string, PromiseWithResolvers<number>>();
  readonly #script: Script;
  #pid = 100;
  #served: ServedSocket | undefined;
  #socket: Socket | undefined;

  constructor(script: Script = {}) {
    this.#script = script;
  }

  /** A process ends; with the container's own, all do. */
  exit(status: number, execId = ''): void {
    this.#exitOf(execId).resolve(status);
    if (execId === '') for (const exit of this.#exits.values()) exit.resolve(137);
  }

  exited(execId = ''): Promise<number> {
    return this.#exitOf(execId).promise;
  }

  #exitOf(execId: string): PromiseWithResolvers<number> {
    const known = this.#exits.get(execId);
    if (known !== undefined) return known;
    const exit = Promise.withResolvers<number>();
    this.#exits.set(execId, exit);
    return exit;
  }

  /** The connection breaks, as it does when the VM or the agent dies. */
  disconnect(): void {
    this.#socket?.destroy();
    this.#served?.close();
  }

  serve(socket: Socket): void {
    this.#socket = socket;
    const {
      createContainer: _create,
      tellOfCreated: _tell,
      execProcess: _exec,
      tellOfExec: _of,
      ...script
    } = this.#script;
    const handlers = { ...this.#defaults(), ...script };
    const noted = Object.fromEntries(
      Object.entries(handlers).map(([name, handler]) => [
        name,
        (...args: unknown[]) => {
          // How often the clock is asked depends on how quick the answers are.
          if (name !== 'adjustClock') this.calls.push(name);
          return (handler as (...given: unknown[]) => unknown)(...args);
        },
      ]),
    );
    this.#served = serveOverSocket(AgentService, noted as unknown as AgentServer, socket);
  }

  #defaults(): AgentServer {
    return {
      hello: (_call, done) => done(null, helloResponse()),
      adjustClock: (_call, done) => done(null, { realtimeNs: nowNs() }),
      sampleRandomness: (_call, done) => done(null, SampleRandomnessResponse.fromPartial({})),
      preparePod: (_call, done) => done(null, {}),
      listContainers: (_call, done) => done(null, { ids: [] }),
      findDisks: ({ request }, done) => {
        done(null, { devices: request.disks.map((_disk, index) => ({ major: 254, minor: 16 * index })) });
      },
      createContainer: (call) => {
        const { createContainer = (_call, done) => done(null, { pid: 12 }), waitProcess } = this.#script;
        const tellExit = async () => {
          const process = WaitProcessResponse.fromPartial({ exitStatus: await this.exited() });
          call.write({ pid: 0, process });
          call.end();
        };
        const { tellOfCreated = waitProcess === undefined ? tellExit : () => call.end() } = this.#script;
        answerFirst(call, createContainer, tellOfCreated);
      },
      startContainer: (_call, done) => done(null, {}),
      execProcess: (call) => {
        this.#exits.delete(call.request.execId);
        this.#pid += 1;
        const pid = this.#pid;
        const { execProcess = (_call, done) => done(null, { pid }), tellOfExec = () => call.end() } = this.#script;
        answerFirst(call, execProcess, tellOfExec);
      },
      signalProcess: ({ request }, done) => {
        this.exit(128 + request.signal, request.execId);
        done(null, {});
      },
      waitProcess: (call) => {
        void this.exited(call.request.execId).then((exitStatus) => tellExit(call, { exitStatus }));
      },
      describeContainer: (_call, done) => done(null, { started: true, paused: false, execs: [] }),
      resizeTerminal: (_call, done) => done(null, {}),
      removeProcess: (_call, done) => done(null, {}),
      listProcesses: (_call, done) => done(null, { processes: guestProcesses }),
      readChanges: (call) => call.end(),
      readFiles: (call) => call.end(),
      writeFiles: (call, done) => {
        call.resume();
        call.on('end', () => done(null, {}));
      },
      readProcesses: (_call, done) => done(null, { processes: [] }),
      writeStdin: (call, done) => {
        call.on('data', (message: WriteStdinRequest) => this.stdin.push(message.data));
        call.on('end', () => done(null, {}));
        call.on('error', () => {});
      },
      setNetwork: (_call, done) => done(null, {}),
      serveNameservers: (_call, done) => done(null, {}),
      relayQueries: (call) => call.on('cancelled', () => call.destroy()),
      watchListeners: (call) => {
        call.on('cancelled', () => call.destroy());
        call.write({ ipv4Ports: Buffer.alloc(0), ipv6Ports: Buffer.alloc(0) });
      },
      dial: (call) => call.emit('error', failure('FAILED_PRECONDITION', 'nobody listens')),
      readOutput: (call) => {
        call.once('data', ({ execId }: ReadOutputRequest) => void this.exited(execId).then(() => call.end()));
        call.on('error', () => {});
      },
      removeContainer: (_call, done) => done(null, {}),
      pauseContainer: (_call, done) => done(null, {}),
      resumeContainer: (_call, done) => done(null, {}),
      readStats: (_call, done) => done(null, ReadStatsResponse.fromPartial({})),
      setLimits: (_call, done) => done(null, {}),
    };
  }
}

/** Has a handler that answers once give the first answer of a call, and then goes on with it. */
function answerFirst<Request>(
  call: ServerWritableStream<Request, CreateContainerResponse>,
  handler: handleUnaryCall<Request, { readonly pid: number }>,
  goOn: (call: ServerWritableStream<Request, CreateContainerResponse>) => unknown,
): void {
  handler(call as unknown as ServerUnaryCall<Request, { readonly pid: number }>, (error, made) => {
    if (error) call.emit('error', error);
    else {
      call.write({ pid: made?.pid ?? 0, process: undefined });
      void goOn(call);
    }
  });
}

/** Output as the agent sends it. */
export function outputOf(
  text: string | Buffer,
  fields: { stderr?: boolean; ended?: boolean } = {},
): ReadOutputResponse {
  return ReadOutputResponse.fromPartial({ data: Buffer.from(text), ...fields });
}

/** One output of a process, and where to begin. */
export type OutputRequest = ProcessRef & Pick<OutputTarget, 'stream' | 'from'>;

/** Copies one output to its end. */
export function pipeOutput(
  guest: Pick<Guest, 'pipeOutputs'>,
  { stream, from, ...ref }: OutputRequest,
  sink: Writable,
  onDelivered: (offset: number) => void,
): Promise<void> {
  return guest.pipeOutputs(ref, [{ stream, from, sink, onDelivered }])[0]!.ended;
}

/**
 * A guest whose agent plays the script, connected.
 *
 * @param cleanups gets what ends the connection, also where the guest cannot be connected
 */
export async function connectGuest(
  script: Script,
  cleanups: (() => void)[],
  options: Partial<HelloOptions> = {},
): Promise<{ readonly agent: ScriptedAgent; readonly guest: Guest; readonly socket: Socket }> {
  const [socket, theirs] = await socketPair();
  const agent = new ScriptedAgent(script);
  agent.serve(theirs);
  cleanups.push(() => {
    agent.disconnect();
    socket.destroy();
  });
  const guest = await Guest.connect(socket, { hostname: 'kiln', answerLimitMs: 30_000, session: 's', ...options });
  return { agent, guest, socket };
}

export function helloResponse(fields: Parameters<typeof HelloResponse.fromPartial>[0] = {}): HelloResponse {
  return HelloResponse.fromPartial({
    protocol: Protocol.PROTOCOL_CURRENT,
    kilnVersion: '0.0.0',
    kernelRelease: '6.1.0-guest',
    bootId: 'b007',
    memoryBytes: 512n << 20n,
    vcpus: 2,
    agentStartedNs: 1_000_000_000n,
    answeredNs: 3_500_000_000n,
    realtimeNs: nowNs(),
    ...fields,
  });
}

/** One call of WaitProcess. */
export type WaitCall = ServerWritableStream<WaitProcessRequest, WaitProcessResponse>;

/** Answers WaitProcess with an exit. */
export function tellExit(call: WaitCall, fields: Parameters<typeof WaitProcessResponse.fromPartial>[0]): void {
  call.write(WaitProcessResponse.fromPartial(fields));
  call.end();
}

/** Says in an answer to WaitProcess how many processes were killed for want of memory. */
export function tellKills(call: WaitCall, oomKills: bigint): void {
  call.write(WaitProcessResponse.fromPartial({ oomKills }));
}

function nowNs(): bigint {
  return BigInt(Date.now()) * 1_000_000n;
}

/** Of a script: programs end when their stdin does. */
export function endWithStdin(agent: () => ScriptedAgent): Pick<Script, 'writeStdin' | 'tellOfExec'> {
  return {
    writeStdin: (call, done) => {
      let execId = '';
      call.once('data', (first: WriteStdinRequest) => {
        execId = first.execId;
      });
      call.on('data', () => {});
      call.on('end', () => {
        agent().exit(0, execId);
        done(null, {});
      });
      call.on('error', () => {});
    },
    tellOfExec: (call) => {
      if (call.request.stdinEnded) agent().exit(0, call.request.execId);
      call.end();
    },
  };
}

/** What a handler passes to its callback to fail. */
export function failure(code: keyof typeof status, details: string) {
  return { code: status[code], details };
}
