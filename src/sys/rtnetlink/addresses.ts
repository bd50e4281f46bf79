/** IP addresses of interfaces: the RTM_*ADDR messages of rtnetlink(7). Constants: linux/if_addr.h. */
import { attribute, decodeAttributes, NLM_F_CREATE, NLM_F_REPLACE, u32 } from './message.ts';
import type { RtnetlinkSocket } from './socket.ts';

const RTM_NEWADDR = 20;
const RTM_DELADDR = 21;
const RTM_GETADDR = 22;

const IFA_ADDRESS = 1;
const IFA_LOCAL = 2;
const IFA_BROADCAST = 4;
const IFA_FLAGS = 8;

/** No duplicate address detection: the address can be used at once. */
const IFA_F_NODAD = 0x02;
/** Another machine on the link has the address, too: nobody here uses it. */
const IFA_F_DADFAILED = 0x08;

/** bits/socket.h. */
export const AF_INET = 2;
export const AF_INET6 = 10;

/** Address.scope of one that is good on its link only: linux/rtnetlink.h. */
export const RT_SCOPE_LINK = 253;

/** struct ifaddrmsg: family, prefix length, flags and scope of one byte each, index u32. */
const IFADDRMSG_SIZE = 8;

/** Addresses are their 4 or 16 bytes. */
export interface Address {
  readonly index: number;
  readonly local: Uint8Array;
  /** The other end's, where that is another one. */
  readonly peer: Uint8Array;
  readonly prefixLength: number;
  /** Empty for none. */
  readonly broadcast: Uint8Array;
  readonly scope: number;
  /** Another machine on the link has it, too. */
  readonly duplicate: boolean;
}

/** What names an address to give or to take. */
export type AddressRequest = Omit<Address, 'duplicate'>;

/** @throws SysError */
export function listAddresses(socket: RtnetlinkSocket): Address[] {
  return socket.dump('RTM_GETADDR', RTM_GETADDR, RTM_NEWADDR, Buffer.alloc(IFADDRMSG_SIZE)).map((payload) => {
    const attributes = decodeAttributes(payload.subarray(IFADDRMSG_SIZE));
    const address = attributes.get(IFA_ADDRESS) ?? Buffer.alloc(0);
    return {
      index: payload.readUInt32LE(4),
      local: attributes.get(IFA_LOCAL) ?? address,
      peer: address,
      prefixLength: payload.readUInt8(1),
      broadcast: attributes.get(IFA_BROADCAST) ?? Buffer.alloc(0),
      scope: payload.readUInt8(3),
      duplicate: ((attributes.get(IFA_FLAGS)?.readUInt32LE() ?? payload.readUInt8(2)) & IFA_F_DADFAILED) !== 0,
    };
  });
}

/** Gives an interface an address; one that it has already stays. @throws SysError */
export function addAddress(socket: RtnetlinkSocket, address: AddressRequest): void {
  const { index, local, peer, prefixLength, broadcast, scope } = address;
  const family = familyOf(local);
  const fixed = Buffer.alloc(IFADDRMSG_SIZE);
  fixed.writeUInt8(family, 0);
  fixed.writeUInt8(prefixLength, 1);
  fixed.writeUInt8(scope, 3);
  fixed.writeUInt32LE(index, 4);
  const attributes = [attribute(IFA_LOCAL, local), attribute(IFA_ADDRESS, peer)];
  if (broadcast.length > 0) attributes.push(attribute(IFA_BROADCAST, broadcast));
  if (family === AF_INET6) attributes.push(attribute(IFA_FLAGS, u32(IFA_F_NODAD)));
  const what = `RTM_NEWADDR ${formatAddress(local)}/${prefixLength} on interface ${index}`;
  socket.request(what, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, fixed, ...attributes);
}

/** Takes an address from an interface. @throws SysError EADDRNOTAVAIL where it has none such */
export function deleteAddress(socket: RtnetlinkSocket, { index, local, peer, prefixLength }: AddressRequest): void {
  const fixed = Buffer.alloc(IFADDRMSG_SIZE);
  fixed.writeUInt8(familyOf(local), 0);
  fixed.writeUInt8(prefixLength, 1);
  fixed.writeUInt32LE(index, 4);
  const what = `RTM_DELADDR ${formatAddress(local)}/${prefixLength} on interface ${index}`;
  socket.request(what, RTM_DELADDR, 0, fixed, attribute(IFA_LOCAL, local), attribute(IFA_ADDRESS, peer));
}

/** @throws RangeError for neither 4 nor 16 bytes */
export function familyOf(address: Uint8Array): number {
  if (address.length === 4) return AF_INET;
  if (address.length === 16) return AF_INET6;
  throw new RangeError(`an IP address has 4 or 16 bytes, not ${address.length}`);
}

/** "10.0.0.2", "fd00:0:0:0:0:0:0:2": for messages. */
export function formatAddress(address: Uint8Array): string {
  if (address.length === 4) return address.join('.');
  const words = Array.from({ length: address.length >> 1 }, (_, index) =>
    (((address[2 * index] ?? 0) << 8) | (address[2 * index + 1] ?? 0)).toString(16),
  );
  return words.join(':');
}
