/**
 * At least 100,000 generated cases, with a fixed seed, so that a failure comes again. A case is one whole connection
 * (or one byte stream for the decoder). After every case the same server must answer a good request on a fresh
 * connection, and on the same one wherever the protocol lets the connection go on.
 */
import { duplexPair } from 'node:stream';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  type DecodedFrame,
  encodeFrame,
  encodeRequest,
  FrameDecoder,
  headerLength,
  maxDataLength,
  messageType,
  TtrpcClient,
  TtrpcError,
  TtrpcServer,
} from '../../../src/rpc/ttrpc/index.ts';
import { chop, connect, type RawPeer, read, request } from './ttrpc-support.ts';

const seed = 0x6b696c6e;
/** Zeros to fill oversized frames with; written by reference, so that they cost no copying. */
const zeros = Buffer.alloc(maxDataLength + 256);
const collectGarbage = (() => {
  setFlagsFromString('--expose-gc');
  return runInNewContext('gc') as () => void;
})();

let cases = 0;
let connections = 0;
const rejections: unknown[] = [];
const onRejection = (reason: unknown): void => {
  rejections.push(reason);
};

const server = new TtrpcServer(
  {
    'test.Echo': {
      Echo: async (payload) => payload,
      Empty: async () => new Uint8Array(),
      Later: async (payload) => {
        await new Promise(setImmediate);
        return payload;
      },
      Fail: async () => {
        throw new TtrpcError(9, 'as asked');
      },
      Throw: () => {
        throw new RangeError('thrown');
      },
      Open: (_, { signal }) =>
        new Promise((_resolve, reject) => signal.addEventListener('abort', () => reject(signal.reason))),
    },
  },
  {
    onConnection: () => {
      connections += 1;
    },
    onClose: () => {
      connections -= 1;
    },
  },
);

beforeAll(() => void process.on('unhandledRejection', onRejection));
afterAll(async () => {
  process.off('unhandledRejection', onRejection);
  await server.close(0);
});

const bytes = (maxLength: number) => fc.uint8Array({ maxLength }).map((array) => Buffer.from(array));
const uint32 = fc.oneof(fc.integer({ min: 0, max: 9 }), fc.integer({ min: 0, max: 0xffff_ffff }));
const chunkSizes = fc.array(fc.oneof(fc.integer({ min: 1, max: 12 }), fc.integer({ min: 1, max: 300 })), {
  minLength: 1,
  maxLength: 5,
});

/** Cuts small pieces at random; the huge fillings of oversized frames go whole. */
function cut(pieces: readonly Buffer[], sizes: readonly number[]): Buffer[] {
  return pieces.flatMap((piece) => (piece.length > 65_536 ? [piece] : [...chop(piece, sizes)]));
}

function oversized(streamId: number, type: number, flags: number, excess: number): Buffer[] {
  const header = encodeFrame({ streamId, type, flags }, Buffer.alloc(0));
  header.writeUInt32BE(maxDataLength + excess, 0);
  return [header, zeros.subarray(0, maxDataLength + excess)];
}

async function answersGoodRequest(peer: RawPeer, streamId: number): Promise<void> {
  peer.write(request(streamId, { payload: Buffer.from('good') }));
  for (;;) {
    const frame = await peer.next();
    if (frame.streamId === streamId) {
      if (read(frame) !== Buffer.from('good').toString('hex')) throw new Error(`bad answer: ${read(frame)}`);
      return;
    }
  }
}

async function stillServes(): Promise<void> {
  const peer = connect(server);
  await answersGoodRequest(peer, 1);
  peer.socket.end();
  await peer.ended;
}

/** Plays bytes to the server on a connection of their own, ends it, and checks that others are still served. */
async function survives(pieces: readonly Buffer[], sizes: readonly number[]): Promise<void> {
  cases += 1;
  const peer = connect(server);
  peer.write(...cut(pieces, sizes));
  peer.socket.end();
  await peer.ended;
  await stillServes();
}

const frame = fc.record({ streamId: uint32, type: fc.nat(255), flags: fc.nat(255), data: bytes(80) });

