import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { type AddressInfo, createServer, type Server, type Socket } from 'node:net';
import { buffer } from 'node:stream/consumers';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { type ClientDuplexStream, status } from '@grpc/grpc-js';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';
import type {
  AgentClient,
  DialRequest,
  DialResponse,
  WatchListenersResponse,
} from '../../../gen/kiln/agent/v1/agent.ts';
import { compileListeners, hello, TestAgent } from './agent.ts';

const AF_INET = 2;
const AF_INET6 = 10;

describe('localhost', () => {
  let agent: TestAgent;
  let client: AgentClient;
  const servers: Server[] = [];
  beforeAll(async () => {
    agent = new TestAgent();
    compileListeners(agent.listenersProgram);
    client = await agent.accept();
    await hello(client);
  });
  afterEach(() => {
    for (const server of servers.splice(0)) server.close();
  });
  afterAll(() => agent[Symbol.asyncDispose]());

  async function serve(host: string, onConnection: (socket: Socket) => void): Promise<number> {
    const server = createServer({ allowHalfOpen: true }, (socket) => {
      socket.on('error', () => {});
      onConnection(socket);
    });
    servers.push(server.listen(0, host));
    await once(server, 'listening');
    return (server.address() as AddressInfo).port;
  }

  function dial(port: number, family = AF_INET): ClientDuplexStream<DialRequest, DialResponse> {
    const call = client.dial();
    call.on('error', () => {});
    call.write({ family, port, data: Buffer.alloc(0), end: false });
    return call;
  }

  const say = (call: ReturnType<typeof dial>, data: Buffer) =>
    void call.write({ family: 0, port: 0, data, end: false });

  function end(call: ReturnType<typeof dial>): void {
    call.write({ family: 0, port: 0, data: Buffer.alloc(0), end: true });
    call.end();
  }

  async function all(call: ReturnType<typeof dial>): Promise<{ data: Buffer; ended: boolean }> {
    const parts: Buffer[] = [];
    let ended = false;
    for await (const message of call as AsyncIterable<DialResponse>) {
      parts.push(message.data);
      ended ||= message.end;
    }
    return { data: Buffer.concat(parts), ended };
  }

  it('tells who listens, and again when that has changed', async () => {
    const first = await serve('127.0.0.1', () => {});
    const call = client.watchListeners({});
    call.on('error', () => {});
    const told: { four: number[]; six: number[] }[] = [];
    const decode = (bytes: Buffer) =>
      Array.from({ length: bytes.length / 2 }, (_, index) => bytes.readUInt16BE(2 * index));
    call.on('data', ({ ipv4Ports, ipv6Ports }: WatchListenersResponse) => {
      told.push({ four: decode(ipv4Ports), six: decode(ipv6Ports) });
    });
    await vi.waitFor(() => expect(told.at(-1)?.four).toContain(first), { timeout: 10_000 });
    const second = await serve('::1', () => {});
    await vi.waitFor(() => expect(told.at(-1)?.six).toContain(second), { timeout: 10_000 });
    expect(told.at(-1)?.four).not.toContain(second);
    call.cancel();
  });

  it.each([
    ['127.0.0.1', AF_INET],
    ['::1', AF_INET6],
  ] as const)('carries bytes both ways to a listener at %s, and each direction’s end', async (host, family) => {
    const data = randomBytes(5 << 20);
    const port = await serve(host, (socket) => {
      // Answers when it has all, which it knows by the end.
      void buffer(socket).then((received) => socket.end(received));
    });
    const call = dial(port, family);
    for (let at = 0; at < data.length; at += 60_000) say(call, data.subarray(at, at + 60_000));
    end(call);
    const answer = await all(call);
    expect(answer.data.equals(data)).toBe(true);
    expect(answer.ended).toBe(true);
  });

  it('tells the end of a listener that goes on reading', async () => {
    const received = Promise.withResolvers<Buffer>();
    const port = await serve('127.0.0.1', (socket) => {
      socket.end('only this');
      received.resolve(buffer(socket));
    });
    const call = dial(port);
    for await (const message of call as AsyncIterable<DialResponse>) {
      if (!message.end) continue;
      say(call, Buffer.from('and more'));
      end(call);
    }
    expect((await received.promise).toString()).toBe('and more');
  });

  it('says that nobody listens', async () => {
    const port = await serve('127.0.0.1', () => {});
    await once(servers.pop()!.close(), 'close');
    await expect(all(dial(port))).rejects.toMatchObject({
      code: status.FAILED_PRECONDITION,
      details: expect.stringContaining('ECONNREFUSED'),
    });
    await expect(all(dial(port, 7))).rejects.toMatchObject({ code: status.INVALID_ARGUMENT });
  });

  it('tells a reset from an end', async () => {
    const port = await serve('127.0.0.1', (socket) => void socket.once('data', () => socket.resetAndDestroy()));
    const call = dial(port);
    say(call, Buffer.from('x'));
    await expect(all(call)).rejects.toMatchObject({ code: status.ABORTED });
  });

  it('resets the connection when the call is cancelled', async () => {
    const error = Promise.withResolvers<Error>();
    const connected = Promise.withResolvers<void>();
    const port = await serve('127.0.0.1', (socket) => {
      socket.on('error', error.resolve);
      socket.resume();
      connected.resolve();
    });
    const call = dial(port);
    await connected.promise;
    call.cancel();
    expect(await error.promise).toMatchObject({ code: 'ECONNRESET' });
  });

  it('holds back a listener whose bytes nobody takes', async () => {
    const chunk = Buffer.alloc(1 << 20);
    let sent = 0;
    let held = false;
    const port = await serve('127.0.0.1', (socket) => {
      const more = () => {
        for (;;) {
          sent += chunk.length;
          if (socket.write(chunk)) continue;
          held = true;
          return;
        }
      };
      socket.on('drain', () => {
        held = false;
        more();
      });
      more();
    });
    const call = dial(port);
    await vi.waitFor(() => expect(held).toBe(true));
    // What the sockets, the call's window and one chunk hold; then nothing moves any more.
    let before = -1;
    while (before !== sent) {
      before = sent;
      for (let turn = 0; turn < 1000; turn += 1) await nextTurn();
    }
    expect(sent).toBeLessThan(32 << 20);
    call.cancel();
  });
});
