/** Queries of the guest's programs for name servers on the host. The protocol is told in agent.proto, feature "nameservers". */
import { setTimeout as delay } from 'node:timers/promises';
import type { AgentClient, RelayQueriesRequest } from '../../gen/kiln/agent/v1/agent.ts';
import type { NameAnswer, NameQuery } from '../network/ask.ts';
import { maxDnsMessage, minDnsMessage } from '../sys/dns-stream.ts';
import { cancelling, toKilnError } from './call.ts';

/** The most queries of a guest that wait for an answer; others wait in the guest. */
const maxQueries = 128;

/** So many queries are read, then none for a while, in ms: a guest may send as many as it likes. */
const burst = 100;
const pauseMs = 100;

const nothing = Buffer.alloc(0);

/**
 * Has each query of the guest's programs answered, until the signal is aborted, or the connection to the guest is lost.
 *
 * @param answer gets a message of a DNS message's size; the guest may have put anything into it, and name any server
 * @throws KilnError unavailable when the guest is lost
 */
export async function relayQueries(
  client: AgentClient,
  answer: (query: NameQuery) => Promise<NameAnswer>,
  signal: AbortSignal,
): Promise<void> {
  const call = client.relayQueries();
  using _ = cancelling(call, signal);
  const waiting = new Set<Promise<void>>();
  const relay = async (id: number, query: NameQuery) => {
    const given = await answer(query);
    await send(call, { id, answer: typeof given === 'string' ? nothing : given, refused: given === 'refused' });
  };
  let read = 0;
  try {
    for await (const { id, nameserver, tcp, query } of call) {
      read += 1;
      if (read % burst === 0) await delay(pauseMs, undefined, { ref: false });
      if (query.length < minDnsMessage || query.length > maxDnsMessage) continue;
      if (waiting.size === maxQueries) await Promise.race(waiting);
      const asked = { nameserver: decodeLoopback(nameserver), transport: tcp ? 'tcp' : 'udp', message: query } as const;
      const relayed: Promise<void> = relay(id, asked)
        // The loop is told when the call has ended.
        .catch(() => {})
        .finally(() => waiting.delete(relayed));
      waiting.add(relayed);
    }
  } catch (error) {
    if (!signal.aborted) throw toKilnError(error);
  }
}

const loopback6 = Buffer.from([...new Array<number>(15).fill(0), 1]);

/** @param address a dotted quad, or "::1" */
export function encodeLoopback(address: string): Buffer {
  return address === '::1' ? loopback6 : Buffer.from(address.split('.').map(Number));
}

/** What was no loopback address becomes none that anybody has asked for. */
function decodeLoopback(address: Buffer): string {
  return address.equals(loopback6) ? '::1' : address.subarray(0, 4).join('.');
}

/** Resolves when there is room for more. */
function send(call: ReturnType<AgentClient['relayQueries']>, message: RelayQueriesRequest): Promise<void> {
  return new Promise((resolve, reject) => {
    call.write(message, (error?: Error | null) => (error ? reject(error) : resolve()));
  });
}
