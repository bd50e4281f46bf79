import { rm } from 'node:fs/promises';
import type { AgentListener, FirstConnection } from '../channel.ts';
import { type FileChannel, hybridFiles } from '../file-channel.ts';
import { hostSocketFor, knock, listenHybrid } from '../hybrid-vsock.ts';
import { agentPort } from '../vmm.ts';
import type { Place } from './place.ts';
import { holdSocket } from './socket-path.ts';

/** Listens for the agent's call, in a place where nobody does. Throws as `listenHybrid`. */
export async function listenForAgent(place: Place): Promise<AgentListener> {
  const listener = await listenHybrid(place.vsock.host, agentPort);
  place.admit(hostSocketFor(place.vsock.host, agentPort));
  return listener;
}

/** Where the guest's files go: another port than the agent's. */
export function filesOf(place: Place): FileChannel {
  return hybridFiles(place.vsock.host, (socket) => place.admit(socket));
}

/** As `listenForAgent`, of a VM whose agent has called before. */
export async function listenForNextCall(place: Place): Promise<AgentListener> {
  await rm(hostSocketFor(place.vsock.host, agentPort), { force: true });
  return listenForAgent(place);
}

/** Listens in an earlier kilnd's place for the agent, and asks it to call. */
export async function listenAndKnock(place: Place): Promise<AgentListener> {
  const listener = await listenForNextCall(place);
  const held = holdSocket(place.vsock.host);
  void knock(held.path).finally(() => held[Symbol.dispose]());
  return listener;
}

/**
 * Takes any number of calls, one at a time: after each it listens again at once, since the agent of a VM that becomes a
 * template calls a second time when nobody speaks to it any more.
 *
 * @param resources owns what listens
 */
export function manyCalls(
  place: Place,
  first: Pick<FirstConnection, 'accept'>,
  resources: AsyncDisposableStack,
): Pick<FirstConnection, 'accept'> {
  let next = first;
  return {
    async accept(signal) {
      const socket = await next.accept(signal);
      next = resources.use(await listenForNextCall(place));
      return socket;
    },
  };
}
