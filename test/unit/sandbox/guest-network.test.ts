import { afterEach, expect, it, vi } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import type { NetworkConfig } from '../../../src/network/config.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import { GuestNetwork } from '../../../src/sandbox/guest-network.ts';

const cleanups: (() => Promise<void>)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0)) await cleanup();
});

function configOf(...names: string[]): NetworkConfig {
  const interfaces = names.map((name) => ({ cardMac: '', name, mac: '', mtu: 1500, addresses: [] }));
  return { interfaces, routes: [], neighbours: [] };
}

/** A namespace whose state a test chooses, and a guest that notes what it is told. */
function scene() {
  const told: string[] = [];
  const log: string[] = [];
  const events: string[] = [];
  let change: () => void = () => {};
  const state: { config: NetworkConfig | undefined; problem: Error | undefined } = {
    config: undefined,
    problem: undefined,
  };
  const network = {
    connect: async () => {
      events.push('look');
      if (state.problem !== undefined) throw state.problem;
      return state.config;
    },
    told: (config: NetworkConfig) => {
      if (state.config === config) state.config = undefined;
    },
    watch: (onChange: () => void) => {
      events.push('watch');
      change = onChange;
      return { [Symbol.dispose]: () => void events.push('watch no longer') };
    },
    bindLoopback: () => -1,
    ask: async () => 'none' as const,
    admitAnswers: () => {},
    [Symbol.asyncDispose]: async () => void events.push('leave'),
  };
  const guest = {
    setNetwork: async ({ interfaces }: NetworkConfig) => void told.push(interfaces.map(({ name }) => name).join()),
    watchListeners: () => new Promise<void>(() => {}),
    relayConnection: () => Promise.resolve(),
    serveNameservers: async (addresses: readonly string[]) => void told.push(addresses.join()),
    relayQueries: () => new Promise<void>(() => {}),
  };
  const logger = loggerTo({ write: (line: string) => void log.push(line) }, 'debug');
  const its = new GuestNetwork({ network, guest, logger });
  cleanups.push(() => its[Symbol.asyncDispose]());
  return { its, told, log, events, state, change: () => change() };
}

it('a guest is told of the network with what it is asked for', async () => {
  const { its, state } = scene();
  expect(await its.tell(async (config) => config)).toBeUndefined();
  const config = configOf('eth0');
  state.config = config;
  expect(await its.tell(async (given) => given)).toBe(config);
  expect(await its.tell(async (given) => given)).toBeUndefined();
  // One that was not told is told the next time.
  state.config = config;
  await expect(its.tell(() => Promise.reject(new Error('refused')))).rejects.toThrow('refused');
  expect(await its.tell(async (given) => given)).toBe(config);
});

it('a guest is told of what changes, once for changes that come together', async () => {
  const { its, told, events, state, change } = scene();
  its.follow(0);
  its.follow(0);
  await vi.waitFor(() => expect(events).toContain('look'));
  state.config = configOf('eth0');
  for (let time = 0; time < 5; time += 1) change();
  await vi.waitFor(() => expect(told).toEqual(['eth0']));
  expect(events).toEqual(['watch', 'look', 'look']);
});

it('a change that cannot be taken over is told once, and followed by others', async () => {
  const { its, told, log, events, state, change } = scene();
  its.follow(0);
  await vi.waitFor(() => expect(events).toContain('look'));
  state.problem = new KilnError('resource-exhausted', 'too many interfaces');
  for (const looks of [2, 3]) {
    change();
    await vi.waitFor(() => expect(events.filter((each) => each === 'look')).toHaveLength(looks));
  }
  state.problem = undefined;
  state.config = configOf('eth1');
  change();
  await vi.waitFor(() => expect(told).toEqual(['eth1']));
  expect(log.filter((line) => line.includes('too many interfaces'))).toHaveLength(1);
});

it('nothing is followed before its time, nor after it was stopped', async () => {
  const { its, events } = scene();
  its.follow(600_000);
  its.stop();
  its.follow(0);
  expect(events).toEqual([]);
  await its[Symbol.asyncDispose]();
  expect(events).toEqual(['leave']);
});
