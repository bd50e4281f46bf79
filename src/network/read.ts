import { KilnError } from '../errors.ts';
import { type Address, AF_INET6, formatAddress, listAddresses, RT_SCOPE_LINK } from '../sys/rtnetlink/addresses.ts';
import type { Link } from '../sys/rtnetlink/links.ts';
import { listNeighbours, NUD_PERMANENT } from '../sys/rtnetlink/neighbours.ts';
import { listRoutes, type Route, RT_TABLE_MAIN, RTN_UNICAST, RTPROT_KERNEL } from '../sys/rtnetlink/routes.ts';
import type { RtnetlinkSocket } from '../sys/rtnetlink/socket.ts';
import type { NetworkAddress, NetworkConfig, NetworkRoute } from './config.ts';

/** An interface of the namespace, and the card of the VM that it is connected to. */
export interface ConnectedLink {
  readonly link: Link;
  readonly cardMac: string;
}

/** Bits of Route.flags that are a setting, and not what the kernel has found: RTNH_F_ONLINK, linux/rtnetlink.h. */
const settings = 0x4;

/**
 * What whoever made the namespace's network has configured for these interfaces.
 *
 * Left out is what the guest's kernel makes itself: the routes of addresses, and IPv6's addresses of the link, which follow
 * from the MAC. So are neighbours that were learned, and routes in other tables than the main one, for which the guest would
 * need the rules, too.
 *
 * @param id the container's, for errors
 * @throws SysError; KilnError failed-precondition for an address that another machine has, too
 */
export function readNetwork(id: string, socket: RtnetlinkSocket, connected: readonly ConnectedLink[]): NetworkConfig {
  // A container without a network: there is nothing to ask the kernel for.
  if (connected.length === 0) return { interfaces: [], routes: [], neighbours: [] };
  const names = new Map(connected.map(({ link }) => [link.index, link.name]));
  const addresses = listAddresses(socket);
  const named = <T extends { readonly index: number }>(items: readonly T[]) =>
    items.flatMap((item) => {
      const name = names.get(item.index);
      return name === undefined ? [] : [{ ...item, interface: name }];
    });
  return {
    interfaces: connected.map(({ link: { index, name, mac, mtu }, cardMac }) => ({
      ...{ cardMac, name, mac, mtu },
      addresses: addresses
        .filter((address) => address.index === index && !isOfLink(address))
        .map((address) => refuseDuplicate(id, address, name)),
    })),
    routes: named(listRoutes(socket).filter(isConfigured))
      .map((route) => ({ ...route, flags: route.flags & settings }))
      .sort(byDependence),
    neighbours: named(listNeighbours(socket).filter(({ state, mac }) => (state & NUD_PERMANENT) !== 0 && mac !== '')),
  };
}

/** @throws KilnError failed-precondition for an address that the kernel has found to be another machine's */
function refuseDuplicate(id: string, { duplicate, index: _, ...address }: Address, name: string): NetworkAddress {
  if (!duplicate) return address;
  const text = `container ${id}: the address ${formatAddress(address.local)} of ${name}`;
  throw new KilnError('failed-precondition', `${text} is in use by another machine on its network`);
}

function isOfLink({ local, scope }: { readonly local: Uint8Array; readonly scope: number }): boolean {
  return local.length === 16 && scope === RT_SCOPE_LINK;
}

function isConfigured({ table, type, protocol, family, destination }: Route): boolean {
  if (table !== RT_TABLE_MAIN || type !== RTN_UNICAST || protocol === RTPROT_KERNEL) return false;
  // fe80::/64 and ff00::/8 come with every interface.
  return !(family === AF_INET6 && (destination[0] === 0xff || (destination[0] === 0xfe && destination[1] === 0x80)));
}

/** Those on the link first, then the more special ones: a gateway may be reached by one of them. */
function byDependence(left: NetworkRoute, right: NetworkRoute): number {
  const viaGateway = ({ gateway }: NetworkRoute) => (gateway.length > 0 ? 1 : 0);
  return viaGateway(left) - viaGateway(right) || right.prefixLength - left.prefixLength;
}
