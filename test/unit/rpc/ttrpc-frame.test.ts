import { describe, expect, it } from 'vitest';
import { ConnectRequest, ConnectResponse } from '../../../gen/containerd/task.ts';
import {
  decodeReply,
  decodeRequest,
  encodeFailure,
  encodeFrame,
  encodeReply,
  encodeRequest,
  FrameDecoder,
  headerLength,
  maxDataLength,
  messageType,
  statusName,
  TtrpcError,
} from '../../../src/rpc/ttrpc/index.ts';
import { chop } from './ttrpc-support.ts';

// Recorded between containerd 2.1.9 and a shim.
const connectRequest = Buffer.concat([
  Buffer.from('0000004b000000030100', 'hex'),
  Buffer.from('0a17', 'hex'),
  Buffer.from('containerd.task.v2.Task'),
  Buffer.from('1207', 'hex'),
  Buffer.from('Connect'),
  Buffer.from('1a040a02', 'hex'),
  Buffer.from('c2'),
  Buffer.from('2a210a1a', 'hex'),
  Buffer.from('containerd-namespace-ttrpc'),
  Buffer.from('1203', 'hex'),
  Buffer.from('ns1'),
]);
const connectReply = Buffer.from('0000000a0000000302001208' + '08dfb70110ebb701', 'hex');
const emptyReply = Buffer.from('00000000000000110200', 'hex');

describe('ttrpc frames', () => {
  it('reads the Connect request that containerd sends', () => {
    const [frame, ...rest] = new FrameDecoder().push(connectRequest);
    expect(rest).toEqual([]);
    expect(frame).toMatchObject({ kind: 'frame', streamId: 3, type: messageType.request, flags: 0 });
    const decoded = decodeRequest((frame as { data: Buffer }).data);
    expect(decoded).toMatchObject({ service: 'containerd.task.v2.Task', method: 'Connect', timeoutMs: undefined });
    expect([...decoded.metadata]).toEqual([['containerd-namespace-ttrpc', 'ns1']]);
    expect(ConnectRequest.decode(decoded.payload).id).toBe('c2');
  });

  it('writes the same Connect request, byte for byte', () => {
    const data = encodeRequest({
      service: 'containerd.task.v2.Task',
      method: 'Connect',
      payload: ConnectRequest.encode(ConnectRequest.create({ id: 'c2' })).finish(),
      metadata: new Map([['containerd-namespace-ttrpc', 'ns1']]),
    });
    expect(encodeFrame({ streamId: 3, type: messageType.request, flags: 0 }, data)).toEqual(connectRequest);
  });

  it('writes and reads the Connect reply, byte for byte', () => {
    const payload = ConnectResponse.encode(ConnectResponse.create({ shimPid: 23519, taskPid: 23531 })).finish();
    const frame = encodeFrame({ streamId: 3, type: messageType.response, flags: 0 }, encodeReply(payload));
    expect(frame).toEqual(connectReply);
    expect(decodeReply(connectReply.subarray(headerLength))).toEqual(Buffer.from(payload));
  });

  it('writes an empty reply as a frame of length 0', () => {
    const reply = encodeReply(Buffer.alloc(0));
    expect(encodeFrame({ streamId: 17, type: messageType.response, flags: 0 }, reply)).toEqual(emptyReply);
    expect(new FrameDecoder().push(emptyReply)).toMatchObject([{ streamId: 17, data: Buffer.alloc(0) }]);
  });

  it('decodes the same frames wherever the stream is cut in two', () => {
    const stream = Buffer.concat([connectRequest, emptyReply, connectReply]);
    const whole = new FrameDecoder().push(stream);
    expect(whole).toHaveLength(3);
    for (let cut = 0; cut <= stream.length; cut += 1) {
      const decoder = new FrameDecoder();
      const frames = [...decoder.push(stream.subarray(0, cut)), ...decoder.push(stream.subarray(cut))];
      expect(frames).toEqual(whole);
      expect(decoder.midFrame).toBe(false);
    }
  });

  it('decodes a stream that comes byte by byte, and takes a plain Uint8Array', () => {
    const stream = Buffer.concat([connectRequest, emptyReply, connectReply]);
    const decoder = new FrameDecoder();
    const frames = Array.from(chop(stream, [1]), (byte) => decoder.push(new Uint8Array(byte))).flat();
    expect(frames).toEqual(new FrameDecoder().push(stream));
  });

  it('knows that it is inside a frame from the first byte to the last', () => {
    const decoder = new FrameDecoder();
    for (const byte of chop(connectRequest.subarray(0, -1), [1])) {
      decoder.push(byte);
      expect(decoder.midFrame).toBe(true);
    }
    expect(decoder.push(connectRequest.subarray(-1))).toHaveLength(1);
    expect(decoder.midFrame).toBe(false);
  });

  it('accepts data of exactly 4 MiB, and skips one byte more without keeping it', () => {
    const decoder = new FrameDecoder();
    const full = Buffer.alloc(maxDataLength, 7);
    const frames = Array.from(chop(encodeFrame({ streamId: 1, type: 1, flags: 0 }, full), [65_536]), (chunk) =>
      decoder.push(chunk),
    ).flat();
    expect(frames).toHaveLength(1);
    expect((frames[0] as { data: Buffer }).data.equals(full)).toBe(true);

    const header = Buffer.from('00400001000000050100', 'hex');
    expect(decoder.push(header)).toEqual([
      { kind: 'oversized', streamId: 5, type: 1, flags: 0, length: maxDataLength + 1 },
    ]);
    expect(decoder.push(full)).toEqual([]);
    expect(decoder.bufferedBytes).toBe(0);
    expect(decoder.push(Buffer.concat([Buffer.from([1]), emptyReply]))).toMatchObject([{ streamId: 17 }]);
    expect(decoder.midFrame).toBe(false);
  });

  it('skips the largest length a header can announce', () => {
    const decoder = new FrameDecoder();
    expect(decoder.push(Buffer.from('ffffffff000000010100', 'hex'))).toMatchObject([{ length: 0xffff_ffff }]);
    const chunk = Buffer.alloc(1 << 26);
    for (let left = 0xffff_ffff; left > 0; left -= chunk.length) {
      expect(decoder.push(chunk.subarray(0, Math.min(left, chunk.length)))).toEqual([]);
    }
    expect(decoder.push(emptyReply)).toMatchObject([{ kind: 'frame', streamId: 17 }]);
  });

  it('reserves memory for what came, not for what was announced', () => {
    const decoder = new FrameDecoder();
    decoder.push(Buffer.from('00400000000000010100', 'hex'));
    expect(decoder.bufferedBytes).toBeLessThanOrEqual(65_536);
    decoder.push(Buffer.alloc(1 << 20));
    expect(decoder.bufferedBytes).toBeLessThanOrEqual(2 << 20);
  });

  it('refuses to encode data over 4 MiB and header fields that do not fit', () => {
    const header = { streamId: 1, type: 1, flags: 0 };
    expect(() => encodeFrame(header, Buffer.alloc(maxDataLength + 1))).toThrow(/4194305 bytes is over the limit/);
    expect(() => encodeFrame({ ...header, streamId: 2 ** 32 }, Buffer.alloc(0))).toThrow(RangeError);
    expect(() => encodeFrame({ ...header, type: 256 }, Buffer.alloc(0))).toThrow(RangeError);
  });
});

