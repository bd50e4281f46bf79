/** Both ends of a relay's connections, without a relay: what it would say is said by the test. */
import { once } from 'node:events';
import { connect, createServer, type Socket } from 'node:net';
import { join } from 'node:path';
import type { RelayHeader } from '../../../src/shim/relay/header.ts';
import { Keeper } from '../../../src/shim/relay/keeper.ts';

/** Two connected sockets. */
export async function socketPair(directory: string): Promise<[Socket, Socket]> {
  const path = join(directory, 'pair');
  const server = createServer().listen(path);
  await once(server, 'listening');
  const near = connect(path);
  const [far] = (await once(server, 'connection')) as [Socket];
  server.close();
  return [near, far];
}

export function headerOf(fields: Partial<RelayHeader> = {}): RelayHeader {
  return {
    role: 'keeper',
    context: {
      ...{ namespace: 'ns', id: 'c1', bundle: '/b', address: '', ttrpcAddress: '', publishBinary: '', debug: false },
      maxShimVersion: 2,
      launcherStartedNs: 1n,
    },
    socketPath: '/s',
    relayPid: 1,
    client: 0,
    replayed: 0,
    ...fields,
  };
}

/** The relay's end of a keeper connection. */
export class ScriptedRelay {
  readonly keeper: Keeper;
  readonly socket: Socket;
  readonly heard: string[] = [];
  readonly #waiting: (() => void)[] = [];

  private constructor(keeper: Keeper, socket: Socket) {
    this.keeper = keeper;
    this.socket = socket;
    let partial = '';
    socket.on('error', () => {});
    socket.on('data', (chunk) => {
      const messages = (partial + chunk.toString()).split('\0');
      partial = messages.pop() ?? '';
      this.heard.push(...messages);
      for (const resolve of this.#waiting.splice(0)) resolve();
    });
  }

  static async connect(directory: string, fields: Partial<RelayHeader> = {}): Promise<ScriptedRelay> {
    const [near, far] = await socketPair(directory);
    return new ScriptedRelay(new Keeper(near, headerOf(fields), new Uint8Array()), far);
  }

  /** Resolves with all that was heard, once it is so many messages. */
  async until(count: number): Promise<string[]> {
    while (this.heard.length < count) await new Promise<void>((resolve) => this.#waiting.push(resolve));
    return this.heard;
  }

  say(...messages: string[]): void {
    this.socket.write(messages.map((message) => `${message}\0`).join(''));
  }
}
