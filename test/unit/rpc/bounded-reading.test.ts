import { randomBytes } from 'node:crypto';
import { Readable } from 'node:stream';
import { describe, expect, it } from 'vitest';
import { joinWaitingChunks, MessageDecoder } from '../../../src/rpc/grpc/bounded-reading.ts';

function framed(body: Buffer): Buffer {
  const prefix = Buffer.alloc(5);
  prefix.writeUInt32BE(body.length, 1);
  return Buffer.concat([prefix, body]);
}

describe('the message decoder', () => {
  const bodies = [0, 1, 3, 4, 5, 70_000, 0, 0, 17].map((length) => randomBytes(length));
  const wire = Buffer.concat(bodies.map(framed));

  it.each([1, 2, 3, 5, 7, 4096, 1 << 20])('finds the messages in chunks of %i bytes', (size) => {
    const decoder = new MessageDecoder(1 << 20);
    const found: Buffer[] = [];
    for (let at = 0; at < wire.length; at += size) found.push(...decoder.write(wire.subarray(at, at + size)));
    expect(found).toEqual(bodies.map(framed));
  });

  it('refuses one that is longer than the limit as soon as its length is known', () => {
    const decoder = new MessageDecoder(10);
    expect(decoder.write(framed(Buffer.alloc(10)))).toHaveLength(1);
    expect(decoder.write(Buffer.from([0, 0, 0, 0]))).toEqual([]);
    expect(() => decoder.write(Buffer.from([11]))).toThrow('a message of 11 bytes, of which 10 are allowed');
  });
});

describe('a stream whose waiting chunks are joined', () => {
  const open = () => {
    const stream = new Readable({ read() {} });
    const got: Buffer[] = [];
    stream.on('data', (chunk: Buffer) => got.push(chunk));
    joinWaitingChunks(stream);
    return { stream, got };
  };

  it('keeps few objects for many small chunks while it is paused, and gives the bytes in order', async () => {
    const { stream, got } = open();
    stream.pause();
    const bytes = randomBytes(200_000);
    let at = 0;
    // Small ones, with one in the midst that is not.
    const sizes = [...new Array(50_000).fill(1), 100_000, ...new Array(50_000).fill(1)];
    for (const size of sizes) {
      stream.push(bytes.subarray(at, at + size));
      at += size;
    }
    stream.push(null);
    stream.resume();
    await new Promise((resolve) => stream.once('end', resolve));
    expect(got.length).toBeLessThan(20);
    expect(Buffer.concat(got).equals(bytes)).toBe(true);
  });

  it('holds nothing back once it flows, also when nothing more comes', async () => {
    const { stream, got } = open();
    for (let round = 0; round < 3; round += 1) {
      stream.pause();
      for (const letter of 'abc') stream.push(Buffer.from(letter));
      stream.resume();
      await new Promise((resolve) => setImmediate(resolve));
      expect(Buffer.concat(got).toString()).toBe('abc'.repeat(round + 1));
    }
  });
});
