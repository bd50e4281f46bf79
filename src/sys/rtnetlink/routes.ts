/** Routes: the RTM_*ROUTE messages of rtnetlink(7). Constants: linux/rtnetlink.h. */
import { formatAddress } from './addresses.ts';
import { attribute, decodeAttributes, NLM_F_CREATE, NLM_F_REPLACE, u32 } from './message.ts';
import type { RtnetlinkSocket } from './socket.ts';

const RTM_NEWROUTE = 24;
const RTM_DELROUTE = 25;
const RTM_GETROUTE = 26;

const RTA_DST = 1;
const RTA_OIF = 4;
const RTA_GATEWAY = 5;
const RTA_PRIORITY = 6;
const RTA_PREFSRC = 7;
const RTA_TABLE = 15;

/** Route.type: the usual one. */
export const RTN_UNICAST = 1;
export const RT_TABLE_MAIN = 254;
/** Route.protocol of what the kernel makes itself for an address, and of what others make at boot. */
export const RTPROT_KERNEL = 2;
const RTPROT_BOOT = 3;

/** struct rtmsg: family, destination and source prefix lengths, tos, table, protocol, scope, type: a byte each; flags u32. */
const RTMSG_SIZE = 12;

export interface Route {
  readonly family: number;
  /** Empty for the default route. */
  readonly destination: Uint8Array;
  readonly prefixLength: number;
  /** Empty for one on the link. */
  readonly gateway: Uint8Array;
  /** The source address that is preferred; empty for none. */
  readonly source: Uint8Array;
  /** The interface; 0 for none, or for more than one. */
  readonly index: number;
  /** The metric; 0 for none. */
  readonly priority: number;
  readonly table: number;
  readonly protocol: number;
  readonly scope: number;
  readonly type: number;
  /** RTNH_F_ONLINK (4): the gateway is on the link though no address says so. */
  readonly flags: number;
}

/** Those of all tables. @throws SysError */
export function listRoutes(socket: RtnetlinkSocket): Route[] {
  return socket.dump('RTM_GETROUTE', RTM_GETROUTE, RTM_NEWROUTE, Buffer.alloc(RTMSG_SIZE)).map((payload) => {
    const attributes = decodeAttributes(payload.subarray(RTMSG_SIZE));
    const none = Buffer.alloc(0);
    return {
      family: payload.readUInt8(0),
      destination: attributes.get(RTA_DST) ?? none,
      prefixLength: payload.readUInt8(1),
      gateway: attributes.get(RTA_GATEWAY) ?? none,
      source: attributes.get(RTA_PREFSRC) ?? none,
      index: attributes.get(RTA_OIF)?.readUInt32LE() ?? 0,
      priority: attributes.get(RTA_PRIORITY)?.readUInt32LE() ?? 0,
      table: attributes.get(RTA_TABLE)?.readUInt32LE() ?? payload.readUInt8(4),
      protocol: payload.readUInt8(5),
      scope: payload.readUInt8(6),
      type: payload.readUInt8(7),
      flags: payload.readUInt32LE(8),
    };
  });
}

/** What names a route to set or to delete. */
export type RouteRequest = Omit<Route, 'protocol' | 'table'>;

/** Adds a route, in place of one to the same destination with the same metric. @throws SysError */
export function setRoute(socket: RtnetlinkSocket, route: RouteRequest): void {
  const what = `RTM_NEWROUTE ${describeRoute(route)}`;
  socket.request(what, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, ...encodeRoute(route));
}

/** @throws SysError ESRCH where there is none such */
export function deleteRoute(socket: RtnetlinkSocket, route: RouteRequest): void {
  socket.request(`RTM_DELROUTE ${describeRoute(route)}`, RTM_DELROUTE, 0, ...encodeRoute(route));
}

function encodeRoute(route: RouteRequest): Buffer[] {
  const { family, destination, prefixLength, gateway, source, index, priority, scope, type, flags } = route;
  const fixed = Buffer.alloc(RTMSG_SIZE);
  fixed.set([family, prefixLength, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, scope, type]);
  fixed.writeUInt32LE(flags, 8);
  const attributes = [attribute(RTA_OIF, u32(index))];
  if (destination.length > 0) attributes.push(attribute(RTA_DST, destination));
  if (gateway.length > 0) attributes.push(attribute(RTA_GATEWAY, gateway));
  if (source.length > 0) attributes.push(attribute(RTA_PREFSRC, source));
  if (priority !== 0) attributes.push(attribute(RTA_PRIORITY, u32(priority)));
  return [fixed, ...attributes];
}

/** "10.1.0.0/16 via 10.0.0.1": for messages. */
export function describeRoute(route: Pick<Route, 'destination' | 'prefixLength' | 'gateway'>): string {
  const { destination, prefixLength, gateway } = route;
  const to = destination.length === 0 ? 'default' : `${formatAddress(destination)}/${prefixLength}`;
  return gateway.length === 0 ? to : `${to} via ${formatAddress(gateway)}`;
}
