import fc from 'fast-check';
import { expect, it } from 'vitest';
import { chunkSize } from '../../../agent/output.ts';
import { encodeOutput } from '../../../agent/service.ts';
import { ReadOutputResponse } from '../../../gen/kiln/agent/v1/agent.ts';

it('encodes output as protobuf does, whatever its length', () => {
  const check = (length: number) => {
    const data = Buffer.alloc(length, length);
    expect(ReadOutputResponse.decode(encodeOutput({ data })).data.equals(data)).toBe(true);
    expect(encodeOutput({ data }).equals(Buffer.from(ReadOutputResponse.encode({ data }).finish()))).toBe(true);
  };
  for (const length of [1, 127, 128, 16383, 16384, chunkSize]) check(length);
  fc.assert(fc.property(fc.integer({ min: 1, max: chunkSize }), check), { seed: 1 });
});
