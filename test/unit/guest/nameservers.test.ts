import { setImmediate as nextTurn } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import type { RelayQueriesRequest, RelayQueriesResponse } from '../../../gen/kiln/agent/v1/agent.ts';
import type { NameAnswer, NameQuery } from '../../../src/network/ask.ts';
import { dnsAnswer, dnsQuery } from '../../support/dns.ts';
import { connectGuest, failure, type Script } from './scripted-agent.ts';

const cleanups: (() => void)[] = [];
afterEach(() => {
  for (const cleanup of cleanups.splice(0)) cleanup();
});

const guestWith = (script: Script) => connectGuest(script, cleanups);

const never = new AbortController().signal;
const dockers = Buffer.from([127, 0, 0, 11]);
const message = dnsQuery('name.test');
const answer = dnsAnswer(message, ['10.0.0.1']);

const asked = (id: number, fields: Partial<RelayQueriesResponse> = {}): RelayQueriesResponse => ({
  ...{ id, nameserver: dockers, tcp: false, query: message },
  ...fields,
});

/** A guest that asks these, and keeps what it is told until it was told `count` times. */
function asking(queries: readonly RelayQueriesResponse[], count: number) {
  const told: RelayQueriesRequest[] = [];
  const script: Script = {
    relayQueries: (call) => {
      for (const query of queries) call.write(query);
      call.on('data', (data: RelayQueriesRequest) => {
        if (told.push(data) === count) call.end();
      });
      call.on('cancelled', () => call.destroy());
      call.on('error', () => {});
    },
  };
  return { told, script };
}

describe('queries of a guest', () => {
  it('are answered, each as the name server has', async () => {
    const answers: Record<string, NameAnswer> = { '127.0.0.11': answer, '::1': 'refused', '127.0.0.53': 'none' };
    const loopback6 = Buffer.from([...new Array<number>(15).fill(0), 1]);
    const queries = [
      asked(1),
      asked(2, { nameserver: loopback6, tcp: true }),
      asked(3, { nameserver: Buffer.from([127, 0, 0, 53]) }),
    ];
    const { told, script } = asking(queries, 3);
    const { guest } = await guestWith(script);
    const seen: NameQuery[] = [];
    await guest.relayQueries(async (query) => {
      seen.push(query);
      return answers[query.nameserver] ?? 'none';
    }, never);
    const nothing = Buffer.alloc(0);
    expect(told.sort((one, other) => one.id - other.id)).toEqual([
      { id: 1, answer, refused: false },
      { id: 2, answer: nothing, refused: true },
      { id: 3, answer: nothing, refused: false },
    ]);
    expect(seen.map(({ nameserver, transport }) => [nameserver, transport])).toEqual([
      ['127.0.0.11', 'udp'],
      ['::1', 'tcp'],
      ['127.0.0.53', 'udp'],
    ]);
  });

  it('that can be none reach no name server', async () => {
    const queries = [
      asked(1, { query: Buffer.alloc(11) }),
      asked(2, { query: Buffer.alloc(65_536) }),
      asked(3, { nameserver: Buffer.alloc(5000, 1) }),
      asked(4),
    ];
    const { script } = asking(queries, 2);
    const { guest } = await guestWith(script);
    const seen: string[] = [];
    await guest.relayQueries(async ({ nameserver }) => {
      seen.push(nameserver);
      return answer;
    }, never);
    expect(seen).toEqual(['1.1.1.1', '127.0.0.11']);
  });

  it('wait where there are too many', async () => {
    const count = 300;
    const { told, script } = asking(
      Array.from({ length: count }, (_, id) => asked(id)),
      count,
    );
    const { guest } = await guestWith(script);
    const full = Promise.withResolvers<void>();
    let running = 0;
    let most = 0;
    await guest.relayQueries(async () => {
      running += 1;
      most = Math.max(most, running);
      if (running === 128) full.resolve();
      await full.promise;
      // Whatever else has come by now would be read.
      for (let turn = 0; turn < 1000; turn += 1) await nextTurn();
      running -= 1;
      return answer;
    }, never);
    expect(most).toBe(128);
    expect(told).toHaveLength(count);
  });

  it('are relayed until the guest is lost', async () => {
    const { guest, agent } = await guestWith({ relayQueries: () => agent.disconnect() });
    await expect(guest.relayQueries(async () => answer, never)).rejects.toMatchObject({ code: 'unavailable' });
  });

  it('are relayed until somebody stops that', async () => {
    const controller = new AbortController();
    const { script } = asking([asked(1)], 2);
    const { guest } = await guestWith(script);
    await guest.relayQueries(async () => {
      controller.abort();
      return answer;
    }, controller.signal);
  });
});

it('a guest is asked to serve addresses in their bytes, and may refuse', async () => {
  const requests: Buffer[][] = [];
  const { guest } = await guestWith({
    serveNameservers: ({ request }, done) => {
      requests.push(request.addresses);
      if (requests.length === 1) done(null, {});
      else done(failure('INTERNAL', 'no such kernel'));
    },
  });
  await guest.serveNameservers(['127.0.0.11', '::1']);
  expect(requests[0]?.map((each) => each.toString('hex'))).toEqual(['7f00000b', '00000000000000000000000000000001']);
  await expect(guest.serveNameservers(['127.0.0.11'])).rejects.toThrow('no such kernel');
});
