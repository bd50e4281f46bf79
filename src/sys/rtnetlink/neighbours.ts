/** Neighbours (ARP, NDP): the RTM_*NEIGH messages of rtnetlink(7). Constants: linux/neighbour.h. */
import { familyOf, formatAddress } from './addresses.ts';
import { formatMac, parseMac } from './links.ts';
import { attribute, decodeAttributes, NLM_F_CREATE, NLM_F_REPLACE } from './message.ts';
import type { RtnetlinkSocket } from './socket.ts';

const RTM_NEWNEIGH = 28;
const RTM_DELNEIGH = 29;
const RTM_GETNEIGH = 30;

const NDA_DST = 1;
const NDA_LLADDR = 2;

/** Neighbour.state of one that somebody has set, and that does not expire. */
export const NUD_PERMANENT = 0x80;

/** struct ndmsg: family, 3 bytes of padding, index i32, state u16, flags u8, type u8. */
const NDMSG_SIZE = 12;

export interface Neighbour {
  readonly index: number;
  readonly address: Uint8Array;
  readonly mac: string;
  readonly state: number;
}

/** @throws SysError */
export function listNeighbours(socket: RtnetlinkSocket): Neighbour[] {
  return socket.dump('RTM_GETNEIGH', RTM_GETNEIGH, RTM_NEWNEIGH, Buffer.alloc(NDMSG_SIZE)).map((payload) => {
    const attributes = decodeAttributes(payload.subarray(NDMSG_SIZE));
    return {
      index: payload.readInt32LE(4),
      address: attributes.get(NDA_DST) ?? Buffer.alloc(0),
      mac: formatMac(attributes.get(NDA_LLADDR) ?? Buffer.alloc(0)),
      state: payload.readUInt16LE(8),
    };
  });
}

/** Sets one that does not expire. @throws SysError */
export function setNeighbour(socket: RtnetlinkSocket, { index, address, mac }: Omit<Neighbour, 'state'>): void {
  const fixed = Buffer.alloc(NDMSG_SIZE);
  fixed.writeUInt8(familyOf(address), 0);
  fixed.writeInt32LE(index, 4);
  fixed.writeUInt16LE(NUD_PERMANENT, 8);
  const what = `RTM_NEWNEIGH ${formatAddress(address)} is ${mac}`;
  const attributes = [attribute(NDA_DST, address), attribute(NDA_LLADDR, parseMac(mac))];
  socket.request(what, RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, fixed, ...attributes);
}

/** @throws SysError ENOENT where there is none such */
export function deleteNeighbour(
  socket: RtnetlinkSocket,
  { index, address }: Pick<Neighbour, 'index' | 'address'>,
): void {
  const fixed = Buffer.alloc(NDMSG_SIZE);
  fixed.writeUInt8(familyOf(address), 0);
  fixed.writeInt32LE(index, 4);
  socket.request(`RTM_DELNEIGH ${formatAddress(address)}`, RTM_DELNEIGH, 0, fixed, attribute(NDA_DST, address));
}
