import { once } from 'node:events';
import { type AddressInfo, connect, createServer, type Socket } from 'node:net';
import { buffer } from 'node:stream/consumers';
import { afterEach, describe, expect, it, vi } from 'vitest';
import type { DialRequest } from '../../../gen/kiln/agent/v1/agent.ts';
import type { KilnError } from '../../../src/errors.ts';
import { connectGuest, failure, type Script } from './scripted-agent.ts';

const cleanups: (() => void)[] = [];
afterEach(() => {
  for (const cleanup of cleanups.splice(0)) cleanup();
});

const guestWith = (script: Script) => connectGuest(script, cleanups);

/** Both ends of a TCP connection. */
async function connection(): Promise<{ client: Socket; accepted: Socket }> {
  const server = createServer({ allowHalfOpen: true, pauseOnConnect: true }).listen(0, '127.0.0.1');
  await once(server, 'listening');
  const client = connect({ port: (server.address() as AddressInfo).port, host: '127.0.0.1', allowHalfOpen: true });
  const [accepted] = (await once(server, 'connection')) as [Socket];
  server.close();
  cleanups.push(() => client.destroy());
  return { client, accepted };
}

const codeOf = (relay: Promise<void>) =>
  relay.then(
    () => 'no error',
    (error: KilnError) => error.code,
  );
const never = new AbortController().signal;
const port = { family: 'ipv6', port: 80 } as const;
const nothing = Buffer.alloc(0);

describe('a connection to the guest', () => {
  it('says where it goes, and ends when both directions have ended', async () => {
    const requests: DialRequest[] = [];
    const { guest } = await guestWith({
      dial: (call) => {
        call.write({ data: Buffer.from('first '), end: false });
        call.on('data', (request: DialRequest) => requests.push(request));
        call.on('end', () => {
          call.write({ data: Buffer.from('last'), end: true });
          call.end();
        });
      },
    });
    const { client, accepted } = await connection();
    const relay = codeOf(guest.relayConnection(port, accepted, never));
    const answer = buffer(client);
    client.end('question');
    expect((await answer).toString()).toBe('first last');
    expect(await relay).toBe('no error');
    expect(requests[0]).toMatchObject({ family: 10, port: 80 });
    expect(Buffer.concat(requests.map(({ data }) => data)).toString()).toBe('question');
    expect(accepted.destroyed).toBe(true);
  });

  it('goes on to the guest after the guest has ended its direction', async () => {
    const requests: DialRequest[] = [];
    const { guest } = await guestWith({
      dial: (call) => {
        call.write({ data: nothing, end: true });
        call.on('data', (request: DialRequest) => requests.push(request));
        call.on('end', () => call.end());
      },
    });
    const { client, accepted } = await connection();
    const relay = codeOf(guest.relayConnection(port, accepted, never));
    await once(client.resume(), 'end');
    client.end('after the end');
    expect(await relay).toBe('no error');
    expect(Buffer.concat(requests.map(({ data }) => data)).toString()).toBe('after the end');
  });

  it.each([
    ['is refused', 'FAILED_PRECONDITION', 'failed-precondition'],
    ['breaks', 'ABORTED', 'aborted'],
  ] as const)('is reset when it %s there', async (_what, answer, code) => {
    const { guest } = await guestWith({
      dial: (call) => call.emit('error', failure(answer, 'the reason')),
    });
    const { client, accepted } = await connection();
    const error = new Promise((resolve) => client.once('error', resolve));
    client.resume();
    expect(await codeOf(guest.relayConnection(port, accepted, never))).toBe(code);
    expect(await error).toMatchObject({ code: 'ECONNRESET' });
  });

  it('is cancelled in the guest when it is reset here', async () => {
    const cancelled = Promise.withResolvers<void>();
    const { guest } = await guestWith({
      dial: (call) => {
        call.on('error', () => {});
        call.on('data', () => {});
        call.on('cancelled', () => cancelled.resolve());
      },
    });
    const { client, accepted } = await connection();
    const relay = codeOf(guest.relayConnection(port, accepted, never));
    client.write('x', () => client.resetAndDestroy());
    await cancelled.promise;
    expect(await relay).not.toBe('no error');
  });

  it('is reset at once when it is given up, also while bytes wait for whoever does not read them', async () => {
    const { guest } = await guestWith({
      dial: (call) => {
        call.on('error', () => {});
        for (let part = 0; part < 16; part += 1) call.write({ data: Buffer.alloc(1 << 19), end: false });
      },
    });
    const { client, accepted } = await connection();
    const controller = new AbortController();
    const relay = codeOf(guest.relayConnection(port, accepted, controller.signal));
    await vi.waitFor(() => expect(accepted.writableLength).toBeGreaterThan(0));
    controller.abort();
    expect(await relay).not.toBe('no error');
    expect(accepted.destroyed).toBe(true);
    const error = new Promise((resolve) => client.once('error', resolve));
    client.resume();
    expect(await error).toMatchObject({ code: 'ECONNRESET' });
  });

  it('is reset when the guest is lost', async () => {
    const dialled = Promise.withResolvers<void>();
    const { guest, agent } = await guestWith({
      dial: (call) => {
        call.on('error', () => {});
        dialled.resolve();
      },
    });
    const { client, accepted } = await connection();
    const error = new Promise((resolve) => client.once('error', resolve));
    client.resume();
    const relay = codeOf(guest.relayConnection(port, accepted, never));
    await dialled.promise;
    agent.disconnect();
    expect(await relay).toBe('unavailable');
    expect(await error).toMatchObject({ code: 'ECONNRESET' });
  });
});

describe('the guest’s listeners', () => {
  it('are told one report after the other, until the guest is lost', async () => {
    const { guest, agent } = await guestWith({
      watchListeners: (call) => {
        for (const ipv4Ports of ['', '0050', '00500051']) {
          call.write({ ipv4Ports: Buffer.from(ipv4Ports, 'hex'), ipv6Ports: nothing });
        }
        call.on('error', () => {});
      },
    });
    const told: number[][] = [];
    const lost = codeOf(
      guest.watchListeners(({ ipv4Ports }) => {
        told.push([...ipv4Ports]);
        if (told.length === 3) agent.disconnect();
      }, never),
    );
    expect(await lost).toBe('unavailable');
    expect(told).toEqual([[], [80], [80, 81]]);
  });

  it('are told no more when nobody wants to hear of them, and the guest is asked for none', async () => {
    const cancelled = Promise.withResolvers<void>();
    const { guest } = await guestWith({
      watchListeners: (call) => {
        call.write({ ipv4Ports: nothing, ipv6Ports: nothing });
        call.on('cancelled', () => cancelled.resolve());
        call.on('error', () => {});
      },
    });
    const heard = new AbortController();
    let told = 0;
    await guest.watchListeners(() => {
      told += 1;
      heard.abort();
    }, heard.signal);
    await cancelled.promise;
    expect(told).toBe(1);
  });
});
