/**
 * `localhost` of a sandbox's network namespace, which is the guest's: where something listens in the guest at a loopback
 * address, kilnd listens in the namespace, and carries each connection to the guest. So whoever enters the namespace and
 * dials localhost, as CRI's port-forward does, reaches the container as if it were a process there; where nothing listens,
 * the namespace's own kernel refuses the connection.
 */
import { createServer, type Server, type Socket } from 'node:net';
import { forLog, KilnError } from '../errors.ts';
import type { ListeningPorts, LoopbackPort } from '../guest/connections.ts';
import type { Guest } from '../guest/guest.ts';
import type { ConnectedNetwork } from '../network/networks.ts';
import type { Logger } from '../observe/logger.ts';

/** The most ports of a guest that are listened on, and connections to it at a time: a guest may have as many as it likes. */
const maxPorts = 256;
const maxConnections = 256;

export interface LocalhostOptions {
  readonly guest: Pick<Guest, 'watchListeners' | 'relayConnection'>;
  readonly network: Pick<ConnectedNetwork, 'bindLoopback'>;
  readonly logger: Logger;
}

export class Localhost implements Disposable {
  readonly #options: LocalhostOptions;
  /** By family and port. Undefined for a port that somebody else has in the namespace. */
  readonly #servers = new Map<string, Server | undefined>();
  readonly #disposed = new AbortController();
  #connections = 0;

  /** Follows the guest's listeners from now on, until it is disposed of or the guest is lost. */
  constructor(options: LocalhostOptions) {
    this.#options = options;
    void this.#follow();
  }

  async #follow(): Promise<void> {
    const { guest, logger } = this.#options;
    try {
      await guest.watchListeners((ports) => this.#set(ports), this.#disposed.signal);
    } catch (error) {
      const lost = error instanceof KilnError && error.code === 'unavailable';
      if (!lost) logger.warn({ err: forLog(error) }, 'localhost does not reach the guest');
    }
    this.#closeServers();
  }

  #set({ ipv4Ports, ipv6Ports }: ListeningPorts): void {
    if (this.#disposed.signal.aborted) return;
    const wanted = new Map<string, LoopbackPort>();
    const add = (family: LoopbackPort['family'], ports: readonly number[]) => {
      for (const port of ports) {
        if (wanted.size === maxPorts) return;
        if (port !== 0) wanted.set(`${family}:${port}`, { family, port });
      }
    };
    // A program that listens at both is reached by either.
    add('ipv4', ipv4Ports);
    add('ipv6', ipv6Ports);
    for (const [key, server] of this.#servers) {
      if (wanted.has(key)) continue;
      server?.close();
      this.#servers.delete(key);
    }
    for (const [key, port] of wanted) {
      if (!this.#servers.has(key)) this.#servers.set(key, this.#listen(port));
    }
  }

  #listen(port: LoopbackPort): Server | undefined {
    const { network, logger } = this.#options;
    const failed = (error: unknown) => {
      logger.debug({ err: forLog(error), ...port }, 'cannot listen on localhost in place of the guest');
    };
    try {
      const fd = network.bindLoopback(port.family, port.port);
      const server = createServer({ allowHalfOpen: true, pauseOnConnect: true, noDelay: true });
      server.on('connection', (socket) => void this.#relay(port, socket));
      server.on('error', failed);
      return server.listen({ fd });
    } catch (error) {
      failed(error);
      return undefined;
    }
  }

  async #relay(port: LoopbackPort, socket: Socket): Promise<void> {
    const { guest, logger } = this.#options;
    const { signal } = this.#disposed;
    if (signal.aborted || this.#connections === maxConnections) {
      socket.destroy();
      return;
    }
    this.#connections += 1;
    try {
      await guest.relayConnection(port, socket, signal);
    } catch (error) {
      logger.debug({ err: forLog(error), ...port }, 'a connection to localhost was broken');
    } finally {
      this.#connections -= 1;
    }
  }

  #closeServers(): void {
    for (const server of this.#servers.values()) server?.close();
    this.#servers.clear();
  }

  /** Nothing of it is left in the namespace. Safe to call twice. */
  [Symbol.dispose](): void {
    this.#closeServers();
    this.#disposed.abort();
  }
}
