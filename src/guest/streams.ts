/**
 * A process's bytes between the agent's streams and the host's. The protocol is told in agent.proto: output is
 * acknowledged when it is delivered, so that whoever reads on after a broken connection knows where.
 */
import { once } from 'node:events';
import type { Readable, Writable } from 'node:stream';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { type AgentClient, OutputStream } from '../../gen/kiln/agent/v1/agent.ts';
import { countRelayed } from '../sys/garbage.ts';
import { toKilnError } from './call.ts';
import type { ProcessRef } from './terms.ts';

/** The most bytes of stdin in one message: big enough to amortise a message, small against HTTP/2's window. */
const stdinChunkBytes = 128 * 1024;

/** Messages taken in one turn of the event loop: a guest that sends many small ones must not hold up the others. */
const messagesPerTurn = 64;

export type OutputName = 'stdout' | 'stderr';

export interface OutputRequest extends ProcessRef {
  readonly stream: OutputName;
  /** Where in the stream to begin, in bytes: what an earlier reader has delivered. */
  readonly from: number;
}

/**
 * Copies an output stream to `sink` until its last writer has closed it, or the sink is destroyed. The sink's
 * back-pressure reaches the program.
 *
 * @param onDelivered called with the offset up to which the sink has taken everything
 */
export async function pipeOutput(
  client: AgentClient,
  { id, execId, stream, from }: OutputRequest,
  sink: Writable,
  onDelivered: (offset: number) => void,
): Promise<void> {
  const number = stream === 'stdout' ? OutputStream.OUTPUT_STREAM_STDOUT : OutputStream.OUTPUT_STREAM_STDERR;
  const call = client.readOutput();
  // The loop below reports errors; one that comes after it (the cancellation is one) has nobody else to go to.
  call.on('error', () => {});
  const closed = Promise.withResolvers<void>();
  const cancel = () => {
    call.cancel();
    closed.resolve();
  };
  sink.once('close', cancel);
  let delivered = from;
  let told = from;
  let telling = false;
  // An agent that reads no acknowledgements must not make them pile up here: the next one that goes tells of all.
  const tell = () => {
    if (telling || told === delivered) return;
    told = delivered;
    const unspecified = OutputStream.OUTPUT_STREAM_UNSPECIFIED;
    telling = !call.write({ id: '', execId: '', stream: unspecified, delivered: BigInt(delivered) });
  };
  call.on('drain', () => {
    telling = false;
    tell();
  });
  const acknowledge = (length: number) => {
    delivered += length;
    onDelivered(delivered);
    tell();
  };
  try {
    call.write({ id, execId, stream: number, delivered: BigInt(from) });
    let last: Promise<void> = Promise.resolve();
    let messages = 0;
    for await (const { data } of call) {
      messages += 1;
      if (messages % messagesPerTurn === 0) await nextTurn();
      if (sink.destroyed) return;
      // A sink's buffer counts bytes, so it would take any number of these.
      if (data.length === 0) continue;
      const { promise, resolve } = Promise.withResolvers<void>();
      last = promise;
      const taken = sink.write(data, (error) => {
        if (error === null || error === undefined) acknowledge(data.length);
        resolve();
      });
      if (!taken) await drainedOrClosed(sink);
      countRelayed(data.length);
    }
    // A sink that is destroyed may never say what became of its last chunk.
    await Promise.race([last, closed.promise]);
  } catch (error) {
    if (!sink.destroyed) throw toKilnError(error);
  } finally {
    sink.off('close', cancel);
    cancel();
  }
}

/**
 * Copies `source` to a process's stdin and closes it at the source's end, also when that is destroyed. Destroys the
 * source when nobody takes its bytes any more.
 */
export async function pipeStdin(client: AgentClient, { id, execId }: ProcessRef, source: Readable): Promise<void> {
  const { promise: answered, resolve, reject } = Promise.withResolvers<void>();
  const call = client.writeStdin((error) => (error === null ? resolve() : reject(toKilnError(error))));
  call.on('error', () => {});
  const stop = () => source.destroy();
  answered.then(stop, stop);
  try {
    call.write({ id, execId, data: Buffer.alloc(0) });
    for await (const chunk of source as AsyncIterable<Buffer>) {
      for (let at = 0; at < chunk.length; at += stdinChunkBytes) {
        const data = chunk.subarray(at, at + stdinChunkBytes);
        if (!call.write({ id: '', execId: '', data })) await Promise.race([once(call, 'drain'), answered]);
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
