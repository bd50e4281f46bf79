import { rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { KilnError } from '../../errors.ts';
import { listenPrivately } from '../../host/unix-socket.ts';
import { relaySocketPath } from '../control/socket-path.ts';
import { parseRelayHeader, type RelayHeader } from './header.ts';
import { Keeper } from './keeper.ts';

/** How long the header of a connection may take, in ms: a relay writes it at once. */
const headerPatienceMs = 10_000;

/** A connection of containerd, as the relay hands it over. Nothing is read from the socket until it is resumed. */
export interface RelaySession {
  readonly header: RelayHeader;
  readonly socket: Socket;
}

export interface RelayHandlers {
  readonly onKeeper: (keeper: Keeper) => void;
  readonly onSession: (session: RelaySession) => void;
  /** Told about connections that say nothing sensible, and about accept(2) failing. */
  readonly onError: (error: KilnError) => void;
}

/** Listens on `<state>/relay.sock`, mode 0600, for relays. */
export class RelayServer {
  readonly #server: Server;
  readonly #handlers: RelayHandlers;
  readonly #arriving = new Set<Socket>();

  private constructor(handlers: RelayHandlers) {
    this.#handlers = handlers;
    this.#server = createServer((socket) => this.#accept(socket));
  }

  /**
   * Resolves once relays can connect. Needs the state folder's lock: what lies there is a dead kilnd's.
   * @throws {KilnError} `failed-precondition` when it cannot listen.
   */
  static async listen(stateDir: string, handlers: RelayHandlers): Promise<RelayServer> {
    const path = relaySocketPath(stateDir);
    const relays = new RelayServer(handlers);
    rmSync(path, { force: true });
    try {
      await listenPrivately(relays.#server, path);
    } catch (cause) {
      const reason = (cause as Error).message;
      throw new KilnError('failed-precondition', `cannot listen on ${path}: ${reason}`, { cause });
    }
    // accept(2) can fail later (no free descriptor). Unheard, that would end kilnd.
    relays.#server.on('error', (error) => handlers.onError(KilnError.from(error)));
    return relays;
  }

  /** Unlinks the socket and takes no new connection. Those that were handed over are their owners'. */
  close(): void {
    this.#server.close();
    for (const socket of this.#arriving) socket.destroy();
  }

  #accept(socket: Socket): void {
    let bytes: Buffer = Buffer.alloc(0);
    const ignore = () => {};
    const forget = () => this.#arriving.delete(socket);
    const timer = setTimeout(() => socket.destroy(), headerPatienceMs);
    const onData = (chunk: Buffer) => {
      bytes = Buffer.concat([bytes, chunk]);
      let parsed: ReturnType<typeof parseRelayHeader>;
      try {
        parsed = parseRelayHeader(bytes);
      } catch (error) {
        socket.destroy();
        this.#handlers.onError(KilnError.from(error));
        return;
      }
      if (parsed === undefined) return;
      clearTimeout(timer);
      forget();
      socket.off('data', onData);
      socket.off('close', forget);
      // What comes next is for whoever serves it, who may have to wait for something first.
      socket.pause();
      this.#handOver(socket, parsed.header, parsed.rest);
    };
    this.#arriving.add(socket);
    socket.on('error', ignore);
    socket.on('close', forget);
    socket.once('close', () => clearTimeout(timer));
    socket.on('data', onData);
  }

  #handOver(socket: Socket, header: RelayHeader, rest: Uint8Array): void {
    if (header.role === 'keeper') {
      this.#handlers.onKeeper(new Keeper(socket, header, rest));
      return;
    }
    if (rest.length > 0) socket.unshift(rest);
    this.#handlers.onSession({ header, socket });
  }
}
