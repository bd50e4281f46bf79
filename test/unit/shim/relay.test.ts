import { once } from 'node:events';
import { mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import { parseRelayHeader, type RelayHeader } from '../../../src/shim/relay/header.ts';
import type { Keeper } from '../../../src/shim/relay/keeper.ts';
import { RelayServer, type RelaySession } from '../../../src/shim/relay/server.ts';
import { ScriptedRelay } from './relay-pair.ts';

const fields: Readonly<Record<string, string>> = {
  ...{ protocol: '2', role: 'session', socket: '/run/kiln/s/0', relay_pid: '12', client: '3', replayed: '4' },
  ...{ namespace: 'n', id: 'i', bundle: '/b', address: '', ttrpc_address: '/t', publish_binary: '', debug: '0' },
  max_shim_version: '2',
  launcher_started_ns: '99',
};

function bytesOf(changes: Readonly<Record<string, string | null>> = {}): Buffer {
  const all = Object.entries({ ...fields, ...changes }).filter(([, value]) => value !== null);
  return Buffer.from(`${all.map(([key, value]) => `${key}=${value}\0`).join('')}\0`);
}

const expected: RelayHeader = {
  ...{ role: 'session', socketPath: '/run/kiln/s/0', relayPid: 12, client: 3, replayed: 4 },
  context: {
    ...{ namespace: 'n', id: 'i', bundle: '/b', address: '', ttrpcAddress: '/t', publishBinary: '', debug: false },
    maxShimVersion: 2,
    launcherStartedNs: 99n,
  },
};

let directory: string;
let cleanup: AsyncDisposableStack;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'kiln-relay-'));
  cleanup = new AsyncDisposableStack();
  cleanup.defer(() => rmSync(directory, { recursive: true, force: true }));
});
afterEach(() => cleanup.disposeAsync());

describe('the header', () => {
  it('is read at its end and not before, and what follows is kept', () => {
    const bytes = bytesOf({ colour: 'blue' });
    for (let length = 0; length < bytes.length; length += 1) {
      expect(parseRelayHeader(bytes.subarray(0, length))).toBe(undefined);
    }
    const parsed = parseRelayHeader(Buffer.concat([bytes, Buffer.from('rest')]));
    expect(parsed?.header).toEqual(expected);
    expect(Buffer.from(parsed?.rest ?? []).toString()).toBe('rest');
  });

  it.each([
    ['another protocol', { protocol: '1' }, 'a relay speaks protocol 1, this kilnd speaks 2'],
    ['no role', { role: null }, 'neither the role keeper nor session'],
    ['a relative socket', { socket: 's/0' }, 'no absolute socket path'],
    ['a pid that is none', { relay_pid: '-1' }, '"relay_pid" is no number'],
    ['a huge count', { replayed: '1'.repeat(10) }, '"replayed" is no number'],
    ['an id that climbs', { id: '../x' }, '"id" must be 1 to 76 letters'],
  ])('with %s is refused by name', (_what, changes, message) => {
    expect(() => parseRelayHeader(bytesOf(changes))).toThrow(message);
  });

  it('that never ends is refused', () => {
    expect(() => parseRelayHeader(Buffer.alloc(65_537, 'x'))).toThrow('more than 65536 bytes');
  });

  it('of any bytes is a header, unfinished, or a KilnError', () => {
    const changed = fc.array(fc.tuple(fc.nat(), fc.nat(255))).map((changes) => {
      const bytes = bytesOf();
      for (const [at, value] of changes) bytes[at % bytes.length] = value;
      return bytes;
    });
    fc.assert(
      fc.property(fc.oneof(fc.uint8Array(), changed), (bytes) => {
        try {
          parseRelayHeader(bytes);
        } catch (error) {
          if (!(error instanceof KilnError)) throw error;
        }
      }),
      { seed: 5, numRuns: 5000 },
    );
  });
});