describe('ttrpc envelopes', () => {
  const bare = { service: 's', method: 'm', payload: Buffer.alloc(0) };

  it('carries a timeout as nanoseconds and reads it rounded up to ms', () => {
    expect(decodeRequest(encodeRequest({ ...bare, timeoutMs: 1500 })).timeoutMs).toBe(1500);
    expect(decodeRequest(encodeRequest({ ...bare, timeoutMs: 0.2 })).timeoutMs).toBe(1);
    expect(decodeRequest(encodeRequest(bare)).timeoutMs).toBeUndefined();
    expect(decodeRequest(encodeRequest({ ...bare, timeoutMs: -5 })).timeoutMs).toBe(0);
    // 1 999 999 999 ns, as containerd sends State; -1 ns; 2^62 ns, longer than a timer can be.
    expect(decodeRequest(Buffer.from('20ffa7d6b907', 'hex')).timeoutMs).toBe(2000);
    expect(decodeRequest(Buffer.from('20ffffffffffffffffff01', 'hex')).timeoutMs).toBe(0);
    expect(decodeRequest(Buffer.from('20808080808080808040', 'hex')).timeoutMs).toBeUndefined();
  });

  it('keeps the first value of a metadata key that comes twice', () => {
    const twice = Buffer.from('2a060a016b120131' + '2a060a016b120132', 'hex');
    expect([...decodeRequest(twice).metadata]).toEqual([['k', '1']]);
  });

  it('skips unknown fields', () => {
    expect(decodeRequest(Buffer.concat([encodeRequest(bare), Buffer.from('7a0161f80101', 'hex')])).method).toBe('m');
  });

  it.each([
    ['a zero tag', '00'],
    ['a string that ends too early', '0a05616263'],
    ['a stray end of group', '0c'],
    ['a group that never ends', '0b'],
    ['a wire type that does not exist', '0f'],
    ['a varint that never ends', '20ffffffffffffffffffffff'],
    ['a metadata entry that ends too early', '2a040a056b'],
  ])('refuses a Request with %s', (_, hex) => {
    expect(() => decodeRequest(Buffer.from(hex, 'hex'))).toThrow(
      expect.objectContaining({ code: 3, message: expect.stringContaining('unmarshal request error: ') }),
    );
  });

  it('refuses groups nested four million deep without overflowing the stack', () => {
    expect(() => decodeRequest(Buffer.alloc(maxDataLength, 0x0b))).toThrow(TtrpcError);
  });

  it('carries a failure as code and message, and names the codes as Go does', () => {
    const failure = encodeFailure({ code: 5, message: 'container c2 not found' });
    expect(Buffer.from(failure)).toEqual(
      Buffer.concat([Buffer.from('0a1a08051216', 'hex'), Buffer.from('container c2 not found')]),
    );
    expect(() => decodeReply(failure)).toThrow(
      expect.objectContaining({ code: 5, codeName: 'NotFound', message: 'container c2 not found' }),
    );
    expect(statusName(8)).toBe('ResourceExhausted');
    expect(statusName(99)).toBe('Code(99)');
    expect(() => decodeReply(Buffer.from([0]))).toThrow(expect.objectContaining({ code: 13 }));
  });
});
