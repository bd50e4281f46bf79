/** DNS messages of tests: RFC 1035, 4.1. */

/** A query for the IPv4 address of a name. */
export function dnsQuery(name: string, id = 7): Buffer {
  const labels = name.split('.').map((label) => Buffer.from([label.length, ...Buffer.from(label)]));
  return Buffer.concat([
    Buffer.from([id >> 8, id & 0xff, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]),
    ...labels,
    Buffer.from([0, 0, 1, 0, 1]),
  ]);
}

/** The answer to such a query: a record for each address. */
export function dnsAnswer(query: Buffer, addresses: readonly string[], { truncated = false } = {}): Buffer {
  const head = Buffer.from(query);
  head[2] = 0x81 | (truncated ? 0x02 : 0);
  head[3] = 0x80;
  head.writeUInt16BE(addresses.length, 6);
  const record = Buffer.from('c00c000100010000003c0004', 'hex');
  return Buffer.concat([head, ...addresses.flatMap((each) => [record, Buffer.from(each.split('.').map(Number))])]);
}
