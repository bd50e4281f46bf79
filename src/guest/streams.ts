/**
 * A process's bytes between the agent's streams and the host's. The protocol is told in agent.proto: output is
 * acknowledged when it is delivered, so that whoever reads on after a broken connection knows where.
 */
import { once } from 'node:events';
import type { Readable, Writable } from 'node:stream';
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { ClientDuplexStream } from '@grpc/grpc-js';
import {
  type AgentClient,
  OutputStream,
  type ReadOutputRequest,
  type ReadOutputResponse,
} from '../../gen/kiln/agent/v1/agent.ts';
import { countRelayed } from '../sys/garbage.ts';
import { toKilnError } from './call.ts';
import type { ProcessRef } from './terms.ts';

/** The most bytes of stdin in one message: big enough to amortise a message, small against HTTP/2's window. */
const stdinChunkBytes = 128 * 1024;

/** Messages taken in one turn of the event loop: a guest that sends many small ones must not hold up the others. */
const messagesPerTurn = 64;

/**
 * How much of a stream may be on its way to its sink before nothing more is read of the call: more than an agent sends that
 * waits for acknowledgements as it should (ReadOutputResponse in agent.proto).
 */
const maxWaitingMessages = 16;
const maxWaitingBytes = 1 << 20;

export type OutputName = 'stdout' | 'stderr';

/** An output stream of a process, and where it goes. */
export interface OutputTarget {
  readonly stream: OutputName;
  /** Where in the stream to begin, in bytes: what an earlier reader has delivered. */
  readonly from: number;
  /** Its back-pressure reaches the program. */
  readonly sink: Writable;
  /** Called with the offset up to which the sink has taken everything. */
  readonly onDelivered: (offset: number) => void;
}

/** Its end rejects when the call fails. */
export type PipedOutput<Target> = Target & { readonly ended: Promise<void> };

/** A stream that is read. */
class Relay<Target extends OutputTarget> {
  readonly target: Target;
  readonly #onTaken: () => void;
  readonly #over = Promise.withResolvers<void>();
  /** Resolves when the sink has taken, or dropped, all that it was given. */
  #last: Promise<void> = Promise.resolve();
  #waitingMessages = 0;
  #waitingBytes = 0;
  #ended = false;
  #finished = false;
  #delivered: number;

  /** @param onTaken called when the sink has taken something, and when it was closed */
  constructor(target: Target, onTaken: () => void) {
    this.target = target;
    this.#onTaken = onTaken;
    this.#delivered = target.from;
    const { sink } = target;
    const onClose = () => {
      this.#over.resolve();
      onTaken();
    };
    sink.once('close', onClose);
    const off = () => sink.off('close', onClose);
    this.over.then(off, off);
  }

  get delivered(): number {
    return this.#delivered;
  }

  /** Settled when everything was delivered, when the sink was closed, or when the call has failed. */
  get over(): Promise<void> {
    return this.#over.promise;
  }

  /** Nothing more will be acknowledged. */
  get finished(): boolean {
    return this.#finished || this.target.sink.destroyed;
  }

  /** What one whose sink is closed is given is dropped. Resolves when more may come. */
  async take(data: Buffer): Promise<void> {
    if (this.finished || this.#ended || data.length === 0) return;
    const { sink, onDelivered } = this.target;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#last = promise;
    this.#waitingMessages += 1;
    this.#waitingBytes += data.length;
    sink.write(data, (error) => {
      this.#waitingMessages -= 1;
      this.#waitingBytes -= data.length;
      if (error === null || error === undefined) {
        this.#delivered += data.length;
        onDelivered(this.#delivered);
        this.#onTaken();
      }
      resolve();
    });
    countRelayed(data.length);
    if (this.#waitingMessages < maxWaitingMessages && this.#waitingBytes < maxWaitingBytes) return;
    await this.#settled();
  }

  /** Nothing more will come. */
  end(): void {
    this.#ended = true;
    void this.#settled().then(
      () => {
        this.#finished = true;
        this.#over.resolve();
      },
      () => {},
    );
  }

  fail(error: unknown): void {
    if (this.finished) this.#over.resolve();
    else this.#over.reject(error);
  }

  /** A sink that is destroyed may never say what became of its last chunk. */
  #settled(): Promise<unknown> {
    return Promise.race([this.#last, this.over]);
  }
}

/**
 * Copies output streams of a process to their sinks in one call, each until its last writer has closed it, or its sink is
 * destroyed.
 *
 * @param targets stdout, stderr, or both in this order; both need an agent that has the feature "outputs"
 * @returns each of them with a promise of its end
 */
export function pipeOutputs<Target extends OutputTarget>(
  client: AgentClient,
  { id, execId }: ProcessRef,
  targets: readonly Target[],
): PipedOutput<Target>[] {
  if (targets.length === 0) return [];
  const call = client.readOutput();
  // The loop in `readOutputs` reports errors; one that comes after it (the cancellation is one) has nobody else to go to.
  call.on('error', () => {});
  const sum = () => relays.reduce((bytes, { delivered }) => bytes + delivered, 0);
  const offsets = () => {
    const [delivered = 0n, stderrDelivered] = relays.map((relay) => BigInt(relay.delivered));
    return { delivered, stderrDelivered };
  };
  let told: number;
  let telling = false;
  // An agent that reads no acknowledgements must not make them pile up here: the next one that goes tells of all.
  const tell = () => {
    if (relays.every(({ finished }) => finished)) {
      call.cancel();
      return;
    }
    if (telling || told === sum()) return;
    told = sum();
    telling = !call.write({ id: '', execId: '', stream: OutputStream.OUTPUT_STREAM_UNSPECIFIED, ...offsets() });
  };
  call.on('drain', () => {
    telling = false;
    tell();
  });
  const relays = targets.map((target) => new Relay(target, tell));
  told = sum();
  const isStderr = targets[0]?.stream === 'stderr';
  const stream = isStderr ? OutputStream.OUTPUT_STREAM_STDERR : OutputStream.OUTPUT_STREAM_STDOUT;
  call.write({ id, execId, stream, ...offsets() });
  void readOutputs(call, relays);
  return relays.map(({ target, over }) => ({ ...target, ended: over }));
}

/** Never rejects. */
async function readOutputs(
  call: ClientDuplexStream<ReadOutputRequest, ReadOutputResponse>,
  relays: readonly Relay<OutputTarget>[],
): Promise<void> {
  try {
    let messages = 0;
    for await (const { data, stderr, ended } of call as AsyncIterable<ReadOutputResponse>) {
      messages += 1;
      if (messages % messagesPerTurn === 0) await nextTurn();
      const relay = relays[stderr ? 1 : 0];
      if (ended) relay?.end();
      else await relay?.take(data);
    }
    for (const relay of relays) relay.end();
  } catch (error) {
    for (const relay of relays) relay.fail(toKilnError(error));
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
