import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { type AddressInfo, createServer, type Socket } from 'node:net';
import { afterEach, describe, expect, it } from 'vitest';
import { ask } from '../../../src/network/ask.ts';
import { DnsMessages, frameDnsMessage } from '../../../src/sys/dns-stream.ts';
import { openSocket } from '../../../src/sys/loopback.ts';
import { dnsAnswer, dnsQuery } from '../../support/dns.ts';

const cleanups: (() => void)[] = [];
afterEach(() => {
  for (const cleanup of cleanups.splice(0)) cleanup();
});

const never = new AbortController().signal;
const query = dnsQuery('name.test');
const answer = dnsAnswer(query, ['10.0.0.1']);

function asked(transport: 'udp' | 'tcp', nameserver: string, port: number, signal = never) {
  const fd = openSocket(nameserver === '::1' ? 'ipv6' : 'ipv4', transport);
  return ask(fd, { nameserver, transport, message: query }, signal, port);
}

/** Answers a datagram with others. */
async function udpServer(address: string, reply: (message: Buffer) => Buffer[]): Promise<number> {
  const socket = createSocket(address === '::1' ? 'udp6' : 'udp4').bind(0, address);
  cleanups.push(() => socket.close());
  await once(socket, 'listening');
  socket.on('message', (message, peer) => {
    for (const each of reply(message)) socket.send(each, peer.port, peer.address);
  });
  return socket.address().port;
}

async function tcpServer(address: string, onMessage: (message: Buffer, socket: Socket) => void): Promise<number> {
  const server = createServer((socket) => {
    const messages = new DnsMessages();
    socket.on('error', () => {});
    socket.on('data', (data: Buffer) => {
      for (const message of messages.push(data)) onMessage(message, socket);
    });
  }).listen(0, address);
  cleanups.push(() => server.close());
  await once(server, 'listening');
  return (server.address() as AddressInfo).port;
}

/** A port at which nobody listens, by either. */
async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  await once(server.close(), 'close');
  return port;
}

describe('a query by UDP', () => {
  it.each(['127.0.0.11', '::1'])('gets the answer of a server at %s', async (address) => {
    const port = await udpServer(address, (message) => {
      expect(message).toEqual(query);
      return [answer];
    });
    expect(await asked('udp', address, port)).toEqual(answer);
  });

  it('takes no answer for its own that is another one’s, or none', async () => {
    const other = dnsAnswer(dnsQuery('other.test', 8), ['10.0.0.2']);
    const port = await udpServer('127.0.0.1', () => [other, Buffer.alloc(0), Buffer.from([0]), answer]);
    expect(await asked('udp', '127.0.0.1', port)).toEqual(answer);
  });

  it('is refused at once where nobody listens', async () => {
    expect(await asked('udp', '127.0.0.1', await freePort())).toBe('refused');
  });

  it('gets none when the signal is aborted', async () => {
    const controller = new AbortController();
    const port = await udpServer('127.0.0.1', () => {
      controller.abort();
      return [];
    });
    expect(await asked('udp', '127.0.0.1', port, controller.signal)).toBe('none');
    expect(await asked('udp', '127.0.0.1', port, controller.signal)).toBe('none');
  });
});

describe('a query by TCP', () => {
  it.each(['127.0.0.11', '::1'])('gets the answer of a server at %s, however it is cut', async (address) => {
    const large = Buffer.concat([answer, Buffer.alloc(60_000)]);
    const port = await tcpServer(address, (message, socket) => {
      expect(message).toEqual(query);
      const frame = frameDnsMessage(large);
      socket.write(frame.subarray(0, 1));
      setImmediate(() => socket.write(frame.subarray(1)));
    });
    expect(await asked('tcp', address, port)).toEqual(large);
  });

  it('is refused at once where nobody listens', async () => {
    expect(await asked('tcp', '127.0.0.1', await freePort())).toBe('refused');
  });

  it('gets none from a server that hangs up, in order or not', async () => {
    const ends = await tcpServer('127.0.0.1', (_message, socket) => socket.end(frameDnsMessage(answer).subarray(0, 9)));
    expect(await asked('tcp', '127.0.0.1', ends)).toBe('none');
    const resets = await tcpServer('127.0.0.1', (_message, socket) => socket.resetAndDestroy());
    expect(await asked('tcp', '127.0.0.1', resets)).toBe('none');
  });

  it('gets none when the signal is aborted', async () => {
    const controller = new AbortController();
    const port = await tcpServer('127.0.0.1', () => controller.abort());
    expect(await asked('tcp', '127.0.0.1', port, controller.signal)).toBe('none');
  });
});
