/**
 * The guest's network: a card becomes what an interface of the sandbox's namespace on the host is, with its name, MAC, MTU,
 * addresses, routes and neighbours. What is so already stays as it is, so that the host may say it all again when an interface
 * has come.
 */
import type { Network, NetworkInterface } from '../gen/kiln/agent/v1/agent.ts';
import { addAddress } from '../src/sys/rtnetlink/addresses.ts';
import { type Link, listLinks, setLink } from '../src/sys/rtnetlink/links.ts';
import { setNeighbour } from '../src/sys/rtnetlink/neighbours.ts';
import { RTN_UNICAST, setRoute } from '../src/sys/rtnetlink/routes.ts';
import { RtnetlinkSocket } from '../src/sys/rtnetlink/socket.ts';
import { showCard } from './cards.ts';
import { AgentError } from './errors.ts';

/** @throws AgentError internal, naming what cannot be set */
export function applyNetwork({ interfaces, routes, neighbours }: Network): void {
  try {
    using socket = new RtnetlinkSocket();
    const indices = new Map<string, number>();
    for (const wanted of interfaces) indices.set(wanted.name, applyInterface(socket, wanted));
    const indexOf = (name: string) => {
      const index = indices.get(name);
      if (index === undefined) throw new AgentError('invalid-argument', `there is no interface "${name}"`);
      return index;
    };
    for (const route of routes) setRoute(socket, { ...route, index: indexOf(route.interface), type: RTN_UNICAST });
    for (const neighbour of neighbours) setNeighbour(socket, { ...neighbour, index: indexOf(neighbour.interface) });
  } catch (error) {
    if (error instanceof AgentError) throw error;
    throw new AgentError('internal', `cannot set up the network: ${(error as Error).message}`, { cause: error });
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
