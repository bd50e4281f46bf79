import { expect, it } from 'vitest';
import { DnsMessages, frameDnsMessage, maxDnsMessage } from '../../../src/sys/dns-stream.ts';

it('takes a stream apart into the messages that it was made of, however it is cut', () => {
  const messages = [Buffer.from('one'), Buffer.alloc(0), Buffer.alloc(maxDnsMessage, 'x'), Buffer.from('last')];
  const stream = Buffer.concat(messages.map(frameDnsMessage));
  for (const size of [1, 2, 3, 1000, stream.length]) {
    const parser = new DnsMessages();
    const found: Buffer[] = [];
    for (let at = 0; at < stream.length; at += size) found.push(...parser.push(stream.subarray(at, at + size)));
    expect(found.map(String)).toEqual(messages.map(String));
  }
});

it('gives nothing of a message that is not complete', () => {
  const parser = new DnsMessages();
  expect(parser.push(Buffer.from([0]))).toEqual([]);
  expect(parser.push(Buffer.from([3, 97, 98]))).toEqual([]);
  expect(parser.push(Buffer.from('c'))).toEqual([Buffer.from('abc')]);
});
