import { expect, it } from 'vitest';
import { dnsFailure } from '../../../agent/dns-failure.ts';
import { dnsQuery } from '../../support/dns.ts';

it('says SERVFAIL to the question of a query, without what else was in it', () => {
  const query = dnsQuery('www.name.test', 0x1234);
  // With a record for EDNS.
  const extended = Buffer.concat([query, Buffer.from('0000291000000000000000', 'hex')]);
  extended.writeUInt16BE(1, 10);
  const expected = Buffer.from(query);
  expected.writeUInt16BE(0x8182, 2);
  expect(dnsFailure(query)).toEqual(expected);
  expect(dnsFailure(extended)).toEqual(expected);
});

it.each([
  ['a header alone', Buffer.alloc(12)],
  ['less than a header', Buffer.alloc(3)],
  ['two questions', Buffer.from(dnsQuery('a.test')).fill(2, 5, 6)],
  ['a question that is cut', dnsQuery('a.test').subarray(0, -1)],
  ['a name that is cut', dnsQuery('a.test').subarray(0, 14)],
  ['a compressed name', Buffer.from(dnsQuery('a.test')).fill(0xc0, 12, 13)],
])('says nothing to %s', (_what, message) => {
  expect(dnsFailure(message)).toBeUndefined();
});
