import { once } from 'node:events';
import { duplexPair } from 'node:stream';
import { afterEach, describe, expect, it } from 'vitest';
import { ConnectRequest, ConnectResponse } from '../../../gen/containerd/task.ts';
import {
  encodeFrame,
  type Handler,
  maxDataLength,
  messageType,
  TtrpcError,
  TtrpcServer,
  type TtrpcServerOptions,
  unary,
} from '../../../src/rpc/ttrpc/index.ts';
import { connect, openCalls, read, request } from './ttrpc-support.ts';

const hello = Buffer.from('hello');
const goodReply = hello.toString('hex');
const good = (streamId: number): Buffer => request(streamId, { payload: hello });
const oversizedHeader = (streamId: number, type = 1): Buffer => {
  const header = encodeFrame({ streamId, type, flags: 0 }, Buffer.alloc(0));
  header.writeUInt32BE(maxDataLength + 1, 0);
  return header;
};

const servers: TtrpcServer[] = [];
function serverWith(methods: Record<string, Handler> = {}, options: TtrpcServerOptions = {}): TtrpcServer {
  const server = new TtrpcServer({ 'test.Echo': { Echo: async (payload) => payload, ...methods } }, options);
  servers.push(server);
  return server;
}
afterEach(async () => {
  await Promise.all(servers.splice(0).map((server) => server.close(0)));
});

