/** DNS messages on a TCP connection: each behind two bytes with its length. RFC 1035, 4.2.2 */

const PREFIX_SIZE = 2;

/** The longest message: what the prefix has room for. */
export const maxDnsMessage = 0xffff;

/** A header alone: RFC 1035, 4.1.1. */
export const minDnsMessage = 12;

/** A message behind its length. @param message at most `maxDnsMessage` bytes */
export function frameDnsMessage(message: Buffer): Buffer {
  const frame = Buffer.allocUnsafe(PREFIX_SIZE + message.length);
  frame.writeUInt16BE(message.length);
  frame.set(message, PREFIX_SIZE);
  return frame;
}

/** Takes what comes on a connection apart into messages. It holds less than one of them, and what came last. */
export class DnsMessages {
  #parts: Buffer[] = [];
  #size = 0;
  /** As far as is known, how many bytes make a message complete. */
  #needed = PREFIX_SIZE;

  /** The messages that are complete now. */
  push(data: Buffer): Buffer[] {
    this.#parts.push(data);
    this.#size += data.length;
    if (this.#size < this.#needed) return [];
    const messages: Buffer[] = [];
    let rest = Buffer.concat(this.#parts);
    for (;;) {
      this.#needed = PREFIX_SIZE + (rest.length < PREFIX_SIZE ? 0 : rest.readUInt16BE());
      if (rest.length < this.#needed) break;
      messages.push(rest.subarray(PREFIX_SIZE, this.#needed));
      rest = rest.subarray(this.#needed);
    }
    this.#parts = [rest];
    this.#size = rest.length;
    return messages;
  }
}
