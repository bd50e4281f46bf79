/**
 * A socket of rtnetlink(7), by which the kernel's links, addresses, routes, neighbours and traffic control are read and
 * changed. It is of the network namespace in which its thread was when it was made, for as long as it lives.
 *
 * The kernel does what it is asked for while it is sent, and its answer is there when send(2) returns. So nothing here waits for
 * an answer.
 */
import { closeSync } from 'node:fs';
import { SysError } from '../error.ts';
import { check, declare } from '../libc.ts';
import {
  decodeAttributes,
  decodeMessages,
  decodeText,
  encodeRequest,
  HEADER_SIZE,
  type Message,
  NLM_F_ACK,
  NLM_F_DUMP,
  NLM_F_DUMP_INTR,
  NLMSG_DONE,
  NLMSG_ERROR,
} from './message.ts';

/** bits/socket.h and linux/netlink.h. */
const AF_NETLINK = 16;
const SOCK_RAW = 3;
const SOCK_CLOEXEC = 0o2000000;
const NETLINK_ROUTE = 0;
const SOL_NETLINK = 270;
const NETLINK_EXT_ACK = 11;
const NETLINK_GET_STRICT_CHK = 12;

/** In the flags of an NLMSG_ERROR: attributes follow, and the request is not quoted in full. linux/netlink.h */
const NLM_F_CAPPED = 0x100;
const NLM_F_ACK_TLVS = 0x200;
const NLMSGERR_ATTR_MSG = 1;

/** What a dump gives at a time is at most 32 KiB (net/netlink/af_netlink.c). */
const RECEIVE_SIZE = 64 * 1024;

/** How often a dump is begun again that was disturbed by a change. */
const DUMP_TRIES = 10;

const cSocket = declare<[domain: number, type: number, protocol: number]>(
  'int socket(int domain, int type, int protocol)',
);
const cSetsockopt = declare<[fd: number, level: number, name: number, value: Uint8Array, length: number]>(
  'int setsockopt(int sockfd, int level, int optname, const uint8_t *optval, unsigned int optlen)',
);
const cSend = declare<[fd: number, bytes: Uint8Array, length: number, flags: number]>(
  'long send(int sockfd, const uint8_t *buf, size_t len, int flags)',
);
const cRecv = declare<[fd: number, bytes: Uint8Array, length: number, flags: number]>(
  'long recv(int sockfd, uint8_t *buf, size_t len, int flags)',
);

export class RtnetlinkSocket implements Disposable {
  readonly #fd: number;
  #sequence = 0;
  #closed = false;

  /** @throws SysError */
  constructor() {
    this.#fd = check(cSocket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE), 'socket', 'AF_NETLINK');
    const on = Buffer.from([1, 0, 0, 0]);
    // Older kernels have neither: then errors come without words, and dumps with more than was asked for.
    for (const option of [NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK]) {
      cSetsockopt(this.#fd, SOL_NETLINK, option, on, on.length);
    }
  }

  /**
   * Has the kernel do something.
   *
   * @param what for errors: "RTM_NEWADDR 10.0.0.2/24"
   * @throws SysError with the kernel's own words, if it has any
   */
  request(what: string, type: number, flags: number, ...parts: readonly Buffer[]): void {
    this.#send(what, type, flags | NLM_F_ACK, parts);
    this.#receiveAck(what);
  }

  /**
   * As `request`, on a thread of libuv's pool, for what takes the kernel long. Until then the socket is to be asked for nothing
   * else, and not closed.
   */
  async requestAside(what: string, type: number, flags: number, ...parts: readonly Buffer[]): Promise<void> {
    const request = this.#encode(type, flags | NLM_F_ACK, parts);
    await cSend.promise('send', what, this.#fd, request, request.length, 0);
    this.#receiveAck(what);
  }

  #receiveAck(what: string): void {
    for (;;) {
      for (const message of this.#receive(what)) {
        if (message.type !== NLMSG_ERROR) continue;
        throwIfError(message, what);
        return;
      }
    }
  }

  /** All that there is of something. The answers' payloads, of messages of the type `answer`. @throws SysError */
  dump(what: string, type: number, answer: number, ...parts: readonly Buffer[]): Buffer[] {
    for (let attempt = 1; ; attempt++) {
      this.#send(what, type, NLM_F_DUMP, parts);
      const { payloads, disturbed } = this.#receiveAll(what, answer);
      if (!disturbed || attempt === DUMP_TRIES) return payloads;
    }
  }

  #receiveAll(what: string, answer: number): { payloads: Buffer[]; disturbed: boolean } {
    const payloads: Buffer[] = [];
    let disturbed = false;
    for (;;) {
      for (const message of this.#receive(what)) {
        if ((message.flags & NLM_F_DUMP_INTR) !== 0) disturbed = true;
        if (message.type === NLMSG_ERROR) throwIfError(message, what);
        if (message.type === NLMSG_DONE) return { payloads, disturbed };
        if (message.type === answer) payloads.push(message.payload);
      }
    }
  }

  #encode(type: number, flags: number, parts: readonly Buffer[]): Buffer {
    this.#sequence += 1;
    return encodeRequest(type, flags, this.#sequence, ...parts);
  }

  #send(what: string, type: number, flags: number, parts: readonly Buffer[]): void {
    const request = this.#encode(type, flags, parts);
    check(cSend(this.#fd, request, request.length, 0), 'send', what);
  }

  #receive(what: string): Message[] {
    const buffer = Buffer.allocUnsafeSlow(RECEIVE_SIZE);
    const length = check(cRecv(this.#fd, buffer, buffer.length, 0), 'recv', what);
    return decodeMessages(buffer.subarray(0, length));
  }

  /** Safe to call twice. */
  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    closeSync(this.#fd);
  }
}

/** struct nlmsgerr: the negative errno, 0 for success, and the request's header, or all of it; then attributes. */
function throwIfError({ flags, payload }: Message, what: string): void {
  const errno = -payload.readInt32LE(0);
  if (errno === 0) return;
  let words = '';
  if ((flags & NLM_F_ACK_TLVS) !== 0) {
    const quoted = (flags & NLM_F_CAPPED) !== 0 ? HEADER_SIZE : payload.readUInt32LE(4);
    const attributes = decodeAttributes(payload.subarray(4 + ((quoted + 3) & ~3)));
    words = decodeText(attributes.get(NLMSGERR_ATTR_MSG));
  }
  throw new SysError(errno, 'rtnetlink', words === '' ? what : `${what}: ${words}`);
}
