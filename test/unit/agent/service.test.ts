import fc from 'fast-check';
import { expect, it } from 'vitest';
import { chunkSize, frameRoom } from '../../../agent/output.ts';
import { frameOutput } from '../../../agent/service.ts';
import { ReadOutputResponse } from '../../../gen/kiln/agent/v1/agent.ts';
import { framePrefix } from '../../../src/rpc/grpc/framed-message.ts';

it('frames output as protobuf and gRPC do, in place, whatever its length', () => {
  const check = (length: number) => {
    const memory = Buffer.alloc(frameRoom + length, 0xee);
    const data = memory.subarray(frameRoom).fill(length);
    const { bytes } = frameOutput(data);
    expect(bytes.buffer).toBe(data.buffer);
    expect(bytes.readUInt8(0)).toBe(0);
    expect(bytes.readUInt32BE(1)).toBe(bytes.length - framePrefix);
    const message = bytes.subarray(framePrefix);
    expect(message.equals(Buffer.from(ReadOutputResponse.encode({ data }).finish()))).toBe(true);
    expect(ReadOutputResponse.decode(message).data.equals(Buffer.alloc(length, length))).toBe(true);
  };
  for (const length of [1, 127, 128, 16383, 16384, chunkSize]) check(length);
  fc.assert(fc.property(fc.integer({ min: 1, max: chunkSize }), check), { seed: 1 });
});
