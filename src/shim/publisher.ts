/**
 * Events to one containerd, each at least once: when a connection breaks before the answer, the event is sent again.
 *
 * containerd listens for its shims' events on the ttrpc socket that it names in TTRPC_ADDRESS. One call sends one event:
 *
 *     service containerd.services.events.ttrpc.v1.Events, method Forward
 *     ForwardRequest { Envelope { timestamp, namespace, topic, Any event } } -> Empty
 *     metadata: containerd-namespace-ttrpc = namespace
 *
 * The order is part of the contract (an exit never before its start), so there is one queue and one call at a time.
 * While containerd is away, which may be long (an upgrade), events wait: subscribers learn of an exit however late. An
 * event that containerd answers with an error is logged and left behind, because it would be refused again.
 */
import { connect as connectSocket } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import { ForwardRequest } from '../../gen/containerd/events_service.ts';
import { statusCode, TtrpcClient, TtrpcError } from '../rpc/ttrpc/index.ts';
import { encodeEvent, type TaskEvent } from './topics.ts';

/** What the publisher needs of a connection: a TtrpcClient has it. */
export interface EventConnection {
  call(
    service: string,
    method: string,
    payload: Uint8Array,
    options: { readonly timeoutMs: number; readonly metadata: ReadonlyMap<string, string> },
  ): Promise<Uint8Array>;
  /** Resolves when the connection is gone. */
  readonly closed: Promise<void>;
  close(): void;
}

export interface PublisherLog {
  warn(fields: object, message: string): void;
  error(fields: object, message: string): void;
}

export interface PublisherOptions {
  /** TTRPC_ADDRESS: the path of containerd's ttrpc socket, with or without unix://. */
  readonly address: string;
  readonly log: PublisherLog;
  /** Opens a connection; may fail later, by its calls failing. */
  readonly connect?: (path: string) => EventConnection;
  /** Time for one event, in ms. Default 5000, as in Go's shim library. */
  readonly sendTimeoutMs?: number;
  /** First and longest pause between attempts while containerd is away, in ms. */
  readonly retryMs?: { readonly first: number; readonly longest: number };
  /** Events that may wait. One more is dropped: the oldest are what subscribers must see first. */
  readonly capacity?: number;
}

interface QueuedEvent {
  readonly namespace: string;
  readonly topic: string;
  /** An encoded ForwardRequest. */
  readonly payload: Uint8Array;
  readonly onSent: () => void;
  timeouts: number;
}

const service = 'containerd.services.events.ttrpc.v1.Events';
const namespaceKey = 'containerd-namespace-ttrpc';

/** A containerd that lets one event time out this often is not away, it has a problem with this event. */
const maxTimeouts = 5;

export class EventPublisher {
  readonly #address: string;
  readonly #path: string;
  readonly #log: PublisherLog;
  readonly #connect: (path: string) => EventConnection;
  readonly #sendTimeoutMs: number;
  readonly #retryMs: { readonly first: number; readonly longest: number };
  readonly #capacity: number;
  readonly #queue: QueuedEvent[] = [];
  readonly #closing = new AbortController();
  #connection: EventConnection | undefined;
  #sending: Promise<void> | undefined;
  #dropped = 0;
  /** The last attempt found nobody; told once, not with every attempt. */
  #away = false;

  constructor(options: PublisherOptions) {
    this.#address = options.address;
    this.#path = options.address.replace(/^unix:\/\//, '');
    this.#log = options.log;
    this.#connect = options.connect ?? ((path) => new TtrpcClient(connectSocket(path)));
    this.#sendTimeoutMs = options.sendTimeoutMs ?? 5000;
    this.#retryMs = options.retryMs ?? { first: 100, longest: 5000 };
    this.#capacity = options.capacity ?? 10_000;
  }

  /** Events that wait, the one being sent included. */
  get pending(): number {
    return this.#queue.length;
  }