describe('ttrpc under generated input', () => {
  it('decodes any frames from any split, oversized ones among them (25,000 cases)', () => {
    const item = fc.oneof(
      { weight: 9, arbitrary: frame.map((value) => ({ ...value, excess: 0 })) },
      {
        weight: 1,
        arbitrary: fc.tuple(frame, fc.integer({ min: 1, max: 256 })).map(([value, excess]) => ({ ...value, excess })),
      },
    );
    fc.assert(
      fc.property(fc.array(item, { maxLength: 6 }), chunkSizes, (items, sizes) => {
        cases += 1;
        const expected = items.map(({ streamId, type, flags, data, excess }): DecodedFrame => {
          const header = { streamId, type, flags };
          return excess > 0
            ? { kind: 'oversized', ...header, length: maxDataLength + excess }
            : { kind: 'frame', ...header, data };
        });
        const pieces = items.flatMap(({ streamId, type, flags, data, excess }) =>
          excess > 0 ? oversized(streamId, type, flags, excess) : [encodeFrame({ streamId, type, flags }, data)],
        );
        const decoder = new FrameDecoder();
        const decoded = cut(pieces, sizes).flatMap((chunk) => decoder.push(chunk));
        return !decoder.midFrame && sameFrames(decoded, expected);
      }),
      { seed, numRuns: 25_000 },
    );
  });

  it('decodes garbage the same way however it is split, and never hoards memory (25,000 cases)', () => {
    fc.assert(
      fc.property(bytes(200), fc.boolean(), chunkSizes, (garbage, small, sizes) => {
        cases += 1;
        // Small lengths make frames of the garbage; without them almost all of it is one oversized frame.
        if (small) for (let at = 0; at < garbage.length; at += 17) garbage[at] = 0;
        const decoder = new FrameDecoder();
        const split = [...chop(garbage, sizes)].flatMap((chunk) => decoder.push(chunk));
        return decoder.bufferedBytes <= 65_536 && sameFrames(split, new FrameDecoder().push(garbage));
      }),
      { seed, numRuns: 25_000 },
    );
  });

  it('keeps serving after garbage (15,000 cases)', async () => {
    await fc.assert(
      fc.asyncProperty(bytes(120), fc.boolean(), chunkSizes, async (garbage, framed, sizes) => {
        // Framed garbage gets through to the protobuf decoder.
        const header = { streamId: 1, type: messageType.request, flags: 0 };
        await survives([framed ? encodeFrame(header, garbage) : garbage], sizes);
      }),
      { seed, numRuns: 15_000 },
    );
  });

  it('keeps serving after valid frames with flipped, lost, added and cut bytes (20,000 cases)', async () => {
    const edit = fc.record({ kind: fc.constantFrom('flip', 'drop', 'add', 'cut'), at: fc.nat(400), byte: fc.nat(255) });
    const method = fc.constantFrom('Echo', 'Empty', 'Later', 'Fail', 'Throw', 'Open', 'None');
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.tuple(method, bytes(30)), { minLength: 1, maxLength: 3 }),
        fc.array(edit, { minLength: 1, maxLength: 4 }),
        chunkSizes,
        async (calls, edits, sizes) => {
          const frames = calls.map(([name, payload], index) => {
            const metadata = new Map([['k', 'v']]);
            return request(index * 2 + 1, { method: name, payload, timeoutMs: 60_000, metadata });
          });
          let stream: Buffer = Buffer.concat(frames);
          for (const { kind, at, byte } of edits) {
            const position = at % (stream.length + 1);
            const before = stream.subarray(0, position);
            if (kind === 'flip' && position < stream.length) stream[position] = byte;
            else if (kind === 'drop') stream = Buffer.concat([before, stream.subarray(position + 1)]);
            else if (kind === 'add') stream = Buffer.concat([before, Buffer.from([byte]), stream.subarray(position)]);
            else if (kind === 'cut') stream = Buffer.from(before);
          }
          await survives([stream], sizes);
        },
      ),
      { seed, numRuns: 20_000 },
    );
  });

  it('answers each stream of a mixed connection as the protocol says, and goes on (15,000 cases)', async () => {
    type Step = { readonly kind: string; readonly payload: Buffer; readonly excess: number; readonly name: string };
    const step: fc.Arbitrary<Step> = fc.record({
      kind: fc.constantFrom(
        ...['echo', 'echo', 'later', 'fail', 'throw', 'empty', 'open', 'service', 'method', 'malformed', 'even'],
        ...['reused', 'data', 'unknown-type', 'response', 'oversized', 'remote-open'],
      ),
      payload: bytes(40),
      excess: fc.integer({ min: 1, max: 256 }),
      name: fc.string({ maxLength: 12 }).map((text) => `x${text}`),
    });
    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 1, maxLength: 8 }), chunkSizes, async (steps, sizes) => {
        cases += 1;
        const pieces: Buffer[] = [];
        const expected: string[] = [];
        // Stream 1 is answered before the steps, so that its id is there to be reused.
        const peer = connect(server);
        await answersGoodRequest(peer, 1);
        for (const [index, { kind, payload, excess, name }] of steps.entries()) {
          const id = index * 2 + 3;
          const frameOf = (type: number, streamId = id): Buffer => encodeFrame({ streamId, type, flags: 0 }, payload);
          const send = (piece: Buffer | Buffer[], ...answers: string[]): void => {
            pieces.push(...(Array.isArray(piece) ? piece : [piece]));
            expected.push(...answers);
          };
          switch (kind) {
            case 'echo':
              send(request(id, { payload }), `${id} ${payload.toString('hex')}`);
              break;
            case 'later':
              send(request(id, { method: 'Later', payload }), `${id} ${payload.toString('hex')}`);
              break;
            case 'fail':
              send(request(id, { method: 'Fail' }), `${id} FailedPrecondition: as asked`);
              break;
            case 'throw':
              send(request(id, { method: 'Throw' }), `${id} Unknown: thrown`);
              break;
            case 'empty':
              send(request(id, { method: 'Empty', payload }), `${id} `);
              break;
            case 'open':
              send(request(id, { method: 'Open', payload }));
              break;
            case 'service':
              send(request(id, { service: name }), `${id} Unimplemented: service ${name}`);
              break;
            case 'method':
              send(request(id, { method: name }), `${id} Unimplemented: method ${name}`);
              break;
            case 'malformed':
              send(encodeFrame({ streamId: id, type: 1, flags: 0 }, Buffer.from([0])), `${id} InvalidArgument: …`);
              break;
            case 'even':
              send(frameOf(messageType.request, id + 1), `${id + 1} InvalidArgument: …`);
              break;
            case 'reused':
              send(frameOf(messageType.request, 1), '1 InvalidArgument: …');
              break;
            case 'data':
              send(frameOf(messageType.data), `${id} InvalidArgument: …`);
              break;
            case 'unknown-type':
              send(frameOf(4 + (excess % 250)));
              break;
            case 'response':
              send(frameOf(messageType.response));
              break;
            case 'oversized':
              send(oversized(id, 1, 0, excess), `${id} ResourceExhausted: …`);
              break;
            case 'remote-open':
              send(request(id, { payload }, 2), `${id} InvalidArgument: …`);
              break;
          }
        }
        peer.write(...cut(pieces, sizes));
        const answers = (await peer.take(expected.length)).map((answer) => {
          const text = read(answer).replace(/^(InvalidArgument|ResourceExhausted): .*/s, '$1: …');
          return `${answer.streamId} ${text}`;
        });
        // Order between streams is free.
        if (answers.sort().join('\n') !== expected.sort().join('\n')) {
          throw new Error(`got\n${answers.join('\n')}\nexpected\n${expected.join('\n')}`);
        }
        await answersGoodRequest(peer, 1001);
        if (peer.unread > 0) throw new Error(`${peer.unread} frames too many`);
        peer.socket.end();
        await peer.ended;
        await stillServes();
      }),
      { seed, numRuns: 15_000 },
    );
  });

  it('gives every caller its own reply in any interleaving, or an error when the server talks nonsense (10,000 cases)', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.nat(1000), { minLength: 1, maxLength: 6 }),
        fc.option(bytes(60), { nil: undefined }),
        chunkSizes,
        async (order, nonsense, sizes) => {
          cases += 1;
          const [near, far] = duplexPair();
          const client = new TtrpcClient(near);
          far.resume();
          const calls = order.map((_, index) => client.call('a.B', 'C', Buffer.from([index])));
          const settled = Promise.allSettled(calls);
          const replies = order
            .map((rank, index) => ({ rank, streamId: index * 2 + 1 }))
            .sort((a, b) => a.rank - b.rank)
            .map(({ streamId }) => {
              const data = Buffer.from([0x12, 4, 0, 0, 0, streamId]);
              return encodeFrame({ streamId, type: messageType.response, flags: 0 }, data);
            });
          if (nonsense !== undefined) replies.splice((order[0] ?? 0) % replies.length, 0, nonsense);
          for (const chunk of cut([Buffer.concat(replies)], sizes)) far.write(chunk);
          far.end();
          for (const [index, outcome] of (await settled).entries()) {
            if (outcome.status === 'rejected') {
              if (nonsense === undefined) throw outcome.reason;
              if (!(outcome.reason instanceof TtrpcError)) throw outcome.reason;
            } else if (nonsense === undefined && outcome.value.readUInt32BE(0) !== index * 2 + 1) {
              throw new Error(`call ${index} got the reply ${outcome.value.toString('hex')}`);
            }
          }
          await client.closed;
        },
      ),
      { seed, numRuns: 10_000 },
    );
  });

  it('does not grow while it is fed the same nonsense again and again (5,000 cases)', async () => {
    const deep = encodeFrame({ streamId: 1, type: 1, flags: 0 }, Buffer.alloc(4096, 0x0b));
    const announced = Buffer.from('00400000000000010100', 'hex');
    const open = encodeRequest({ service: 'test.Echo', method: 'Open', payload: Buffer.alloc(0), timeoutMs: 60_000 });
    const unfinished = Buffer.concat([encodeFrame({ streamId: 3, type: 1, flags: 0 }, open), announced]);
    const round = async (): Promise<void> => {
      for (const pieces of [[deep], [unfinished, Buffer.alloc(headerLength)], oversized(1, 1, 0, 1), [announced]]) {
        await survives(pieces, [1024]);
      }
    };
    for (let count = 0; count < 50; count += 1) await round();
    const before = await memoryInUse();
    for (let count = 0; count < 1200; count += 1) await round();
    const grown = (await memoryInUse()) - before;
    expect(grown / 2 ** 20).toBeLessThan(1);
    await new Promise(setImmediate);
    expect([server.connectionCount, connections]).toEqual([0, 0]);
  });

  it('has run at least 100,000 cases without one unhandled rejection', () => {
    expect(cases).toBeGreaterThanOrEqual(100_000);
    expect(rejections).toEqual([]);
  });
});

/**
 * Bytes that are still referred to. One collection does not tell: buffers that it found dead are freed, and counted out,
 * by a thread that may be late on a busy machine; the next collection waits for it. And what a stream lets go of in a
 * later turn of the loop is not dead yet. So the least of several counts.
 */
async function memoryInUse(): Promise<number> {
  let least = Number.POSITIVE_INFINITY;
  for (let count = 0; count < 5; count += 1) {
    await new Promise(setImmediate);
    collectGarbage();
    const { heapUsed, arrayBuffers } = process.memoryUsage();
    least = Math.min(least, heapUsed + arrayBuffers);
  }
  return least;
}

function sameFrames(actual: readonly DecodedFrame[], expected: readonly DecodedFrame[]): boolean {
  return (
    actual.length === expected.length &&
    actual.every((one, index) => {
      const other = expected[index];
      if (other === undefined) return false;
      const sameHeader = one.streamId === other.streamId && one.type === other.type && one.flags === other.flags;
      if (one.kind === 'frame' && other.kind === 'frame') return sameHeader && one.data.equals(other.data);
      return sameHeader && one.kind === 'oversized' && other.kind === 'oversized' && one.length === other.length;
    })
  );
}
