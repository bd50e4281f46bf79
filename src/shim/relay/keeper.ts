import type { Socket } from 'node:net';
import { KilnError } from '../../errors.ts';
import { writeTogether } from '../../host/write-together.ts';
import type { RelayHeader } from './header.ts';

/** How long a relay that was told to end gets until its connection is given up, in ms. It itself allows clients 1 s. */
const endPatienceMs = 3000;

/** An answer is `error` and a reason of the system; more than this is no relay. */
const answerLimit = 4096;

/**
 * The connection on which kilnd rules a relay; it lasts until one of both ends. Messages end with NUL:
 *
 *   kilnd → relay   `welcome`, `end`, `hold PATH`, `release PATH`
 *   relay → kilnd   `ok` or `error REASON`, for each hold and release, in their order
 */
export class Keeper {
  readonly header: RelayHeader;
  /** Resolves when the connection is gone: the relay has ended, or was given up. Never rejects. */
  readonly closed: Promise<void>;
  readonly #socket: Socket;
  readonly #unanswered: PromiseWithResolvers<void>[] = [];
  #partial = '';
  #isClosed = false;

  /** @param rest what came behind the header already */
  constructor(socket: Socket, header: RelayHeader, rest: Uint8Array) {
    this.header = header;
    this.#socket = socket;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.closed = promise;
    socket.on('error', () => {});
    socket.on('data', (chunk) => this.#onBytes(chunk));
    socket.on('end', () => socket.destroy());
    socket.on('close', () => {
      this.#isClosed = true;
      for (const { reject } of this.#unanswered.splice(0)) reject(gone());
      resolve();
    });
    if (rest.length > 0) this.#onBytes(rest);
    socket.resume();
  }

  get isClosed(): boolean {
    return this.#isClosed;
  }

  /** Says that this kilnd serves the endpoint; the relay's sessions come after it. */
  welcome(): void {
    this.#say('welcome');
  }

  /**
   * Has the relay hold a FIFO open, so that its other side sees no end while kilnd is away. A FIFO that is held already
   * is no error.
   * @throws {KilnError} `failed-precondition` with the relay's reason, `unavailable` when the relay is gone.
   */
  hold(path: string): Promise<void> {
    return this.#ask(`hold ${path}`);
  }

  /** Has the relay close a FIFO that it holds; one that it does not hold is no error. Throws as `hold` does. */
  release(path: string): Promise<void> {
    return this.#ask(`release ${path}`);
  }

  /** Tells the relay that the endpoint is over: it lets nobody connect any more, and ends with its sessions. */
  end(): void {
    this.#say('end');
  }

  /** Resolves when the relay has ended, or is given up after some seconds: nothing of kilnd's may wait for ever. */
  async gone(): Promise<void> {
    const timer = setTimeout(() => this.close(), endPatienceMs);
    await this.closed;
    clearTimeout(timer);
  }

  /** Gives the connection up without a word. A relay that was not told to end takes that for kilnd's death. */
  close(): void {
    this.#socket.destroy();
  }

  #ask(message: string): Promise<void> {
    if (message.includes('\0')) throw new KilnError('invalid-argument', 'a path must not hold a NUL byte');
    if (this.#isClosed) return Promise.reject(gone());
    const answer = Promise.withResolvers<void>();
    this.#unanswered.push(answer);
    this.#say(message);
    return answer.promise;
  }

  #say(message: string): void {
    if (this.#socket.writable) writeTogether(this.#socket, `${message}\0`);
  }

  #onBytes(chunk: Uint8Array): void {
    const messages = (this.#partial + Buffer.from(chunk).toString('latin1')).split('\0');
    this.#partial = messages.pop() ?? '';
    for (const message of messages) this.#onAnswer(Buffer.from(message, 'latin1').toString());
    if (this.#partial.length > answerLimit) this.close();
  }

  #onAnswer(message: string): void {
    const answer = this.#unanswered.shift();
    if (message === 'ok') answer?.resolve();
    else answer?.reject(new KilnError('failed-precondition', message.replace(/^error /, '')));
    if (answer === undefined) this.close();
  }
}

function gone(): KilnError {
  return new KilnError('unavailable', 'the relay is gone');
}
