/** Network interfaces: the RTM_*LINK messages of rtnetlink(7). Constants: linux/rtnetlink.h, linux/if_link.h, linux/if.h. */
import { attribute, decodeAttributes, decodeText, text, u32 } from './message.ts';
import type { RtnetlinkSocket } from './socket.ts';

const RTM_NEWLINK = 16;
const RTM_DELLINK = 17;
const RTM_GETLINK = 18;
const RTM_SETLINK = 19;

const IFLA_ADDRESS = 1;
const IFLA_IFNAME = 3;
const IFLA_MTU = 4;
const IFLA_LINKINFO = 18;
const IFLA_IFALIAS = 20;
const IFLA_NET_NS_FD = 28;
const IFLA_CARRIER = 33;
const IFLA_INFO_KIND = 1;

const IFF_UP = 0x1;
const IFF_LOOPBACK = 0x8;

/** Of `Link.type`: linux/if_arp.h. */
export const ARPHRD_ETHER = 1;

/** struct ifinfomsg: family, padding, type u16, index i32, flags u32, change u32. */
const IFINFOMSG_SIZE = 16;

export interface Link {
  readonly index: number;
  readonly name: string;
  /** The hardware's type: `ARPHRD_ETHER`. */
  readonly type: number;
  readonly up: boolean;
  readonly loopback: boolean;
  /** There is somebody at the other end: of a tap, who has it open. */
  readonly carrier: boolean;
  /** "02:00:00:00:00:01"; empty for none. */
  readonly mac: string;
  /** In bytes. */
  readonly mtu: number;
  /** Of a virtual one: "veth", "macvlan", "tun"; else empty. */
  readonly kind: string;
  /** What somebody has noted of it; empty for nothing. */
  readonly alias: string;
}

/** What may be changed of an interface. */
export interface LinkChange {
  readonly name?: string;
  readonly mac?: string;
  readonly mtu?: number;
  readonly up?: boolean;
  readonly alias?: string;
}

function ifinfomsg(index: number, flags = 0, change = 0): Buffer {
  const bytes = Buffer.alloc(IFINFOMSG_SIZE);
  bytes.writeInt32LE(index, 4);
  bytes.writeUInt32LE(flags, 8);
  bytes.writeUInt32LE(change, 12);
  return bytes;
}

/** @throws SysError */
export function listLinks(socket: RtnetlinkSocket): Link[] {
  return socket.dump('RTM_GETLINK', RTM_GETLINK, RTM_NEWLINK, ifinfomsg(0)).map((payload) => {
    const attributes = decodeAttributes(payload.subarray(IFINFOMSG_SIZE));
    const flags = payload.readUInt32LE(8);
    const info = attributes.get(IFLA_LINKINFO);
    return {
      index: payload.readInt32LE(4),
      name: decodeText(attributes.get(IFLA_IFNAME)),
      type: payload.readUInt16LE(2),
      up: (flags & IFF_UP) !== 0,
      loopback: (flags & IFF_LOOPBACK) !== 0,
      carrier: attributes.get(IFLA_CARRIER)?.[0] !== 0,
      mac: formatMac(attributes.get(IFLA_ADDRESS) ?? Buffer.alloc(0)),
      mtu: attributes.get(IFLA_MTU)?.readUInt32LE() ?? 0,
      kind: info === undefined ? '' : decodeText(decodeAttributes(info).get(IFLA_INFO_KIND)),
      alias: decodeText(attributes.get(IFLA_IFALIAS)),
    };
  });
}

/** Changes an interface; a change of its name needs it to be down. @throws SysError */
export function setLink(socket: RtnetlinkSocket, index: number, change: LinkChange): void {
  const attributes: Buffer[] = [];
  if (change.name !== undefined) attributes.push(attribute(IFLA_IFNAME, text(change.name)));
  if (change.mac !== undefined) attributes.push(attribute(IFLA_ADDRESS, parseMac(change.mac)));
  if (change.mtu !== undefined) attributes.push(attribute(IFLA_MTU, u32(change.mtu)));
  if (change.alias !== undefined) attributes.push(attribute(IFLA_IFALIAS, text(change.alias)));
  const up = change.up === undefined ? ifinfomsg(index) : ifinfomsg(index, change.up ? IFF_UP : 0, IFF_UP);
  socket.request(`RTM_SETLINK ${describe(index, change)}`, RTM_SETLINK, 0, up, ...attributes);
}

function describe(index: number, change: LinkChange): string {
  const words = Object.entries(change).map(([key, value]) => `${key}=${value}`);
  return [`interface ${index}`, ...words].join(' ');
}

/**
 * Moves an interface to another network namespace, where it has this name; it must be down. The kernel waits until no CPU can be
 * at it any more, some 20 ms (__dev_change_net_namespace, net/core/dev.c), on another thread.
 *
 * @param socket that nobody uses, nor closes, meanwhile
 * @param namespaceFd that stays open meanwhile
 * @throws SysError EEXIST for a name in use there
 */
export async function moveLink(
  socket: RtnetlinkSocket,
  index: number,
  name: string,
  namespaceFd: number,
): Promise<void> {
  const where = [attribute(IFLA_IFNAME, text(name)), attribute(IFLA_NET_NS_FD, u32(namespaceFd))];
  const what = `RTM_SETLINK interface ${index} name=${name} namespaceFd=${namespaceFd}`;
  await socket.requestAside(what, RTM_SETLINK, 0, ifinfomsg(index), ...where);
}

/** Removes a virtual interface. @throws SysError ENODEV when there is none */
export function deleteLink(socket: RtnetlinkSocket, index: number): void {
  socket.request(`RTM_DELLINK interface ${index}`, RTM_DELLINK, 0, ifinfomsg(index));
}

/** @throws RangeError for what is none */
export function parseMac(mac: string): Buffer {
  if (!/^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/i.test(mac)) throw new RangeError(`"${mac}" is no MAC address`);
  return Buffer.from(mac.replaceAll(':', ''), 'hex');
}

export function formatMac(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join(':');
}
