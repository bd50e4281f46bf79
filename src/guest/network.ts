import type { Network } from '../../gen/kiln/agent/v1/agent.ts';
import type { NetworkConfig } from '../network/config.ts';

/** What the guest has to take over, as the agent is told it. */
export function toNetwork(config: NetworkConfig | undefined): Network | undefined {
  if (config === undefined) return undefined;
  return {
    interfaces: config.interfaces.map(({ addresses, ...others }) => ({
      ...others,
      addresses: addresses.map(({ local, peer, prefixLength, broadcast, scope }) => ({
        ...{ local: Buffer.from(local), peer: Buffer.from(peer), broadcast: Buffer.from(broadcast) },
        ...{ prefixLength, scope },
      })),
    })),
    routes: config.routes.map((route) => ({
      ...route,
      destination: Buffer.from(route.destination),
      gateway: Buffer.from(route.gateway),
      source: Buffer.from(route.source),
    })),
    neighbours: config.neighbours.map((neighbour) => ({ ...neighbour, address: Buffer.from(neighbour.address) })),
  };
}
