import { once } from 'node:events';
import net from 'node:net';
import { duplexPair } from 'node:stream';
import { describe, expect, it } from 'vitest';
import {
  decodeRequest,
  encodeFailure,
  encodeFrame,
  encodeReply,
  maxDataLength,
  messageType,
  TtrpcClient,
} from '../../../src/rpc/ttrpc/index.ts';
import { RawPeer } from './ttrpc-support.ts';

const nothing = Buffer.alloc(0);

function pair(): { client: TtrpcClient; server: RawPeer; reply: (streamId: number, payload: string) => void } {
  const [near, far] = duplexPair();
  const server = new RawPeer(far);
  const reply = (streamId: number, payload: string): void =>
    server.write(response(streamId, encodeReply(Buffer.from(payload))));
  return { client: new TtrpcClient(near), server, reply };
}

function response(streamId: number, data: Uint8Array, type: number = messageType.response): Buffer {
  return encodeFrame({ streamId, type, flags: 0 }, data);
}

describe('ttrpc client', () => {
  it('numbers calls 1, 3, 5 and sends service, method, payload, timeout and metadata', async () => {
    const { client, server, reply } = pair();
    const metadata = new Map([['containerd-namespace-ttrpc', 'ns1']]);
    const calls = [
      client.call('a.B', 'C', Buffer.from('x'), { timeoutMs: 5000, metadata }),
      client.call('a.B', 'D', nothing),
      client.call('a.B', 'E', nothing),
    ];
    const frames = await server.take(3);
    expect(frames.map(({ streamId, type, flags }) => [streamId, type, flags])).toEqual([
      [1, 1, 0],
      [3, 1, 0],
      [5, 1, 0],
    ]);
    const first = frames[0]?.data ?? nothing;
    expect(decodeRequest(first)).toEqual({
      service: 'a.B',
      method: 'C',
      payload: Buffer.from('x'),
      timeoutMs: 5000,
      metadata,
    });
    for (const streamId of [5, 1, 3]) reply(streamId, `reply ${streamId}`);
    expect((await Promise.all(calls)).map(String)).toEqual(['reply 1', 'reply 3', 'reply 5']);
  });

  it('fails a call with the status of its Response, and reads an empty frame as an empty reply', async () => {
    const { client, server } = pair();
    const failing = client.call('a.B', 'C', nothing);
    const empty = client.call('a.B', 'D', nothing);
    server.write(response(1, encodeFailure({ code: 5, message: 'no such task' })), response(3, nothing));
    await expect(failing).rejects.toMatchObject({ code: 5, message: 'no such task' });
    expect(await empty).toHaveLength(0);
  });

  it('gives up after its timeout, ignores the late reply, and goes on', async () => {
    const { client, server, reply } = pair();
    await expect(client.call('a.B', 'Slow', nothing, { timeoutMs: 5 })).rejects.toMatchObject({
      code: 4,
      message: 'a.B/Slow: no reply within 5 ms',
    });
    reply(1, 'too late');
    const next = client.call('a.B', 'C', nothing);
    await server.take(2);
    reply(3, 'in time');
    expect(String(await next)).toBe('in time');
  });

  it('does not send a call whose time has run out, and takes an endless timeout for none', async () => {
    const { client, server, reply } = pair();
    await expect(client.call('a.B', 'C', nothing, { timeoutMs: 0 })).rejects.toMatchObject({ code: 4 });
    const endless = client.call('a.B', 'D', nothing, { timeoutMs: Number.POSITIVE_INFINITY });
    expect(decodeRequest((await server.next()).data)).toMatchObject({ method: 'D', timeoutMs: undefined });
    reply(1, 'done');
    expect(String(await endless)).toBe('done');
  });

  it('gives up when its signal is aborted, before or during the call', async () => {
    const { client, server } = pair();
    const controller = new AbortController();
    const open = client.call('a.B', 'C', nothing, { signal: controller.signal });
    await server.next();
    controller.abort(new Error('user left'));
    await expect(open).rejects.toMatchObject({ code: 1, cause: { message: 'user left' } });
    await expect(client.call('a.B', 'C', nothing, { signal: controller.signal })).rejects.toMatchObject({ code: 1 });
    expect(server.unread).toBe(0);
  });

  it('fails every open call with Unavailable when the connection is lost, and every later one', async () => {
    const { client, server } = pair();
    const calls = Promise.allSettled([client.call('a.B', 'C', nothing), client.call('a.B', 'D', nothing)]);
    await server.take(2);
    // Half a reply, then the end.
    server.write(response(1, encodeReply(Buffer.from('x'))).subarray(0, 11));
    server.socket.end();
    for (const outcome of await calls) {
      expect(outcome).toMatchObject({ status: 'rejected', reason: { code: 14 } });
    }
    await client.closed;
    await expect(client.call('a.B', 'E', nothing)).rejects.toMatchObject({
      code: 14,
      message: 'a.B/E: connection closed by the server',
    });
  });

  it('fails with Unavailable when nobody listens', async () => {
    const client = new TtrpcClient(net.connect('/nonexistent/socket'));
    await expect(client.call('a.B', 'C', nothing)).rejects.toMatchObject({
      code: 14,
      message: expect.stringContaining('ENOENT'),
    });
  });

  it('fails open calls when it is closed itself', async () => {
    const { client, server } = pair();
    const call = client.call('a.B', 'C', nothing);
    await server.next();
    client.close();
    client.close();
    await expect(call).rejects.toMatchObject({ code: 14, message: 'a.B/C: connection closed by the client' });
  });

  it('fails on a socket that is dead already', async () => {
    const [near] = duplexPair();
    near.destroy();
    await once(near, 'close');
    await expect(new TtrpcClient(near).call('a.B', 'C', nothing)).rejects.toMatchObject({ code: 14 });
  });

  it('refuses a request over 4 MiB without sending it, and fails only the call whose reply is over 4 MiB', async () => {
    const { client, server, reply } = pair();
    await expect(client.call('a.B', 'C', Buffer.alloc(maxDataLength))).rejects.toMatchObject({ code: 8 });
    const big = client.call('a.B', 'D', nothing);
    const small = client.call('a.B', 'E', nothing);
    await server.take(2);
    server.write(Buffer.from('00400001000000010200', 'hex'));
    await expect(big).rejects.toMatchObject({ code: 8, message: expect.stringContaining('4194305 bytes') });
    server.write(Buffer.alloc(maxDataLength + 1));
    reply(3, 'fine');
    expect(String(await small)).toBe('fine');
  });

  it('fails a call that is answered with a stream or with garbage, and ignores what belongs to no call', async () => {
    const { client, server, reply } = pair();
    const streamed = client.call('a.B', 'C', nothing);
    const garbled = client.call('a.B', 'D', nothing);
    const fine = client.call('a.B', 'E', nothing);
    server.write(response(2, nothing), response(99, nothing), response(5, nothing, 77), response(5, nothing, 1));
    server.write(response(1, nothing, messageType.data), response(3, Buffer.from([0x0a, 0x7f])));
    reply(5, 'fine');
    await expect(streamed).rejects.toMatchObject({ code: 13, message: expect.stringContaining('stream') });
    await expect(garbled).rejects.toMatchObject({ code: 13, message: expect.stringContaining('malformed response') });
    expect(String(await fine)).toBe('fine');
  });
});
