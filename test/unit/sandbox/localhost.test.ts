import { once } from 'node:events';
import { type AddressInfo, connect, createServer, type Socket } from 'node:net';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import type { ListeningPorts, LoopbackPort } from '../../../src/guest/connections.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import { Localhost } from '../../../src/sandbox/localhost.ts';
import { bindLoopback } from '../../../src/sys/loopback.ts';

/** A guest whose listeners a test names, and which keeps the connections that it gets. */
class ScriptedGuest {
  readonly connections: { readonly port: LoopbackPort; readonly socket: Socket }[] = [];
  readonly #lost = Promise.withResolvers<void>();
  tell: (ports: ListeningPorts) => void = () => {};
  refuses = false;

  watchListeners(onPorts: (ports: ListeningPorts) => void): Promise<void> {
    this.tell = onPorts;
    return this.#lost.promise;
  }

  async relayConnection(port: LoopbackPort, socket: Socket, signal: AbortSignal): Promise<void> {
    signal.addEventListener('abort', () => socket.destroy());
    this.connections.push({ port, socket });
    socket.resume();
    if (!this.refuses) return closeOf(socket);
    await once(socket, 'data');
    socket.resetAndDestroy();
    throw new KilnError('failed-precondition', 'nobody listens');
  }

  lose(): void {
    this.#lost.reject(new KilnError('unavailable', 'the connection to the guest was lost'));
  }
}

const cleanups: (() => void)[] = [];
afterEach(() => {
  for (const cleanup of cleanups.splice(0)) cleanup();
});

function scene() {
  const guest = new ScriptedGuest();
  const log: string[] = [];
  const logger = loggerTo({ write: (line: string) => void log.push(line) }, 'debug');
  const localhost = new Localhost({ guest, network: { bindLoopback }, logger });
  cleanups.push(() => localhost[Symbol.dispose]());
  return { guest, localhost, log };
}

/** Ports that nobody has now. */
async function freePorts(count: number): Promise<number[]> {
  const servers = Array.from({ length: count }, () => createServer().listen(0, '127.0.0.1'));
  await Promise.all(servers.map((server) => once(server, 'listening')));
  const ports = servers.map((server) => (server.address() as AddressInfo).port);
  await Promise.all(servers.map((server) => once(server.close(), 'close')));
  return ports;
}

async function dial(port: number, host = '127.0.0.1'): Promise<Socket> {
  const socket = connect({ host, port });
  cleanups.push(() => socket.destroy());
  await once(socket, 'connect');
  return socket.on('error', () => {});
}

function closeOf(socket: Socket): Promise<void> {
  return new Promise((resolve) => socket.once('close', () => resolve()));
}

const refused = expect.objectContaining({ code: 'ECONNREFUSED' });

describe('localhost of a sandbox', () => {
  it('listens where the guest does, and not where it does no longer', async () => {
    const { guest } = scene();
    const [one = 0, two = 0] = await freePorts(2);
    guest.tell({ ipv4Ports: [one], ipv6Ports: [two] });
    await dial(one);
    await dial(two, '::1');
    await expect(dial(two)).rejects.toEqual(refused);
    await expect(dial(one, '::1')).rejects.toEqual(refused);
    await vi.waitFor(() => expect(guest.connections).toHaveLength(2));
    expect(guest.connections.map(({ port }) => port)).toEqual([
      { family: 'ipv4', port: one },
      { family: 'ipv6', port: two },
    ]);
    guest.tell({ ipv4Ports: [two], ipv6Ports: [] });
    await expect(dial(one)).rejects.toEqual(refused);
    await expect(dial(two, '::1')).rejects.toEqual(refused);
    await dial(two);
    // Those that were made go on.
    expect(guest.connections.map(({ socket }) => socket.destroyed)).not.toContain(true);
  });

  it('leaves a port to whoever has it in the namespace', async () => {
    const { guest, log } = scene();
    const owner = createServer().listen(0, '127.0.0.1');
    cleanups.push(() => owner.close());
    await once(owner, 'listening');
    const { port: taken } = owner.address() as AddressInfo;
    const [free = 0] = await freePorts(1);
    guest.tell({ ipv4Ports: [taken, free], ipv6Ports: [] });
    await dial(free);
    await vi.waitFor(() => expect(guest.connections).toHaveLength(1));
    expect(log.join()).toContain('EADDRINUSE');
  });

  it('believes no guest that names too many ports, or one that cannot be', async () => {
    const bound: number[] = [];
    const guest = new ScriptedGuest();
    const network = {
      bindLoopback: (_family: string, port: number) => {
        bound.push(port);
        throw new Error('not here');
      },
    };
    using _localhost = new Localhost({ guest, network, logger: loggerTo({ write: () => {} }, 'debug') });
    guest.tell({
      ipv4Ports: [0, ...Array.from({ length: 5000 }, (_, index) => index + 1)],
      ipv6Ports: [5],
    });
    expect(bound).toHaveLength(256);
    expect(Math.min(...bound)).toBe(1);
  });

  it('resets a connection that the guest refuses', async () => {
    const { guest } = scene();
    const [port = 0] = await freePorts(1);
    guest.refuses = true;
    guest.tell({ ipv4Ports: [port], ipv6Ports: [] });
    const socket = await dial(port);
    const error = new Promise((resolve) => socket.once('error', resolve));
    socket.write('x');
    expect(await error).toMatchObject({ code: 'ECONNRESET' });
  });

  it('ends with the guest', async () => {
    const { guest } = scene();
    const [port = 0] = await freePorts(1);
    guest.tell({ ipv4Ports: [port], ipv6Ports: [] });
    await dial(port);
    guest.lose();
    await vi.waitFor(() => expect(dial(port)).rejects.toEqual(refused));
  });

  it('leaves nothing when it is disposed of', async () => {
    const { guest, localhost } = scene();
    const [port = 0] = await freePorts(1);
    guest.tell({ ipv4Ports: [port], ipv6Ports: [] });
    const socket = await dial(port);
    await vi.waitFor(() => expect(guest.connections).toHaveLength(1));
    const closed = closeOf(socket);
    localhost[Symbol.dispose]();
    await closed;
    await expect(dial(port)).rejects.toEqual(refused);
    // What a guest says later is heard by nobody.
    guest.tell({ ipv4Ports: [port], ipv6Ports: [] });
    await expect(dial(port)).rejects.toEqual(refused);
  });
});
