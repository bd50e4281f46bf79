/** The calls that carry a process's stdin and its outputs. */
import { setImmediate } from 'node:timers/promises';
import type { ServerDuplexStream, ServerReadableStream } from '@grpc/grpc-js';
import {
  OutputStream,
  type ReadOutputRequest,
  type ReadOutputResponse,
  type WriteStdinRequest,
} from '../gen/kiln/agent/v1/agent.ts';
import { FramedMessage, framePrefix } from '../src/rpc/grpc/framed-message.ts';
import type { Containers } from './containers.ts';
import { AgentError } from './errors.ts';
import type { Output, OutputSink } from './output.ts';

/**
 * Protobuf's keys of `data` (field 1, length-delimited) and `stderr` (field 2, a varint), and where the bits of a longer
 * length begin.
 */
const DATA_KEY = (1 << 3) | 2;
const STDERR_KEY = 2 << 3;
const VARINT_BITS = 7;

/**
 * A ReadOutputResponse in protobuf's wire format and gRPC's frame, made in place: the generated encoding and gRPC copy
 * each byte three times, and leave the memory for the garbage collector, which counts in a small guest.
 *
 * @param data behind `frameRoom` bytes that are overwritten
 * @param stderr of stderr, in a call for both outputs
 */
export function frameOutput(data: Buffer, stderr = false): FramedMessage {
  let lengthBytes = 1;
  for (let rest = data.length >>> VARINT_BITS; rest > 0; rest >>>= VARINT_BITS) lengthBytes += 1;
  const head = framePrefix + (stderr ? 2 : 0) + 1 + lengthBytes;
  const frame = Buffer.from(data.buffer, data.byteOffset - head, head + data.length);
  let at = framePrefix;
  if (stderr) at = frame.writeUInt8(1, frame.writeUInt8(STDERR_KEY, at));
  at = frame.writeUInt8(DATA_KEY, at);
  let rest = data.length;
  for (; rest > 0x7f; rest >>>= VARINT_BITS) at = frame.writeUInt8((rest & 0x7f) | 0x80, at);
  frame.writeUInt8(rest, at);
  return new FramedMessage(frame);
}

/** What ends of a process's outputs within so many ms ends together: mostly by the end of the process. */
const togetherMs = 10;

type OutputCall = ServerDuplexStream<ReadOutputRequest, ReadOutputResponse | FramedMessage>;

interface OutputRelay {
  readonly output: Output;
  readonly sink: OutputSink;
  /** What a request says of this stream. */
  readonly offsetIn: (request: ReadOutputRequest) => bigint;
}

const ofFirst = ({ delivered }: ReadOutputRequest): bigint => delivered;
const ofStderr = ({ stderrDelivered }: ReadOutputRequest): bigint => stderrDelivered ?? 0n;

/** ReadOutput. The first request says what to read from where, the others what is delivered. */
export function relayOutput(containers: Containers, call: OutputCall, fail: (error: unknown) => void): void {
  let relays: readonly OutputRelay[] | undefined;
  call.on('data', (request: ReadOutputRequest) => {
    try {
      const begins = relays === undefined;
      relays ??= relaysOf(containers, call, request);
      for (const { output, sink, offsetIn } of relays) {
        const offset = Number(offsetIn(request));
        if (begins) output.relayTo(sink, offset);
        else output.acknowledge(offset);
      }
    } catch (error) {
      fail(error);
    }
  });
  call.on('close', () => {
    for (const { output, sink } of relays ?? []) output.detach(sink);
  });
  call.on('error', () => {});
}

function relaysOf(containers: Containers, call: OutputCall, request: ReadOutputRequest): readonly OutputRelay[] {
  const output = outputOf(containers, request);
  if (request.stderrDelivered === undefined) {
    const sink: OutputSink = { write: (data) => call.write(frameOutput(data)), end: () => call.end() };
    return [{ output, sink, offsetIn: ofFirst }];
  }
  let open = 2;
  const sinkOf = (stderr: boolean): OutputSink => ({
    write: (data) => call.write(frameOutput(data, stderr)),
    end: () => {
      open -= 1;
      if (open === 0) call.end();
      // The call's end says it of both.
      else setTimeout(() => open > 0 && call.write({ data: Buffer.alloc(0), stderr, ended: true }), togetherMs);
    },
  });
  const stderr = outputOf(containers, { ...request, stream: OutputStream.OUTPUT_STREAM_STDERR });
  return [
    { output, sink: sinkOf(false), offsetIn: ofFirst },
    { output: stderr, sink: sinkOf(true), offsetIn: ofStderr },
  ];
}

function outputOf(containers: Containers, { id, execId, stream }: ReadOutputRequest): Output {
  const { stdio } = containers.get(id).process(execId);
  if (stream === OutputStream.OUTPUT_STREAM_UNSPECIFIED) {
    throw new AgentError('invalid-argument', 'which stream to read is not given');
  }
  const output = stream === OutputStream.OUTPUT_STREAM_STDERR ? stdio.stderr : stdio.stdout;
  if (output === undefined) throw noStream(id, execId, 'output');
  return output;
}

/** WriteStdin; resolves when the call has ended in order, or nobody reads. */
export async function writeStdin(
  containers: Containers,
  call: ServerReadableStream<WriteStdinRequest, object>,
): Promise<void> {
  // Only a call that ends in order closes stdin: one that breaks throws below.
  call.on('cancelled', () => call.destroy());
  const messages = call[Symbol.asyncIterator]() as AsyncIterableIterator<WriteStdinRequest>;
  const first = await messages.next();
  if (first.done) throw new AgentError('invalid-argument', 'the first message must name the process');
  const { id, execId } = first.value;
  const { stdin } = containers.get(id).process(execId).stdio;
  if (stdin === undefined) throw noStream(id, execId, 'stdin');
  const data = async function* () {
    yield first.value.data;
    for await (const message of messages) yield message.data;
    // One that was reset, or whose connection broke, ends as well, and in the same turn says that it was cancelled.
    await setImmediate();
    if (call.cancelled) throw new AgentError('failed-precondition', 'the call was cancelled');
  };
  await stdin.writeAll(data());
}

function noStream(id: string, execId: string, name: string): AgentError {
  const process = execId === '' ? `container "${id}"` : `process "${execId}" of container "${id}"`;
  return new AgentError('failed-precondition', `${process} was created without this ${name}`);
}
