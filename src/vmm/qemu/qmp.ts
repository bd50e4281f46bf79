import { EventEmitter } from 'node:events';
import type net from 'node:net';
import { KilnError } from '../../errors.ts';
import { printable } from '../../host/printable.ts';
import { writeTogether } from '../../host/write-together.ts';

/*
 * QMP, QEMU's machine protocol (docs/interop/qmp-spec.rst): one JSON object a line, both ways.
 *   QEMU greets:      {"QMP": {"version": …, "capabilities": […]}}
 *   first command:    {"execute": "qmp_capabilities"}        before any other is taken; it need not wait for the greeting
 *   command:          {"execute": "blockdev-add", "arguments": {…}, "id": 7}
 *   answer:           {"return": {…}, "id": 7}  or  {"error": {"class": "GenericError", "desc": "…"}, "id": 7}
 *   event, any time:  {"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-panic"}, "timestamp": …}
 * Events from before the negotiation are never sent: what happened until then has to be asked for (query-status).
 * QEMU gets the socket that it serves from kilnd, already listening, so that kilnd can dial at once and say all that it
 * knows to say: the answers come when QEMU is ready. A later kilnd dials the same socket.
 *
 * A guest that has broken into its QEMU can send anything here, so nothing that comes is trusted to have its right form:
 * whatever is not QMP closes the connection.
 */

/** The longest line taken. The longest one that QEMU sends is the console, 64 KiB of which each byte may be escaped. */
const maxLineBytes = 1 << 20;

/** Characters of QEMU's words that go into an error message. */
const maxShownChars = 500;

const newline = 0x0a;

interface QmpEvents {
  event: [name: string, data: Record<string, unknown>];
  close: [];
}

interface Pending {
  readonly command: string;
  resolve(value: unknown): void;
  reject(error: Error): void;
}

/** One QMP conversation. Every command fails with `unavailable` once the connection is closed, by whomever. */
export class QmpClient extends EventEmitter<QmpEvents> {
  readonly #socket: net.Socket;
  readonly #pending = new Map<number, Pending>();
  #line: Buffer[] = [];
  #lineBytes = 0;
  #nextId = 1;
  #closed = false;
  /** Why we closed the connection; undefined as long as only QEMU could have. */
  #reason: string | undefined;

  /** @param unheard leaves what QEMU says in the socket, its hanging up as well, until `hear` */
  constructor(socket: net.Socket, { unheard = false } = {}) {
    super();
    this.#socket = socket;
    // Before anybody listens: Node goes on to read what was not paused at once.
    if (unheard) socket.pause();
    socket.on('data', (chunk: Buffer) => this.#onData(chunk));
    socket.on('error', () => socket.destroy());
    socket.on('close', () => this.#onClose());
    if (socket.closed) this.#onClose();
  }

  /** Leaves negotiation mode. To be called first; the next commands need not wait for it. */
  async negotiate(): Promise<void> {
    await this.execute('qmp_capabilities');
  }

  /** Hears what was said to an `unheard` one, and all that comes. */
  hear(): void {
    this.#socket.resume();
  }

  /**
   * Runs one command; throws `internal` with QEMU's description when QEMU refuses it. QEMU runs commands one after the other,
   * so whoever knows the next one before the answer need not wait for that. Those of one turn go out together.
   */
  execute(command: string, args: Record<string, unknown> = {}): Promise<unknown> {
    if (this.#closed) return Promise.reject(this.#gone(command));
    const id = this.#nextId++;
    const { promise, resolve, reject } = Promise.withResolvers<unknown>();
    this.#pending.set(id, { resolve, reject, command });
    writeTogether(this.#socket, `${JSON.stringify({ execute: command, arguments: args, id })}\n`);
    return promise;
  }

  /** True once nothing is answered any more. */
  get closed(): boolean {
    return this.#closed;
  }

  /** True once QEMU has ended the conversation, and not we, for something it said. */
  get closedByPeer(): boolean {
    return this.#closed && this.#reason === undefined;
  }

  close(): void {
    this.#fail('Kiln has closed the control connection');
  }

  #onData(chunk: Buffer): void {
    let start = 0;
    for (let end = chunk.indexOf(newline); end !== -1; end = chunk.indexOf(newline, start)) {
      this.#line.push(chunk.subarray(start, end));
      const line = Buffer.concat(this.#line).toString();
      this.#line = [];
      this.#lineBytes = 0;
      start = end + 1;
      this.#onLine(line);
      if (this.#socket.destroyed) return;
    }
    const rest = chunk.subarray(start);
    this.#line.push(rest);
    this.#lineBytes += rest.length;
    if (this.#lineBytes > maxLineBytes) this.#fail(`QEMU sent a line of more than ${maxLineBytes} bytes`);
  }

  #onLine(line: string): void {
    if (line.trim() === '') return;
    const message = parseObject(line);
    if (message === undefined) this.#fail(`QEMU sent a line that is not QMP: ${shown(line)}`);
    else if ('QMP' in message) return;
    else if (typeof message.event === 'string') this.emit('event', message.event, asObject(message.data) ?? {});
    else if (typeof message.id === 'number') this.#settle(message.id, message);
    // What is left is an error without id: QEMU could not read a command. Then its answer never comes.
    else this.#fail(`QEMU could not read a command: ${shown(line)}`);
  }

  #settle(id: number, message: Record<string, unknown>): void {
    const pending = this.#pending.get(id);
    if (pending === undefined) return;
    this.#pending.delete(id);
    const error = asObject(message.error);
    if (error === undefined) pending.resolve(message.return);
    else pending.reject(new KilnError('internal', `QEMU refused ${pending.command}: ${shown(String(error.desc))}`));
  }

  #fail(reason: string): void {
    this.#reason ??= reason;
    this.#socket.destroy();
  }

  #onClose(): void {
    if (this.#closed) return;
    this.#closed = true;
    for (const pending of this.#pending.values()) pending.reject(this.#gone(pending.command));
    this.#pending.clear();
    this.emit('close');
  }

  #gone(command: string): KilnError {
    return new KilnError('unavailable', `${this.#reason ?? 'QEMU has closed its control connection'} (at ${command})`);
  }
}

/** The beginning of what QEMU said, fit for an error message. */
function shown(text: string): string {
  return printable(text.slice(0, maxShownChars));
}

function parseObject(line: string): Record<string, unknown> | undefined {
  try {
    return asObject(JSON.parse(line));
  } catch {
    return undefined;
  }
}

function asObject(value: unknown): Record<string, unknown> | undefined {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
    ? (value as Record<string, unknown>)
    : undefined;
}
