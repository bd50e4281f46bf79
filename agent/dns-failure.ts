/** An answer that says that there is none, to a DNS query: RFC 1035, 4.1. */
import { minDnsMessage } from '../src/sys/dns-stream.ts';

const SERVFAIL = 2;

/** Bits of the header's third and fourth byte: this is a response; opcode and "recursion desired" stay the query's. */
const QR = 0x80;
const OPCODE_AND_RD = 0x79;
const RA = 0x80;

/** The longest label; above it the length's byte is something else. */
const maxLabel = 63;

/** With the query's question, without which a resolver takes no answer for one. Undefined for what is no query. */
export function dnsFailure(query: Buffer): Buffer | undefined {
  if (query.length < minDnsMessage || query.readUInt16BE(4) !== 1) return undefined;
  let end = minDnsMessage;
  for (;;) {
    const label = query[end];
    if (label === undefined || label > maxLabel) return undefined;
    end += 1 + label;
    if (label === 0) break;
  }
  // Type and class.
  end += 4;
  if (end > query.length) return undefined;
  const failure = Buffer.from(query.subarray(0, end));
  failure[2] = QR | ((failure[2] ?? 0) & OPCODE_AND_RD);
  failure[3] = RA | SERVFAIL;
  failure.fill(0, 6, minDnsMessage);
  return failure;
}
