import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import net from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { type Duplex, duplexPair } from 'node:stream';
import { afterEach, describe, expect, it } from 'vitest';
import {
  type Handler,
  maxDataLength,
  TtrpcClient,
  type TtrpcConnection,
  TtrpcServer,
  type TtrpcServerOptions,
} from '../../../src/rpc/ttrpc/index.ts';
import { connect, openCalls, RawPeer, read, request } from './ttrpc-support.ts';

const hello = Buffer.from('hello');
const goodReply = hello.toString('hex');
const good = (streamId: number): Buffer => request(streamId, { payload: hello });

const servers: TtrpcServer[] = [];
function serverWith(methods: Record<string, Handler> = {}, options: TtrpcServerOptions = {}): TtrpcServer {
  const server = new TtrpcServer({ 'test.Echo': { Echo: async (payload) => payload, ...methods } }, options);
  servers.push(server);
  return server;
}
afterEach(async () => {
  await Promise.all(servers.splice(0).map((server) => server.close(0)));
});

describe('ttrpc server connections', () => {
  it('aborts open calls when the connection ends, and tells the hooks once', async () => {
    const { handler, calls } = openCalls();
    const events: string[] = [];
    const gone = Promise.withResolvers<void>();
    const server = serverWith(
      { Wait: handler },
      {
        onConnection: ({ id }) => events.push(`open ${id}`),
        onClose: ({ id }, error) => {
          events.push(`close ${id} ${error?.message}`);
          if (events.length === 4) gone.resolve();
        },
      },
    );
    const first = connect(server);
    const second = connect(server);
    first.write(request(1, { method: 'Wait' }), good(3));
    await first.next();
    first.socket.end();
    await first.ended;
    second.write(good(1).subarray(0, 12));
    second.socket.end();
    await gone.promise;
    expect(events).toEqual(['open 1', 'open 2', 'close 1 undefined', 'close 2 connection ended inside a frame']);
    expect(calls[0]?.context.signal.reason).toMatchObject({ code: 1, message: 'connection closed' });
    expect(calls[0]?.context.connection).toEqual({ id: 1 });
    expect(server.connectionCount).toBe(0);
  });

  it('survives a socket that fails, again and again, and one that was dead before it came', async () => {
    const errors: (string | undefined)[] = [];
    const server = serverWith({}, { onClose: (_, error) => errors.push(error?.message) });
    const [, failing] = duplexPair();
    server.serve(failing);
    failing.emit('error', new Error('ECONNRESET'));
    failing.emit('error', new Error('EPIPE'));
    const [, dead] = duplexPair();
    dead.destroy();
    server.serve(dead);
    await once(dead, 'close');
    server.serve(dead);
    expect(errors).toEqual(['ECONNRESET', undefined, undefined]);
    const peer = connect(server);
    peer.write(good(1));
    expect(read(await peer.next())).toBe(goodReply);
  });

  it('stops reading requests while the peer does not read its replies', async () => {
    let started = 0;
    const big = Buffer.alloc(1 << 20);
    const method: Handler = async () => {
      started += 1;
      return big;
    };
    const [near, far] = duplexPair();
    serverWith({ Big: method }).serve(far);
    const total = 200;
    // One request a turn: as long as the replies pile up, no more of them are let in.
    for (let index = 0; index < total; index += 1) {
      near.write(request(index * 2 + 1, { method: 'Big' }));
      await new Promise(setImmediate);
    }
    expect(started).toBeLessThan(10);
    expect(far.writableLength).toBeLessThan(10 << 20);
    const peer = new RawPeer(near);
    expect(await peer.take(total)).toHaveLength(total);
    expect(started).toBe(total);
  });

  it('closes: open calls are told, their last words and finished replies are written, sockets end', async () => {
    const { handler } = openCalls();
    const server = serverWith({ Wait: handler });
    const peer = connect(server);
    peer.write(request(1, { method: 'Wait' }), good(3));
    expect(read(await peer.next())).toBe(goodReply);
    const closing = server.close();
    expect(read(await peer.next())).toBe('Unavailable: server is closing');
    await peer.ended;
    peer.socket.end();
    await closing;
    expect(server.connectionCount).toBe(0);
    const [, late] = duplexPair();
    server.serve(late);
    expect(late.destroyed).toBe(true);
    expect(server.connectionCount).toBe(0);
  });

  it('closes even when a handler never ends and the peer never reads', async () => {
    const [near, far] = duplexPair();
    const server = serverWith({ Stuck: () => new Promise(() => {}) });
    server.serve(far);
    near.write(request(1, { method: 'Stuck' }));
    await server.close(5);
    expect(far.destroyed).toBe(true);
  });

  it('lets a handler close the server and still get its reply out, as Shutdown does', async () => {
    const server: TtrpcServer = serverWith({
      Shutdown: async () => {
        void server.close();
        return hello;
      },
    });
    const peer = connect(server);
    peer.write(request(1, { method: 'Shutdown' }));
    expect(read(await peer.next())).toBe(goodReply);
    await peer.ended;
  });
});

describe('ttrpc over a real Unix socket', () => {
  it('serves clients side by side, big replies included, and fails open calls when it goes away', async () => {
    const folder = await mkdtemp(path.join(tmpdir(), 'kiln-ttrpc-'));
    const connections: TtrpcConnection[] = [];
    const { handler, calls } = openCalls();
    const server = serverWith({ Wait: handler }, { onConnection: (connection) => connections.push(connection) });
    const listener = net.createServer((socket: Duplex) => server.serve(socket));
    try {
      const address = path.join(folder, 's');
      await once(listener.listen(address), 'listening');
      const clients = [new TtrpcClient(net.connect(address)), new TtrpcClient(net.connect(address))];
      const waits = clients.map((client) => client.call('test.Echo', 'Wait', Buffer.alloc(0)));
      const settled = Promise.allSettled(waits);
      const sizes = [0, 1, 65_535, 65_536, 1 << 20, maxDataLength - 64];
      await Promise.all(
        clients.flatMap((client, seed) =>
          sizes.map(async (size) => {
            const payload = Buffer.alloc(size, seed + 1);
            expect((await client.call('test.Echo', 'Echo', payload)).equals(payload)).toBe(true);
          }),
        ),
      );
      expect(connections).toEqual([{ id: 1 }, { id: 2 }]);
      expect(calls).toHaveLength(2);
      calls[0]?.answer(hello);
      await server.close();
      const outcomes = (await settled).map((outcome) => (outcome.status === 'fulfilled' ? 'ok' : outcome.reason.code));
      expect(outcomes.sort()).toEqual([14, 'ok']);
      await Promise.all(clients.map((client) => client.closed));
    } finally {
      listener.close();
      await rm(folder, { recursive: true });
    }
  });
});
