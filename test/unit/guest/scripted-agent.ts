/** The guest's end of a connection, played by a real gRPC server whose answers a test chooses. */
import { once } from 'node:events';
import { connect, createServer, type Socket } from 'node:net';
import { status } from '@grpc/grpc-js';
import {
  type AgentServer,
  AgentService,
  HelloResponse,
  Protocol,
  ReadStatsResponse,
  type WriteStdinRequest,
} from '../../../gen/kiln/agent/v1/agent.ts';
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

/** Handlers in the form of the generated service; what is left out is answered as below. */
export type Script = Partial<AgentServer>;

/**
 * An agent that says Hello, creates, starts, removes and lists containers, and whose one container runs until a signal
 * comes; it then exits with 128 + the signal. stdin is read and dropped, both outputs end with the exit.
 */
export class ScriptedAgent {
  readonly calls: string[] = [];
  readonly stdin: Buffer[] = [];
  readonly #exit = Promise.withResolvers<number>();
  readonly #script: Script;
  #served: ServedSocket | undefined;
  #socket: Socket | undefined;

  constructor(script: Script = {}) {
    this.#script = script;
  }

  /** The program ends. */
  exit(status: number): void {
    this.#exit.resolve(status);
  }

  get exited(): Promise<number> {
    return this.#exit.promise;
  }

  /** The connection breaks, as it does when the VM or the agent dies. */
  disconnect(): void {
    this.#socket?.destroy();
    this.#served?.close();
  }

  serve(socket: Socket): void {
    this.#socket = socket;
    const handlers = { ...this.#defaults(), ...this.#script };
    const noted = Object.fromEntries(
      Object.entries(handlers).map(([name, handler]) => [
        name,
        (...args: unknown[]) => {
          this.calls.push(name);
          return (handler as (...given: unknown[]) => unknown)(...args);
        },
      ]),
    );
    this.#served = serveOverSocket(AgentService, noted as unknown as AgentServer, socket);
  }

  #defaults(): AgentServer {
    return {
      hello: (_call, done) => done(null, helloResponse()),
      createContainer: (_call, done) => done(null, { pid: 12 }),
      startContainer: (_call, done) => done(null, {}),
      signalContainer: (call, done) => {
        this.exit(128 + call.request.signal);
        done(null, {});
      },
      waitContainer: (_call, done) => {
        void this.exited.then((exitStatus) => done(null, { exitStatus, exitedAtNs: 0n }));
      },
      listProcesses: (_call, done) => done(null, { pids: [12, 13], initPid: 12 }),
      writeStdin: (call, done) => {
        call.on('data', (message: WriteStdinRequest) => this.stdin.push(message.data));
        call.on('end', () => done(null, {}));
        call.on('error', () => {});
      },
      readOutput: (call) => void this.exited.then(() => call.end()),
      removeContainer: (_call, done) => done(null, {}),
      pauseContainer: (_call, done) => done(null, {}),
      resumeContainer: (_call, done) => done(null, {}),
      readStats: (_call, done) => done(null, ReadStatsResponse.fromPartial({})),
      setLimits: (_call, done) => done(null, {}),
      watchOom: (call) => void this.exited.then(() => call.end()),
    };
  }
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
    ...fields,
  });
}

/** What a handler passes to its callback to fail. */
export function failure(code: keyof typeof status, details: string) {
  return { code: status[code], details };
}
