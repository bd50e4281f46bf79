/**
 * Netlink messages, netlink(7): a header (struct nlmsghdr), a fixed part that depends on the message's type, and attributes
 * (struct rtattr), each a length, a type and a value, padded to 4 bytes. Numbers are the host's, little-endian on every
 * architecture that Kiln knows, but for those that the network defines (addresses, and a few in tc's messages).
 *
 *   | length u32 | type u16 | flags u16 | sequence u32 | port u32 | fixed part | attribute | attribute | …
 *                                                                  attribute: | length u16 | type u16 | value | padding |
 */

/** struct nlmsghdr. */
export const HEADER_SIZE = 16;

/** Message types that are netlink's own. */
export const NLMSG_ERROR = 2;
export const NLMSG_DONE = 3;

export const NLM_F_REQUEST = 0x1;
export const NLM_F_ACK = 0x4;
export const NLM_F_DUMP_INTR = 0x10;
export const NLM_F_DUMP = 0x300;
export const NLM_F_REPLACE = 0x100;
export const NLM_F_EXCL = 0x200;
export const NLM_F_CREATE = 0x400;

/** In an attribute's type: its value is a list of attributes; the others are no part of the type. linux/netlink.h */
const NLA_F_NESTED = 0x8000;
const NLA_TYPE_MASK = 0x3fff;

const ATTRIBUTE_HEADER_SIZE = 4;

export interface Message {
  readonly type: number;
  readonly flags: number;
  /** What comes after the header. */
  readonly payload: Buffer;
}

function aligned(length: number): number {
  return (length + 3) & ~3;
}

/** One attribute. */
export function attribute(type: number, value: Uint8Array): Buffer {
  const length = ATTRIBUTE_HEADER_SIZE + value.length;
  const bytes = Buffer.alloc(aligned(length));
  bytes.writeUInt16LE(length, 0);
  bytes.writeUInt16LE(type, 2);
  bytes.set(value, ATTRIBUTE_HEADER_SIZE);
  return bytes;
}

/** An attribute whose value are attributes. */
export function nested(type: number, ...attributes: readonly Buffer[]): Buffer {
  return attribute(type | NLA_F_NESTED, Buffer.concat(attributes));
}

export function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}

/** A string with its NUL. */
export function text(value: string): Buffer {
  return Buffer.from(`${value}\0`);
}

/** A request as it goes to the kernel. */
export function encodeRequest(type: number, flags: number, sequence: number, ...parts: readonly Buffer[]): Buffer {
  const payload = Buffer.concat(parts);
  const header = Buffer.alloc(HEADER_SIZE);
  header.writeUInt32LE(HEADER_SIZE + payload.length, 0);
  header.writeUInt16LE(type, 4);
  header.writeUInt16LE(flags | NLM_F_REQUEST, 6);
  header.writeUInt32LE(sequence, 8);
  return Buffer.concat([header, payload]);
}

/** The messages in what one read gave. @throws RangeError for what is cut off */
export function decodeMessages(bytes: Buffer): Message[] {
  const messages: Message[] = [];
  for (let at = 0; at < bytes.length; ) {
    const length = at + HEADER_SIZE <= bytes.length ? bytes.readUInt32LE(at) : 0;
    if (length < HEADER_SIZE || at + length > bytes.length) throw new RangeError('a netlink message is cut off');
    const payload = bytes.subarray(at + HEADER_SIZE, at + length);
    messages.push({ type: bytes.readUInt16LE(at + 4), flags: bytes.readUInt16LE(at + 6), payload });
    at += aligned(length);
  }
  return messages;
}

/** Attributes by their types; of a type that comes twice the last. */
export function decodeAttributes(bytes: Buffer): Map<number, Buffer> {
  const attributes = new Map<number, Buffer>();
  for (let at = 0; at + ATTRIBUTE_HEADER_SIZE <= bytes.length; ) {
    const length = bytes.readUInt16LE(at);
    if (length < ATTRIBUTE_HEADER_SIZE || at + length > bytes.length) {
      throw new RangeError('a netlink attribute is cut off');
    }
    const type = bytes.readUInt16LE(at + 2) & NLA_TYPE_MASK;
    attributes.set(type, bytes.subarray(at + ATTRIBUTE_HEADER_SIZE, at + length));
    at += aligned(length);
  }
  return attributes;
}

/** A string without its NUL. */
export function decodeText(value: Buffer | undefined): string {
  return value === undefined ? '' : value.toString().replace(/\0.*$/s, '');
}