describe('ttrpc server', () => {
  it('answers the Connect request of containerd with the bytes that runc’s shim answers', async () => {
    const server = new TtrpcServer({
      'containerd.task.v2.Task': {
        Connect: unary(ConnectRequest, ConnectResponse, async ({ id }, { metadata }) => {
          expect([id, metadata.get('containerd-namespace-ttrpc')]).toEqual(['c2', 'ns1']);
          return ConnectResponse.create({ shimPid: 23519, taskPid: 23531 });
        }),
      },
    });
    const [near, far] = duplexPair();
    server.serve(far);
    near.write(
      Buffer.concat([
        Buffer.from('0000004b0000000301000a17', 'hex'),
        Buffer.from(
          'containerd.task.v2.Task\x12\x07Connect\x1a\x04\x0a\x02c2\x2a\x21\x0a\x1acontainerd-namespace-ttrpc',
        ),
        Buffer.from('\x12\x03ns1'),
      ]),
    );
    const [reply] = await once(near, 'data');
    expect(reply.toString('hex')).toBe('0000000a000000030200120808dfb70110ebb701');
    await server.close();
  });

  it('answers an empty reply with a frame of length 0', async () => {
    const [near, far] = duplexPair();
    serverWith({ Nothing: async () => new Uint8Array() }).serve(far);
    near.write(request(17, { method: 'Nothing' }));
    expect((await once(near, 'data'))[0].toString('hex')).toBe('00000000000000110200');
  });

  it('answers while earlier calls of the connection stay open, in the order they finish', async () => {
    const { handler, calls } = openCalls();
    const peer = connect(serverWith({ Wait: handler }));
    peer.write(request(1, { method: 'Wait' }), request(3, { method: 'Wait' }), good(5));
    expect((await peer.next()).streamId).toBe(5);
    calls[1]?.answer(Buffer.from('b'));
    expect((await peer.next()).streamId).toBe(3);
    peer.write(good(7));
    expect((await peer.next()).streamId).toBe(7);
    calls[0]?.answer(Buffer.from('a'));
    const last = await peer.next();
    expect([last.streamId, read(last)]).toEqual([1, '61']);
  });

  it('tells its handlers which requests are replays: so many of the first, whatever becomes of them', async () => {
    const [near, far] = duplexPair();
    const seen: [string, boolean][] = [];
    const note: Handler = async (payload, { replayed }) => {
      seen.push([payload.toString(), replayed]);
      return payload;
    };
    serverWith({ Note: note }).serve(far, { replayedRequests: 3 });
    const sent = ['a', '', 'c', 'd', 'e'].map((text, n) =>
      request(2 * n + 1, { method: text === '' ? 'Nope' : 'Note', payload: Buffer.from(text) }),
    );
    near.write(Buffer.concat(sent));
    near.resume();
    while (seen.length < 4) await new Promise(setImmediate);
    expect(seen).toEqual([
      ['a', true],
      ['c', true],
      ['d', false],
      ['e', false],
    ]);
  });

  it('answers Unimplemented for a service or a method it does not have, even one named like a property', async () => {
    const peer = connect(serverWith());
    peer.write(request(1, { service: 'a.B' }), request(3, { method: 'Nope' }), request(5, { service: 'constructor' }));
    peer.write(request(7, { method: '__proto__' }), request(9, { method: 'toString' }), good(11));
    expect((await peer.take(6)).map(read)).toEqual([
      'Unimplemented: service a.B',
      'Unimplemented: method Nope',
      'Unimplemented: service constructor',
      'Unimplemented: method __proto__',
      'Unimplemented: method toString',
      goodReply,
    ]);
  });

  it('turns what a handler throws into a status', async () => {
    const toStatus = (error: unknown) => {
      if (error instanceof SyntaxError) throw new Error('no status for this');
      return error instanceof RangeError ? { code: 9, message: 'mapped' } : { code: 0, message: 'not a failure?' };
    };
    const methods: Record<string, Handler> = {
      Own: async () => {
        throw new TtrpcError(5, 'container c1 not found');
      },
      Mapped: () => {
        throw new RangeError('thrown before the first await');
      },
      Zero: () => Promise.reject(undefined),
      Broken: () => Promise.reject(new SyntaxError()),
      Nothing: async () => undefined as unknown as Uint8Array,
    };
    const peer = connect(serverWith(methods, { toStatus }));
    const replies: string[] = [];
    for (const [index, method] of Object.keys(methods).entries()) {
      peer.write(request(index * 2 + 1, { method }));
      replies.push(read(await peer.next()));
    }
    expect(replies).toEqual([
      'NotFound: container c1 not found',
      'FailedPrecondition: mapped',
      'Unknown: not a failure?',
      'Internal: the error could not be turned into a status',
      'Unknown: not a failure?',
    ]);
  });

  it('answers Unknown with the message of an error that nobody mapped', async () => {
    const peer = connect(serverWith({ Fail: () => Promise.reject(new Error('disk on fire')) }));
    peer.write(request(1, { method: 'Fail' }));
    expect(read(await peer.next())).toBe('Unknown: disk on fire');
  });

  it('refuses even and reused stream ids on those streams, and goes on', async () => {
    const peer = connect(serverWith());
    const replies: string[] = [];
    for (const streamId of [5, 2, 5, 3, 0, 0xffff_ffff, 0xffff_ffff]) {
      peer.write(good(streamId));
      const frame = await peer.next();
      replies.push(`${frame.streamId} ${read(frame)}`);
    }
    const odd = 'InvalidArgument: StreamID must be odd for client initiated streams';
    const reused = 'InvalidArgument: StreamID cannot be re-used and must increment';
    expect(replies).toEqual([
      `5 ${goodReply}`,
      `2 ${odd}`,
      `5 ${reused}`,
      `3 ${reused}`,
      `0 ${odd}`,
      `4294967295 ${goodReply}`,
      `4294967295 ${reused}`,
    ]);
  });

  it('ends an open call whose stream id comes again: a stream gets one Response', async () => {
    const { handler, calls } = openCalls();
    const peer = connect(serverWith({ Wait: handler }));
    peer.write(request(1, { method: 'Wait' }), good(1));
    expect(read(await peer.next())).toMatch(/^InvalidArgument: StreamID cannot be re-used/);
    expect(calls[0]?.context.signal.aborted).toBe(true);
    calls[0]?.answer(hello);
    peer.write(good(3));
    expect((await peer.next()).streamId).toBe(3);
    expect(peer.unread).toBe(0);
  });

  it('answers InvalidArgument to a Request that is not protobuf, and goes on', async () => {
    const peer = connect(serverWith());
    peer.write(encodeFrame({ streamId: 1, type: 1, flags: 0 }, Buffer.from([0x0a, 0x7f])), good(3));
    const [refused, answered] = await peer.take(2);
    expect(refused && read(refused)).toMatch(/^InvalidArgument: unmarshal request error: /);
    expect(answered && read(answered)).toBe(goodReply);
  });

  it('answers InvalidArgument to a payload that the method cannot decode', async () => {
    const method = unary(ConnectRequest, ConnectResponse, async () => ConnectResponse.create());
    const peer = connect(serverWith({ Connect: method }));
    peer.write(request(1, { method: 'Connect', payload: Buffer.from([0x0a, 0x7f]) }));
    expect(read(await peer.next())).toMatch(/^InvalidArgument: malformed request payload: /);
  });

  it('answers ResourceExhausted to an oversized frame, skips its data, and goes on', async () => {
    const peer = connect(serverWith());
    peer.write(oversizedHeader(1));
    const refused = await peer.next();
    expect([refused.streamId, read(refused)]).toEqual([
      1,
      'ResourceExhausted: message length 4194305 exceed maximum message size of 4194304',
    ]);
    peer.write(Buffer.alloc(maxDataLength + 1, good(7)), good(1));
    expect(read(await peer.next())).toBe(goodReply);
    expect(peer.unread).toBe(0);
  });

  it('takes a request and gives a reply of exactly 4 MiB, and refuses a reply of one byte more', async () => {
    const envelope = 1 + 4; // The payload's tag and its length, which takes 4 bytes from 2 MiB up.
    const methods: Record<string, Handler> = {
      Fill: async (payload) => Buffer.alloc(payload.readUInt32BE(0)),
      Size: async (payload) => Buffer.from(String(payload.length)),
    };
    const peer = connect(serverWith(methods));
    const size = (value: number): Buffer => {
      const payload = Buffer.alloc(4);
      payload.writeUInt32BE(value);
      return payload;
    };
    peer.write(request(1, { method: 'Fill', payload: size(maxDataLength - envelope) }));
    expect((await peer.next()).data).toHaveLength(maxDataLength);
    peer.write(request(3, { method: 'Fill', payload: size(maxDataLength - envelope + 1) }));
    expect(read(await peer.next())).toBe(
      'ResourceExhausted: response of 4194305 bytes is over the maximum message size of 4194304',
    );
    const overhead = request(1, { method: 'Size', payload: Buffer.alloc(1 << 21) }).length - 10 - (1 << 21);
    const whole = request(5, { method: 'Size', payload: Buffer.alloc(maxDataLength - overhead) });
    expect(whole.readUInt32BE(0)).toBe(maxDataLength);
    peer.write(whole);
    expect(Buffer.from(read(await peer.next()), 'hex').toString()).toBe(String(maxDataLength - overhead));
  });

  it('ignores frames of unknown types and Responses, whatever their size and id', async () => {
    const peer = connect(serverWith());
    for (const type of [0, 2, 4, 255]) {
      peer.write(
        encodeFrame({ streamId: 1, type, flags: 255 }, hello),
        encodeFrame({ streamId: 2, type, flags: 0 }, hello),
      );
      peer.write(oversizedHeader(1, type), Buffer.alloc(maxDataLength + 1));
    }
    peer.write(good(1));
    expect(read(await peer.next())).toBe(goodReply);
    expect(peer.unread).toBe(0);
  });

  it('answers a unary request that is flagged remoteClosed, and refuses one whose arguments would follow', async () => {
    const peer = connect(serverWith());
    peer.write(request(1, { payload: hello }, 0x01), request(3, { payload: hello }, 0x02), good(5));
    expect((await peer.take(3)).map((frame) => `${frame.streamId} ${read(frame)}`).sort()).toEqual([
      `1 ${goodReply}`,
      '3 InvalidArgument: method Echo is unary: it takes no stream of requests',
      `5 ${goodReply}`,
    ]);
  });

  it('refuses stream data for streams that are not open, and goes on', async () => {
    const peer = connect(serverWith());
    peer.write(encodeFrame({ streamId: 1, type: messageType.data, flags: 0 }, hello));
    peer.write(encodeFrame({ streamId: 2, type: messageType.data, flags: 5 }, Buffer.alloc(0)), good(3));
    expect((await peer.take(3)).map(read)).toEqual([
      'InvalidArgument: StreamID is no longer active',
      'InvalidArgument: StreamID must be odd for client initiated streams',
      goodReply,
    ]);
  });

  it('lets a client close its side of an open call, but ends the call when it sends data', async () => {
    const { handler, calls } = openCalls();
    const peer = connect(serverWith({ Wait: handler }));
    peer.write(request(1, { method: 'Wait' }));
    peer.write(encodeFrame({ streamId: 1, type: messageType.data, flags: 0x05 }, Buffer.alloc(0)), good(3));
    expect((await peer.next()).streamId).toBe(3);
    expect(calls[0]?.context.signal.aborted).toBe(false);
    peer.write(encodeFrame({ streamId: 1, type: messageType.data, flags: 0 }, hello), good(5));
    const [refused, next] = await peer.take(2);
    expect(refused?.streamId).toBe(1);
    expect(refused && read(refused)).toMatch(/^InvalidArgument: data handling error/);
    expect(next?.streamId).toBe(5);
    expect(calls[0]?.context.signal.reason).toMatchObject({ code: 3 });
  });

  it('aborts a call’s signal when its timeout passes, and answers DeadlineExceeded for an AbortError', async () => {
    const methods: Record<string, Handler> = {
      Throws: async (_, { signal }) => {
        await once(signal, 'abort');
        signal.throwIfAborted();
        return hello;
      },
      Aborts: async (_, { signal }) => {
        await once(new EventTarget(), 'never', { signal });
        return hello;
      },
      Ignores: async (_, { signal }) => {
        await once(signal, 'abort');
        return hello;
      },
    };
    const peer = connect(serverWith(methods));
    for (const [index, method] of Object.keys(methods).entries()) {
      peer.write(request(index * 2 + 1, { method, timeoutMs: 5 }));
    }
    const replies = (await peer.take(3)).sort((a, b) => a.streamId - b.streamId).map(read);
    const late = "DeadlineExceeded: the request's timeout of 5 ms passed";
    expect(replies).toEqual([late, late, goodReply]);
  });

  it('does not start a call whose timeout has passed', async () => {
    let ran = false;
    const method: Handler = async () => {
      ran = true;
      return hello;
    };
    const peer = connect(serverWith({ Late: method }));
    peer.write(request(1, { method: 'Late', timeoutMs: -1 }));
    expect(read(await peer.next())).toMatch(/^DeadlineExceeded/);
    expect(ran).toBe(false);
  });

  it('refuses more requests in progress than allowed, and takes new ones when others have finished', async () => {
    const { handler, calls } = openCalls();
    const peer = connect(serverWith({ Wait: handler }, { maxConcurrentRequests: 2 }));
    peer.write(request(1, { method: 'Wait' }), request(3, { method: 'Wait' }), good(5));
    expect(read(await peer.next())).toBe('ResourceExhausted: 2 requests are in progress already');
    calls[0]?.answer(hello);
    expect((await peer.next()).streamId).toBe(1);
    peer.write(good(7));
    expect(read(await peer.next())).toBe(goodReply);
  });
});