  /**
   * Queues an event, stamped with the time of now. Never waits, never throws. Dropped after `close`.
   *
   * @param onSent called when containerd has taken the event, or has refused it for good
   */
  publish(namespace: string, event: TaskEvent, onSent: () => void = () => {}): void {
    const { topic, typeUrl, value } = encodeEvent(event);
    if (this.#closing.signal.aborted || this.#queue.length >= this.#capacity) {
      this.#dropped += 1;
      // The first tells when it began, and `#reportDropped` how many they were.
      if (this.#dropped === 1) this.#log.error(this.#where(namespace, topic), 'event dropped: queue is full or closed');
      return;
    }
    const payload = ForwardRequest.encode({
      envelope: { timestamp: timestampOf(Date.now()), namespace, topic, event: { typeUrl, value: Buffer.from(value) } },
    }).finish();
    this.#queue.push({ namespace, topic, payload, onSent, timeouts: 0 });
    this.#sending ??= this.#sendAll();
  }

  /** Resolves to true when nothing waits any more, to false when something still does after `timeoutMs`. */
  async flush(timeoutMs: number): Promise<boolean> {
    const timer = new AbortController();
    try {
      await Promise.race([this.#sending, delay(timeoutMs, undefined, { signal: timer.signal })]);
    } finally {
      timer.abort();
    }
    return this.#queue.length === 0;
  }

  /** Stops at once; what waits is lost, and logged. For a clean end, `flush` first. */
  async close(): Promise<void> {
    this.#closing.abort();
    this.#disconnect();
    await this.#sending;
    if (this.#queue.length > 0)
      this.#log.error({ ...this.#where(), lost: this.#queue.length }, 'events lost at the end');
    this.#queue.length = 0;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  async #sendAll(): Promise<void> {
    const { signal } = this.#closing;
    let pauseMs = this.#retryMs.first;
    for (let event = this.#queue[0]; event !== undefined && !signal.aborted; event = this.#queue[0]) {
      const result = await this.#send(event);
      if (signal.aborted) break;
      if (result === 'done') {
        this.#queue.shift();
        event.onSent();
        this.#reportDropped();
        pauseMs = this.#retryMs.first;
      } else {
        // Rejects only because of close.
        await delay(pauseMs, undefined, { signal }).catch(() => {});
        pauseMs = Math.min(pauseMs * 2, this.#retryMs.longest);
      }
    }
    // In the same turn as the last look at the queue, or an event could be queued that nobody sends.
    this.#sending = undefined;
  }

  async #send(event: QueuedEvent): Promise<'done' | 'again'> {
    const { namespace, topic, payload } = event;
    try {
      this.#connection ??= this.#open();
      const metadata = new Map([[namespaceKey, namespace]]);
      await this.#connection.call(service, 'Forward', payload, { timeoutMs: this.#sendTimeoutMs, metadata });
      this.#away = false;
      return 'done';
    } catch (error) {
      if (this.#closing.signal.aborted) return 'again';
      const where = { ...this.#where(namespace, topic), err: error };
      if (isRefusal(error)) {
        this.#log.error(where, 'event dropped: containerd refused it');
        return 'done';
      }
      // A connection on which a call has timed out may be a dead one.
      this.#disconnect();
      if (error instanceof TtrpcError && error.code === statusCode.DeadlineExceeded) event.timeouts += 1;
      if (event.timeouts >= maxTimeouts) {
        this.#log.error(where, `event dropped: containerd did not take it in ${maxTimeouts} attempts`);
        return 'done';
      }
      if (!this.#away) this.#log.warn(where, 'containerd does not take events: they wait until it does');
      this.#away = true;
      return 'again';
    }
  }

  #open(): EventConnection {
    const connection = this.#connect(this.#path);
    connection.closed.then(() => {
      if (this.#connection === connection) this.#connection = undefined;
    });
    return connection;
  }

  #disconnect(): void {
    this.#connection?.close();
    this.#connection = undefined;
  }

  #reportDropped(): void {
    if (this.#dropped === 0) return;
    this.#log.error({ ...this.#where(), dropped: this.#dropped }, 'events dropped: the queue was full');
    this.#dropped = 0;
  }

  #where(namespace?: string, topic?: string): object {
    return { address: this.#address, ...(namespace === undefined ? {} : { namespace, topic }) };
  }
}

/** An answer of containerd's about the event, as opposed to no answer. */
function isRefusal(error: unknown): boolean {
  if (!(error instanceof TtrpcError)) return false;
  return error.code !== statusCode.Unavailable && error.code !== statusCode.DeadlineExceeded;
}

function timestampOf(ms: number): { seconds: bigint; nanos: number } {
  return { seconds: BigInt(Math.floor(ms / 1000)), nanos: (ms % 1000) * 1_000_000 };
}
