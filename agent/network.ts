/**
 * The guest's network: a card becomes what an interface of the sandbox's namespace on the host is, with its name, MAC, MTU,
 * addresses, routes and neighbours. What is so already stays as it is, so that the host may say it all again when something has
 * changed; of what it has said before, what it does not say any more is taken away. What containers have made stays.
 */
import type { Network, NetworkInterface } from '../gen/kiln/agent/v1/agent.ts';
import { addAddress, deleteAddress } from '../src/sys/rtnetlink/addresses.ts';
import { type Link, listLinks, setLink } from '../src/sys/rtnetlink/links.ts';
import { deleteNeighbour, setNeighbour } from '../src/sys/rtnetlink/neighbours.ts';
import { deleteRoute, RTN_UNICAST, setRoute } from '../src/sys/rtnetlink/routes.ts';
import { RtnetlinkSocket } from '../src/sys/rtnetlink/socket.ts';
import { hideCard, showCard } from './cards.ts';
import { AgentError } from './errors.ts';

const nothing: Network = { interfaces: [], routes: [], neighbours: [] };

export class GuestNetwork {
  /** What the host has said last. */
  #known = nothing;

  /** @throws AgentError internal, naming what cannot be set */
  apply(network: Network): void {
    const before = this.#known;
    // What fails half-way is taken away by the next call, too.
    this.#known = {
      interfaces: [...before.interfaces, ...network.interfaces],
      routes: [...before.routes, ...network.routes],
      neighbours: [...before.neighbours, ...network.neighbours],
    };
    try {
      applyNetwork(before, network);
    } catch (error) {
      if (error instanceof AgentError) throw error;
      throw new AgentError('internal', `cannot set up the network: ${(error as Error).message}`, { cause: error });
    }
    this.#known = network;
  }
}

function applyNetwork(before: Network, network: Network): void {
  using socket = new RtnetlinkSocket();
  hideCardsOf(socket, before.interfaces, network.interfaces);
  const indices = new Map<string, number>();
  for (const wanted of network.interfaces) indices.set(wanted.name, applyInterface(socket, wanted));
  takeAway(socket, before, network, indices);
  setRoutes(socket, network, indices);
}

function setRoutes(socket: RtnetlinkSocket, { routes, neighbours }: Network, indices: Map<string, number>): void {
  const indexOf = (name: string) => {
    const index = indices.get(name);
    if (index === undefined) throw new AgentError('invalid-argument', `there is no interface "${name}"`);
    return index;
  };
  for (const route of routes) setRoute(socket, { ...route, index: indexOf(route.interface), type: RTN_UNICAST });
  for (const neighbour of neighbours) setNeighbour(socket, { ...neighbour, index: indexOf(neighbour.interface) });
}

/** First, because others may get the names and the cards of those that are gone. */
function hideCardsOf(
  socket: RtnetlinkSocket,
  before: readonly NetworkInterface[],
  now: readonly NetworkInterface[],
): void {
  const gone = before.filter(({ cardMac, mac }) => !now.some((each) => each.cardMac === cardMac && each.mac === mac));
  if (gone.length === 0) return;
  const links = listLinks(socket);
  for (const { mac, cardMac } of gone) {
    const link = links.find((each) => !each.loopback && each.mac === mac);
    if (link !== undefined) hideCard(link.name, cardMac);
  }
}

/** Addresses, routes and neighbours that the host does not say any more, of interfaces that have stayed. */
function takeAway(socket: RtnetlinkSocket, before: Network, now: Network, indices: Map<string, number>): void {
  for (const { cardMac, addresses } of before.interfaces) {
    const kept = now.interfaces.find((each) => each.cardMac === cardMac);
    const index = indices.get(kept?.name ?? '');
    if (kept === undefined || index === undefined) continue;
    const gone = missing(addresses, kept.addresses);
    for (const address of gone) ignoringAbsence(() => deleteAddress(socket, { ...address, index }));
    // The kernel takes the secondary addresses of a subnet away with its first one.
    if (gone.length > 0) for (const address of kept.addresses) addAddress(socket, { ...address, index });
  }
  for (const route of missing(before.routes, now.routes)) {
    const index = indices.get(route.interface);
    if (index === undefined) continue;
    ignoringAbsence(() => deleteRoute(socket, { ...route, index, type: RTN_UNICAST }));
  }
  for (const neighbour of missing(before.neighbours, now.neighbours)) {
    const index = indices.get(neighbour.interface);
    if (index !== undefined) ignoringAbsence(() => deleteNeighbour(socket, { ...neighbour, index }));
  }
}

function missing<T>(before: readonly T[], now: readonly T[]): T[] {
  const kept = new Set(now.map(textOf));
  return before.filter((item) => !kept.has(textOf(item)));
}

function textOf(item: unknown): string {
  return JSON.stringify(item);
}

function ignoringAbsence(action: () => void): void {
  try {
    action();
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== 'ESRCH' && code !== 'ENOENT' && code !== 'EADDRNOTAVAIL') throw error;
  }
}

function applyInterface(socket: RtnetlinkSocket, { cardMac, name, mac, mtu, addresses }: NetworkInterface): number {
  const link = findCard(socket, cardMac, mac);
  if (link.name !== name || link.mac !== mac) {
    // A name is changed only of an interface that is down.
    if (link.up) setLink(socket, link.index, { up: false });
    setLink(socket, link.index, { name, mac });
  }
  setLink(socket, link.index, { mtu, up: true });
  for (const address of addresses) addAddress(socket, { ...address, index: link.index });
  return link.index;
}

function findCard(socket: RtnetlinkSocket, cardMac: string, mac: string): Link {
  // One that has become the interface already has its MAC.
  const find = () => listLinks(socket).find((link) => !link.loopback && (link.mac === mac || link.mac === cardMac));
  const found = find();
  if (found !== undefined) return found;
  showCard(cardMac);
  const shown = find();
  if (shown === undefined) throw new AgentError('internal', `the network card ${cardMac} does not appear in the guest`);
  return shown;
}
