/**
 * Name servers that are at loopback addresses of the sandbox's network namespace on the host. A program of ours
 * (native/guest-nameservers.c) has what the guest's programs send to port 53 of such an address arrive at a port of ours; so
 * port 53 stays free for a container's own name server. The host asks, and we pass on its answers.
 */
import { spawn } from 'node:child_process';
import { createSocket, type Socket as DatagramSocket } from 'node:dgram';
import { once } from 'node:events';
import { createServer, type Server, type Socket } from 'node:net';
import { text } from 'node:stream/consumers';
import type { ServerDuplexStream } from '@grpc/grpc-js';
import type { RelayQueriesRequest, RelayQueriesResponse } from '../gen/kiln/agent/v1/agent.ts';
import { DnsMessages, frameDnsMessage, maxDnsMessage, minDnsMessage } from '../src/sys/dns-stream.ts';
import { formatAddress } from '../src/sys/rtnetlink/addresses.ts';
import { dnsFailure } from './dns-failure.ts';
import { AgentError, describe } from './errors.ts';
import type { Reaper } from './reaper.ts';

/** The most queries that wait for an answer, and connections to one name server; what goes beyond is dropped. */
const maxQueries = 128;
const maxConnections = 64;

/** How long a connection may be silent, in ms. */
const connectionLimitMs = 30_000;

/** Where we listen ourselves, by the address's length. */
const ownAddress = new Map([
  [4, '127.0.0.11'],
  [16, '::1'],
]);

/** Another program may have the port for TCP that the kernel has chosen for UDP. */
const attempts = 10;

export type RelayCall = ServerDuplexStream<RelayQueriesRequest, RelayQueriesResponse>;

export interface NameserversOptions {
  /** /usr/lib/kiln/kiln-nameservers. */
  readonly program: string;
  /** Whose programs' queries are taken, with those below it. */
  readonly cgroup: string;
  readonly reaper: Reaper;
}

interface Query {
  readonly message: Buffer;
  /** Called once; without an answer when there is none. */
  readonly reply: (answer?: Buffer) => void;
}

export class Nameservers {
  readonly #options: NameserversOptions;
  /** By address, in hexadecimal digits. */
  readonly #served = new Map<string, Promise<void>>();
  readonly #queries = new Map<number, Query>();
  #lastId = 0;
  #call: RelayCall | undefined;

  constructor(options: NameserversOptions) {
    this.#options = options;
  }

  /**
   * Takes queries for these from now on, 4 or 16 bytes each.
   *
   * @throws AgentError invalid-argument for what is no address, internal when the program cannot do it
   */
  async serve(addresses: readonly Buffer[]): Promise<void> {
    await Promise.all(addresses.map((address) => this.#serveOnce(address)));
  }

  #serveOnce(address: Buffer): Promise<void> {
    const key = address.toString('hex');
    const known = this.#served.get(key);
    if (known !== undefined) return known;
    const served = this.#serve(address);
    this.#served.set(key, served);
    served.catch(() => this.#served.delete(key));
    return served;
  }

  async #serve(address: Buffer): Promise<void> {
    const own = ownAddress.get(address.length);
    if (own === undefined) throw new AgentError('invalid-argument', `${address.length} bytes are no IP address`);
    const { datagrams, server, port } = await listenTwice(own);
    datagrams.on('message', (message, { port: from, address: peer }) => {
      const reply = (answer?: Buffer) => {
        // Nobody may be there any more.
        if (answer !== undefined) datagrams.send(answer, from, peer, () => {});
      };
      this.#ask({ message, reply }, { nameserver: address, tcp: false });
    });
    server.on('connection', (socket: Socket) => this.#serveConnection(socket, address));
    try {
      await this.#redirect(formatAddress(address), own, port);
    } catch (error) {
      datagrams.close();
      server.close();
      throw error;
    }
  }

  #serveConnection(socket: Socket, nameserver: Buffer): void {
    const messages = new DnsMessages();
    socket.on('error', () => {});
    socket.setTimeout(connectionLimitMs, () => socket.destroy());
    const reply = (answer?: Buffer) => {
      // Nor is there an end to what a program may ask for and not read.
      if (answer === undefined || socket.writableLength > maxDnsMessage) socket.destroy();
      else socket.write(frameDnsMessage(answer));
    };
    socket.on('data', (data: Buffer) => {
      for (const message of messages.push(data)) this.#ask({ message, reply }, { nameserver, tcp: true });
    });
  }

  /** Has the program do its part, which stays when it has ended. */
  async #redirect(address: string, own: string, port: number): Promise<void> {
    const { program, cgroup, reaper } = this.#options;
    const child = spawn(program, [cgroup, address, own, String(port)], { stdio: ['ignore', 'ignore', 'pipe'] });
    reaper.leaveToNode(child);
    const ended = Promise.all([once(child, 'exit'), text(child.stderr)]);
    const [code, said] = await ended.then(
      ([[status], message]) => [status, message.trim() || `status ${status}`],
      (error: unknown) => [undefined, describe(error)],
    );
    if (code !== 0) throw new AgentError('internal', `cannot take queries for ${address}: ${said}`);
  }

  #ask(query: Query, { nameserver, tcp }: Pick<RelayQueriesResponse, 'nameserver' | 'tcp'>): void {
    const call = this.#call;
    if (call === undefined || this.#queries.size === maxQueries || query.message.length < minDnsMessage) {
      query.reply();
      return;
    }
    this.#lastId = (this.#lastId + 1) >>> 0;
    this.#queries.set(this.#lastId, query);
    call.write({ id: this.#lastId, nameserver, tcp, query: query.message });
  }

  /** Has the host get the queries by this call, and no more by an earlier one. */
  relay(call: RelayCall): void {
    this.#call?.end();
    this.#giveUp();
    this.#call = call;
    const lost = () => {
      if (this.#call !== call) return;
      this.#call = undefined;
      this.#giveUp();
    };
    call.on('data', ({ id, answer, refused }: RelayQueriesRequest) => {
      const query = this.#queries.get(id);
      if (query === undefined) return;
      this.#queries.delete(id);
      if (refused) query.reply(dnsFailure(query.message));
      else query.reply(answer.length > 0 ? answer : undefined);
    });
    // A call that is cancelled or whose connection breaks does not end by itself.
    call.on('cancelled', () => {
      lost();
      call.destroy();
    });
    call.on('end', () => {
      lost();
      call.end();
    });
    call.on('error', () => {});
  }

  /** Nobody will answer what was asked. */
  #giveUp(): void {
    const queries = [...this.#queries.values()];
    this.#queries.clear();
    for (const { reply } of queries) reply();
  }
}

/** For UDP and TCP at the same port. @throws AgentError internal */
async function listenTwice(own: string): Promise<{ datagrams: DatagramSocket; server: Server; port: number }> {
  for (let attempt = 1; ; attempt += 1) {
    const datagrams = createSocket(own === '::1' ? 'udp6' : 'udp4');
    const server = createServer({ noDelay: true });
    server.maxConnections = maxConnections;
    try {
      datagrams.bind(0, own);
      await once(datagrams, 'listening');
      const { port } = datagrams.address();
      server.listen(port, own);
      await once(server, 'listening');
      datagrams.on('error', () => {});
      server.on('error', () => {});
      return { datagrams, server, port };
    } catch (error) {
      datagrams.close();
      if (attempt === attempts) throw new AgentError('internal', `cannot listen at ${own}: ${describe(error)}`);
    }
  }
}
