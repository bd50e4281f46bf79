import { EventEmitter } from 'node:events';
import type net from 'node:net';
import { createInterface } from 'node:readline';
import { KilnError } from '../../errors.ts';

/*
 * QMP, QEMU's machine protocol (docs/interop/qmp-spec.rst): one JSON object a line, both ways.
 *   QEMU greets:      {"QMP": {"version": …, "capabilities": […]}}
 *   we must answer:   {"execute": "qmp_capabilities"}        before any other command is taken
 *   command:          {"execute": "blockdev-add", "arguments": {…}, "id": 7}
 *   answer:           {"return": {…}, "id": 7}  or  {"error": {"class": "GenericError", "desc": "…"}, "id": 7}
 *   event, any time:  {"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-panic"}, "timestamp": …}
 * QEMU is the one that dials: kilnd listens, so that the connection itself says that QEMU is ready, and a kilnd that
 * was started again is found again.
 */

interface QmpReply {
  readonly id?: number;
  readonly return?: unknown;
  readonly error?: { readonly class: string; readonly desc: string };
  readonly event?: string;
  readonly data?: Record<string, unknown>;
  readonly QMP?: unknown;
}

interface QmpEvents {
  event: [name: string, data: Record<string, unknown>];
  close: [];
}

/** One QMP conversation. Every command fails with `unavailable` once QEMU has closed it. */
export class QmpClient extends EventEmitter<QmpEvents> {
  #socket: net.Socket;
  #pending = new Map<number, { resolve(value: unknown): void; reject(error: Error): void; command: string }>();
  #nextId = 1;
  #greeted = Promise.withResolvers<void>();
  #closed = false;

  constructor(socket: net.Socket) {
    super();
    this.#socket = socket;
    this.#greeted.promise.catch(() => {});
    const lines = createInterface({ input: socket, crlfDelay: Number.POSITIVE_INFINITY });
    lines.on('line', (line) => this.#onLine(line));
    // readline repeats the socket's error on itself; it is handled below.
    lines.on('error', () => {});
    socket.on('error', () => socket.destroy());
    socket.on('close', () => this.#onClose());
  }

  /** Waits for the greeting and leaves negotiation mode. */
  async negotiate(): Promise<void> {
    await this.#greeted.promise;
    await this.execute('qmp_capabilities');
  }

  /** Runs one command; throws `internal` with QEMU's description when QEMU refuses it. */
  execute(command: string, args: Record<string, unknown> = {}): Promise<unknown> {
    if (this.#closed) return Promise.reject(this.#gone(command));
    const id = this.#nextId++;
    const { promise, resolve, reject } = Promise.withResolvers<unknown>();
    this.#pending.set(id, { resolve, reject, command });
    this.#socket.write(`${JSON.stringify({ execute: command, arguments: args, id })}\n`);
    return promise;
  }

  close(): void {
    this.#socket.destroy();
  }

  #onLine(line: string): void {
    let reply: QmpReply;
    try {
      reply = JSON.parse(line) as QmpReply;
    } catch {
      this.#socket.destroy(new Error(`QMP sent a line that is not JSON: ${line.slice(0, 200)}`));
      return;
    }
    if (reply.QMP !== undefined) this.#greeted.resolve();
    else if (reply.event !== undefined) this.emit('event', reply.event, reply.data ?? {});
    else if (reply.id !== undefined) this.#settle(reply.id, reply);
  }

  #settle(id: number, reply: QmpReply): void {
    const pending = this.#pending.get(id);
    if (pending === undefined) return;
    this.#pending.delete(id);
    if (reply.error === undefined) pending.resolve(reply.return);
    else pending.reject(new KilnError('internal', `QEMU refused ${pending.command}: ${reply.error.desc}`));
  }

  #onClose(): void {
    this.#closed = true;
    this.#greeted.reject(this.#gone('the greeting'));
    for (const pending of this.#pending.values()) pending.reject(this.#gone(pending.command));
    this.#pending.clear();
    this.emit('close');
  }

  #gone(command: string): KilnError {
    return new KilnError('unavailable', `QEMU closed its control connection (at ${command})`);
  }
}
