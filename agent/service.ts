/**
 * The method table: gRPC in, verbs out. Generated types end here.
 */
import type { handleUnaryCall, ServerReadableStream } from '@grpc/grpc-js';
import {
  type AgentServer,
  AgentService,
  OutputStream,
  type ReadOutputResponse,
  type WriteStdinRequest,
} from '../gen/kiln/agent/v1/agent.ts';
import type { Containers } from './containers.ts';
import { AgentError, grpcStatusOf } from './errors.ts';
import { hello } from './hello.ts';
import { chunkSize } from './stdio.ts';

/**
 * The service's definition, with its own encoding of output: the generated one copies every chunk twice and leaves both
 * for the garbage collector, and what is waiting for that counts in a small guest. gRPC copies the encoded message into
 * its frame before anything else is encoded, so one piece of memory serves all.
 */
export const agentService = {
  ...AgentService,
  readOutput: { ...AgentService.readOutput, responseSerialize: encodeOutput },
};

/** Protobuf's key of field 1, length-delimited, and the longest length that follows it. */
const DATA_KEY = (1 << 3) | 2;
const LONGEST_VARINT = 5;

const encoded = Buffer.allocUnsafeSlow(1 + LONGEST_VARINT + chunkSize);

/** ReadOutputResponse in protobuf's wire format. The result is valid until the next call. */
export function encodeOutput({ data }: ReadOutputResponse): Buffer {
  let at = encoded.writeUInt8(DATA_KEY, 0);
  let rest = data.length;
  for (; rest > 0x7f; rest >>>= 7) at = encoded.writeUInt8((rest & 0x7f) | 0x80, at);
  at = encoded.writeUInt8(rest, at);
  return encoded.subarray(0, at + data.copy(encoded, at));
}

export interface ServiceOptions {
  readonly containers: Containers;
  /** See `hello`. */
  readonly ownsGuest: boolean;
  /** Called when a host has said Hello and was understood. */
  readonly onHello?: () => void;
}

/** The service for one connection. Until Hello has succeeded on it, every other call is FAILED_PRECONDITION. */
export function createService({ containers, ownsGuest, onHello }: ServiceOptions): AgentServer {
  let greeted = false;
  const greetedFirst = () => {
    if (!greeted) throw new AgentError('failed-precondition', 'the first call on a connection must be Hello');
  };
  const unary =
    <Request, Response>(
      handler: (request: Request) => Response | Promise<Response>,
    ): handleUnaryCall<Request, Response> =>
    async (call, done) => {
      let response: Response;
      try {
        greetedFirst();
        response = await handler(call.request);
      } catch (error) {
        done(grpcStatusOf(error));
        return;
      }
      done(null, response);
    };

  return {
    hello: (call, done) => {
      try {
        const response = hello(call.request, ownsGuest);
        greeted = true;
        onHello?.();
        done(null, response);
      } catch (error) {
        done(grpcStatusOf(error));
      }
    },
    createContainer: unary(async (request) => ({ pid: await containers.create(request) })),
    startContainer: unary(async ({ id }) => {
      await containers.start(id);
      return {};
    }),
    signalContainer: unary(({ id, signal, all }) => {
      containers.signal(id, signal, all);
      return {};
    }),
    waitContainer: unary(async ({ id }) => {
      const exit = await containers.wait(id);
      return { exitStatus: exit.status, exitedAtNs: exit.atNs };
    }),
    listProcesses: unary(({ id }) => containers.processes(id)),
    removeContainer: unary(async ({ id, force, guestEnds }) => {
      await containers.remove(id, force, guestEnds);
      return {};
    }),
    pauseContainer: unary(async ({ id }) => {
      await containers.controls(id, 'pause', 'running').pause();
      return {};
    }),
    resumeContainer: unary(({ id }) => {
      containers.controls(id, 'resume', 'running').resume();
      return {};
    }),
    readStats: unary(({ id }) =>
      containers.controls(id, 'read the statistics of', 'created', 'running', 'stopped').stats(),
    ),
    setLimits: unary(async ({ id, files }) => {
      await containers.controls(id, 'change the limits of', 'created', 'running').setLimits(files);
      return {};
    }),
    watchOom: (call) => {
      try {
        greetedFirst();
        containers.controls(call.request.id, 'watch', 'created', 'running', 'stopped').watchOom(call);
      } catch (error) {
        call.emit('error', grpcStatusOf(error));
      }
    },
    readOutput: (call) => {
      try {
        greetedFirst();
        const { id, stream } = call.request;
        const stdio = containers.stdio(id);
        const output = stream === OutputStream.OUTPUT_STREAM_STDERR ? stdio.stderr : stdio.stdout;
        if (stream === OutputStream.OUTPUT_STREAM_UNSPECIFIED) {
          throw new AgentError('invalid-argument', 'which stream to read is not given');
        }
        if (output === undefined) throw noStream(id, 'output');
        output.relayTo(call);
      } catch (error) {
        call.emit('error', grpcStatusOf(error));
      }
    },
    writeStdin: async (call, done) => {
      try {
        greetedFirst();
        await writeStdin(containers, call);
        done(null, {});
      } catch (error) {
        done(grpcStatusOf(error));
      }
    },
  };
}

async function writeStdin(
  containers: Containers,
  call: ServerReadableStream<WriteStdinRequest, object>,
): Promise<void> {
  const messages = call[Symbol.asyncIterator]() as AsyncIterableIterator<WriteStdinRequest>;
  const first = await messages.next();
  if (first.done) throw new AgentError('invalid-argument', 'the first message must name the container');
  const { id } = first.value;
  const { stdin } = containers.stdio(id);
  if (stdin === undefined) throw noStream(id, 'stdin');
  const data = async function* () {
    yield first.value.data;
    for await (const message of messages) yield message.data;
  };
  await stdin.writeAll(data());
}

function noStream(id: string, name: string): AgentError {
  return new AgentError('failed-precondition', `container "${id}" was created without this ${name}`);
}