async function listen() {
  const keepers: Keeper[] = [];
  const sessions: RelaySession[] = [];
  const errors: string[] = [];
  const server = await RelayServer.listen(directory, {
    onKeeper: (keeper) => keepers.push(keeper),
    onSession: (session) => sessions.push(session),
    onError: (error) => errors.push(error.message),
  });
  cleanup.defer(() => server.close());
  const dial = async () => {
    const socket = connect(join(directory, 'relay.sock'));
    cleanup.defer(() => void socket.destroy());
    await once(socket, 'connect');
    return socket;
  };
  return { server, keepers, sessions, errors, dial };
}

describe('the server for relays', () => {
  it('listens for root alone, in place of what a dead kilnd left', async () => {
    writeFileSync(join(directory, 'relay.sock'), '');
    const { dial } = await listen();
    await dial();
    expect(statSync(join(directory, 'relay.sock')).mode & 0o777).toBe(0o600);
  });

  it('hands over a session with every byte that came behind the header, whatever the pieces', async () => {
    const { sessions, dial } = await listen();
    const socket = await dial();
    const sent = Buffer.concat([bytesOf(), Buffer.from('frames')]);
    for (const byte of sent) {
      socket.write(Uint8Array.of(byte));
      await new Promise(setImmediate);
    }
    socket.end(' and more');
    while (sessions.length === 0) await new Promise(setImmediate);
    const [session] = sessions;
    expect(session?.header).toEqual(expected);
    let text = '';
    session?.socket.on('data', (chunk) => {
      text += chunk.toString();
    });
    session?.socket.resume();
    await once(session!.socket, 'end');
    expect(text).toBe('frames and more');
  });

  it('closes a connection that says nothing sensible, tells of it, and goes on', async () => {
    const { errors, keepers, dial } = await listen();
    const garbage = await dial();
    garbage.write('hello\0\0');
    await once(garbage.resume(), 'close');
    expect(errors).toEqual(['control request has the field "hello" without "="']);
    (await dial()).write(bytesOf({ role: 'keeper' }));
    while (keepers.length === 0) await new Promise(setImmediate);
  });

  it('that closes lets go of who has not said anything', async () => {
    const { server, dial } = await listen();
    const silent = await dial();
    server.close();
    await once(silent.resume(), 'close');
    await expect(dial()).rejects.toThrow('ENOENT');
  });
});

describe('a keeper', () => {
  it('asks one thing after the other and takes the answers in their order', async () => {
    const relay = await ScriptedRelay.connect(directory);
    const answers = [relay.keeper.hold('/a'), relay.keeper.hold('/b\n"ü'), relay.keeper.release('/a')];
    expect(await relay.until(3)).toEqual(['hold /a', 'hold /b\n"ü', 'release /a']);
    const results = Promise.allSettled(answers);
    // In pieces that are no messages.
    for (const piece of ['o', 'k\0error No space lé', 'ft\0', 'ok\0']) relay.socket.write(piece);
    expect((await results).map((result) => (result.status === 'fulfilled' ? 'ok' : result.reason.message))).toEqual([
      'ok',
      'No space léft',
      'ok',
    ]);
  });

  it('of a relay that goes fails all that is asked, then and later', async () => {
    const relay = await ScriptedRelay.connect(directory);
    const held = relay.keeper.hold('/a');
    held.catch(() => {});
    relay.socket.end();
    await expect(held).rejects.toMatchObject({ code: 'unavailable', message: 'the relay is gone' });
    await relay.keeper.closed;
    expect(relay.keeper.isClosed).toBe(true);
    await expect(relay.keeper.release('/a')).rejects.toMatchObject({ code: 'unavailable' });
    relay.keeper.end();
    await relay.keeper.gone();
  });

  it('closes on a relay that answers what nobody has asked, or never ends a message', async () => {
    const one = await ScriptedRelay.connect(directory);
    one.say('ok');
    await one.keeper.closed;
    const two = await ScriptedRelay.connect(directory);
    two.socket.write('x'.repeat(5000));
    await two.keeper.closed;
  });
});
