import fc from 'fast-check';
import { expect, it } from 'vitest';
import { chunkSize, frameRoom } from '../../../agent/output.ts';
import { frameOutput } from '../../../agent/stream-calls.ts';
import { ReadOutputResponse } from '../../../gen/kiln/agent/v1/agent.ts';
import { framePrefix } from '../../../src/rpc/grpc/framed-message.ts';

it('frames output as protobuf and gRPC do, in place, whatever its length', () => {
  const check = (length: number, stderr: boolean) => {
    const memory = Buffer.alloc(frameRoom + length, 0xee);
    const data = memory.subarray(frameRoom).fill(length);
    const { bytes } = frameOutput(data, stderr);
    expect(bytes.buffer).toBe(data.buffer);
    expect(bytes.readUInt8(0)).toBe(0);
    expect(bytes.readUInt32BE(1)).toBe(bytes.length - framePrefix);
    const message = bytes.subarray(framePrefix);
    const decoded = ReadOutputResponse.decode(message);
    expect(decoded.data.equals(Buffer.alloc(length, length))).toBe(true);
    expect(decoded).toMatchObject({ stderr, ended: false });
    // Only the order of the fields is our own.
    expect(message.length).toBe(ReadOutputResponse.encode(decoded).finish().length);
  };
  for (const length of [1, 127, 128, 16383, 16384, chunkSize])
    for (const stderr of [false, true]) check(length, stderr);
  fc.assert(fc.property(fc.integer({ min: 1, max: chunkSize }), fc.boolean(), check), { seed: 1 });
});
