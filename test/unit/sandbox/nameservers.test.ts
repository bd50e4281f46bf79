import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import type { NameAnswer, NameQuery } from '../../../src/network/ask.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import { Nameservers } from '../../../src/sandbox/nameservers.ts';
import { dnsAnswer, dnsQuery } from '../../support/dns.ts';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'kt-names-'));
});
afterEach(() => rmSync(folder, { recursive: true }));

const message = dnsQuery('name.test');
const answer = dnsAnswer(message, ['10.0.0.1']);
const lost = new KilnError('unavailable', 'the connection to the guest was lost');

/** A guest and a namespace that note what is asked of them. */
function scene() {
  const served: string[][] = [];
  const asked: NameQuery[] = [];
  const log: string[] = [];
  const state: { relays: number; admitted: number; refusal?: Error; problem?: Error } = { relays: 0, admitted: 0 };
  let query: (query: NameQuery) => Promise<NameAnswer> = () => Promise.reject(new Error('no relay'));
  let aborted: AbortSignal | undefined;
  const guest = {
    serveNameservers: async (addresses: readonly string[]) => {
      served.push([...addresses]);
      if (state.refusal !== undefined) throw state.refusal;
    },
    relayQueries: (answering: typeof query, signal: AbortSignal) => {
      state.relays += 1;
      query = answering;
      aborted = signal;
      return new Promise<void>((resolve) => signal.addEventListener('abort', () => resolve()));
    },
  };
  const network = {
    ask: async (given: NameQuery, signal: AbortSignal): Promise<NameAnswer> => {
      asked.push(given);
      if (state.problem !== undefined) throw state.problem;
      return signal.aborted ? 'none' : answer;
    },
    admitAnswers: () => {
      state.admitted += 1;
    },
  };
  const logger = loggerTo({ write: (line: string) => void log.push(line) }, 'debug');
  const its = new Nameservers({ guest, network, logger });
  const file = (name: string, ...nameservers: string[]) => {
    const path = join(folder, name);
    writeFileSync(path, nameservers.map((each) => `nameserver ${each}\n`).join(''));
    return path;
  };
  const ask = (nameserver: string) => query({ nameserver, transport: 'udp', message });
  return { its, served, asked, log, state, file, ask, signal: () => aborted };
}

describe('the name servers of a sandbox', () => {
  it('cost the guest nothing where none is at a loopback address', async () => {
    const { its, served, state, file } = scene();
    await its.follow(file('resolv.conf', '10.0.0.1', '8.8.8.8'));
    await its.follow(join(folder, 'gone'));
    expect(served).toEqual([]);
    expect(state).toEqual({ relays: 0, admitted: 0 });
  });

  it('are served once, those that come later, too', async () => {
    const { its, served, state, file } = scene();
    const one = file('one', '127.0.0.11', '10.0.0.1');
    await Promise.all([its.follow(one), its.follow(one)]);
    expect(served).toEqual([['127.0.0.11']]);
    await its.follow(file('two', '127.0.0.11', '::1'));
    file('one', '127.0.0.53');
    await its.look();
    await its.look();
    expect(served).toEqual([['127.0.0.11'], ['::1'], ['127.0.0.53']]);
    expect(state.relays).toBe(1);
  });

  it('answer what the guest asks, and no others are asked', async () => {
    const { its, asked, file, ask } = scene();
    await its.follow(file('resolv.conf', '127.0.0.11'));
    expect(await ask('127.0.0.11')).toEqual(answer);
    expect(await ask('10.0.0.1')).toBe('none');
    expect(asked.map(({ nameserver }) => nameserver)).toEqual(['127.0.0.11']);
  });

  it('refuse where the namespace has no socket for them', async () => {
    const { its, state, log, file, ask } = scene();
    await its.follow(file('resolv.conf', '::1'));
    state.problem = new Error('EAFNOSUPPORT');
    expect(await ask('::1')).toBe('refused');
    expect(log.join()).toContain('EAFNOSUPPORT');
  });

  it('are not so many that a container could fill anything with them', async () => {
    const { its, served, file } = scene();
    for (let at = 0; at < 10; at += 1) {
      await its.follow(file(`${at}`, ...[1, 2, 3].map((last) => `127.0.${at}.${last}`)));
    }
    expect(served.flat()).toHaveLength(16);
  });

  it('are told of in the log where the guest cannot serve them, and not where it is gone', async () => {
    const { its, state, log, file } = scene();
    state.refusal = lost;
    await its.follow(file('one', '127.0.0.1'));
    expect(log).toEqual([]);
    state.refusal = new KilnError('internal', 'no such kernel');
    await its.follow(file('two', '127.0.0.2'));
    expect(log.join()).toContain('no such kernel');
  });

  it('are asked no more when it is disposed of', async () => {
    const { its, served, file, ask, signal } = scene();
    await its.follow(file('one', '127.0.0.11'));
    its[Symbol.dispose]();
    expect(signal()?.aborted).toBe(true);
    expect(await ask('127.0.0.11')).toBe('none');
    await its.follow(file('two', '127.0.0.12'));
    expect(served).toEqual([['127.0.0.11']]);
  });
});
