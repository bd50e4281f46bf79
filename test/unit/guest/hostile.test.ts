import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { connect as dial, type Socket } from 'node:net';
import { join } from 'node:path';
import { Writable } from 'node:stream';
import { setTimeout as delay } from 'node:timers/promises';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { ReadStatsResponse } from '../../../gen/kiln/agent/v1/agent.ts';
import { KilnError } from '../../../src/errors.ts';
import { Guest } from '../../../src/guest/guest.ts';
import { printable } from '../../../src/host/printable.ts';
import { toMetrics } from '../../../src/shim/metrics.ts';
import { type AttackName, attacks } from './hostile-agent.ts';
import { answerHeaders, literal, serveRaw, trailers } from './raw-peer.ts';
import {
  failure,
  helloResponse,
  pipeOutput,
  type Script,
  ScriptedAgent,
  socketPair,
  tellExit,
} from './scripted-agent.ts';

const mib = 2 ** 20;
const name = `hostile-${process.pid}`;
/** How long a call is waited for, which is also how long a flood goes on. */
const limitMs = 1000;
const greeting = { hostname: '', session: 's', answerLimitMs: limitMs };
/** How long another guest may be held up, in ms: some 250 in fact, on an idle machine. */
const neighbourLimitMs = 3000;
const agents: ChildProcess[] = [];

async function start(program: string, ...args: string[]): Promise<void> {
  const agent = fork(join(import.meta.dirname, program), args, { execArgv: ['--no-warnings'] });
  agents.push(agent);
  await once(agent, 'message');
}

async function connect(path: string, answerLimitMs = limitMs): Promise<{ guest: Guest; socket: Socket }> {
  const socket = dial(`\0${path}`);
  await once(socket, 'connect');
  return { socket, guest: await Guest.connect(socket, { ...greeting, answerLimitMs }) };
}

setFlagsFromString('--expose-gc');
const collect = runInNewContext('gc') as () => void;

/** Bytes in use, those outside of V8's heap included. */
function memory(): number {
  collect();
  const { heapUsed, external } = process.memoryUsage();
  return heapUsed + external;
}

beforeAll(async () => {
  await start('hostile-agent.ts', name);
  await start('flooding-agent.ts', `${name} good`, '0');
});
afterAll(() => {
  for (const agent of agents) agent.disconnect();
});

const output = { id: 'c1', execId: '', stream: 'stdout', from: 0 } as const;
/** Sinks that nobody reads; a container's end destroys its. */
const sinks: Writable[] = [];
const stuck = () => {
  const sink = new Writable({ write: () => {} });
  sinks.push(sink);
  return sink;
};
function destroySinks(): void {
  for (const sink of sinks.splice(0)) sink.destroy();
}
const fast = () => new Writable({ write: (_chunk, _encoding, done) => setImmediate(done) });

type Victim = (guest: Guest) => Promise<unknown>;
const question: Victim = (guest) => guest.stats('c1');
const readNow: Victim = (guest) => pipeOutput(guest, output, fast(), () => {});
const readNever: Victim = (guest) => pipeOutput(guest, output, stuck(), () => {});
const relayQueries: Victim = (guest) => guest.relayQueries(async () => 'none', new AbortController().signal);
const watchListeners: Victim = (guest) => guest.watchListeners(() => {}, new AbortController().signal);
const wait: Victim = (guest) => guest.waitExit({ id: 'c1', execId: '' });

const lost = /^unavailable: the connection to the guest was lost/;
const silent = /^deadline-exceeded: the agent in the guest did not answer ReadStats within 1 s/;
/** It goes on until we end it. */
const endless = /^going on/;

/** What is called, and how that ends. */
const outcomes: Record<AttackName, readonly [Victim, RegExp]> = {
  'settings without end': [question, lost],
  'pings without end': [question, lost],
  'answers to pings that nobody sent': [question, lost],
  'resets of a stream that is closed': [question, silent],
  'empty data frames': [question, lost],
  'window updates of one byte': [question, silent],
  'priorities of streams that do not exist': [question, lost],
  'interim headers without end': [question, /^internal: Received RST_STREAM with code 1/],
  'frames of an unknown type': [question, lost],
  'continuations without end': [question, lost],
  'megabytes of headers': [question, lost],
  'streams that it opens itself': [question, lost],
  'an answer on a stream that was never opened': [question, lost],
  'the end of a stream, again and again': [question, /^unimplemented: No message received/],
  'a message of 4 GiB': [question, /^resource-exhausted: a message of 4294967295 bytes, of which 1048576 are allowed/],
  'a message that is compressed': [question, /^internal: .*: a compressed message/],
  'more than the windows allow': [question, /^(unavailable|internal|resource-exhausted): /],
  'a message in frames of one byte': [question, /^(deadline-exceeded|unavailable|internal): /],
  'output in frames of one byte': [readNever, endless],
  'output of one byte a message': [readNever, endless],
  'output of no bytes': [readNow, endless],
  'kills without end': [wait, endless],
  'listeners without end': [watchListeners, endless],
  'queries without end': [relayQueries, endless],
  'a frame of which half comes': [question, silent],
  'a line of HTTP/1.1': [question, lost],
  'the end of the connection': [question, lost],
};

describe('a guest that sends', () => {
  it.each(Object.keys(attacks) as AttackName[])('%s fails alone, and costs little', async (attack) => {
    const [victim, expected] = outcomes[attack];
    const good = await connect(`${name} good`, neighbourLimitMs);
    const { guest, socket } = await connect(`${name} ${attack}`);
    const before = memory();
    const call = victim(guest).then(
      () => 'succeeded',
      (error: unknown) => {
        expect(error).toBeInstanceOf(KilnError);
        return `${(error as KilnError).code}: ${(error as KilnError).message}`;
      },
    );
    let over = false;
    const end = Promise.race([call, delay(expected === endless ? limitMs : 20 * limitMs, 'going on')]).finally(() => {
      over = true;
    });
    // Another guest answers meanwhile.
    do {
      await good.guest.stats('c1');
      await delay(5);
    } while (!over);
    expect(await end).toMatch(expected);
    expect(memory() - before).toBeLessThan(64 * mib);
    guest[Symbol.dispose]();
    destroySinks();
    await call;
    if (!socket.closed) await once(socket, 'close');
    await good.guest.stats('c1');
    expect(memory() - before).toBeLessThan(8 * mib);
    good.guest[Symbol.dispose]();
  });

  it('kills without end is listened to fifty times a second', async () => {
    const { guest } = await connect(`${name} kills without end`);
    let reports = 0;
    const watching = guest.waitExit({ id: 'c1', execId: '' }, () => {
      reports += 1;
    });
    await delay(500);
    expect(reports).toBeGreaterThan(0);
    expect(reports).toBeLessThanOrEqual(26);
    guest[Symbol.dispose]();
    await expect(watching).rejects.toMatchObject({ code: 'unavailable' });
  });
});

describe('a guest that, instead of Hello,', () => {
  const greet = async (play: (theirs: Socket) => void, end: RegExp) => {
    const [socket, theirs] = await socketPair();
    const closed = new Promise((resolve) => socket.once('close', resolve));
    play(theirs);
    const failed = await Guest.connect(socket, greeting).catch((error: KilnError) => `${error.code}: ${error.message}`);
    expect(failed).toMatch(end);
    await closed;
    theirs.destroy();
  };

  it('never answers is given up', () =>
    greet(
      (theirs) => serveRaw(theirs, () => {}),
      /^deadline-exceeded: the agent in the guest did not answer Hello within 1 s/,
    ));

  it('never reads is given up', () => greet((theirs) => theirs.pause(), /^deadline-exceeded: .* Hello within 1 s/));

  it('sends garbage is told of', () =>
    greet((theirs) => theirs.write(Buffer.alloc(100_000, 'garbage ')), /^unavailable: /));

  it('sends a frame longer than was agreed is told of', () =>
    greet((theirs) => theirs.write(Buffer.from([0xff, 0xff, 0xff, 4, 0, 0, 0, 0, 0])), /^unavailable: /));

  it('hangs up is told of', () => greet((theirs) => theirs.destroy(), /^unavailable: /));
});

describe('a guest that answers', () => {
  const guestOf = async (script: Script): Promise<Guest> => {
    const [socket, theirs] = await socketPair();
    new ScriptedAgent(script).serve(theirs);
    return Guest.connect(socket, { ...greeting, answerLimitMs: 30_000 });
  };
  const errorOf = (promise: Promise<unknown>): Promise<string> =>
    promise.then(
      () => 'succeeded',
      (error: KilnError) => `${error.code}: ${error.message}`,
    );
  const noise = '\u001b[2J\u0007\n\u202e'.repeat(40_000);

  it('Hello with absurd facts has its texts cut, and no time in the future', async () => {
    const hello: Script['hello'] = (_call, done) =>
      done(
        null,
        helloResponse({
          ...{ kernelRelease: `6.1${noise}`, bootId: noise, memoryBytes: 2n ** 64n - 1n, vcpus: 2 ** 32 - 1 },
          ...{ agentStartedNs: 2n ** 64n - 1n, answeredNs: 0n },
        }),
      );
    using guest = await guestOf({ hello });
    const { facts } = guest;
    for (const text of [facts.kernelRelease, facts.bootId]) {
      expect(text.length).toBeLessThanOrEqual(128);
      expect(printable(text)).toBe(text);
      expect(text).not.toContain('\n');
    }
    expect(facts.kernelRelease).toMatch(/^6\.1/);
    expect(facts.agentStartedAtMs).toBeLessThanOrEqual(Date.now());
  });

  it('Hello from before there were clocks is from their beginning', async () => {
    const hello: Script['hello'] = (_call, done) =>
      done(null, helloResponse({ agentStartedNs: 0n, answeredNs: 2n ** 64n - 1n }));
    using guest = await guestOf({ hello });
    expect(guest.facts.agentStartedAtMs).toBe(0);
  });

  it('Hello of another version names it, cut', async () => {
    const hello: Script['hello'] = (_call, done) =>
      done(null, helloResponse({ protocol: 9 as never, kilnVersion: noise }));
    const error = await errorOf(guestOf({ hello }));
    expect(error).toMatch(/^failed-precondition: the guest image speaks agent protocol 9/);
    expect(error.length).toBeLessThan(400);
  });

  it.each([0, 2 ** 22 + 1, 2 ** 32 - 1])('with process id %i is not believed', async (pid) => {
    using guest = await guestOf({
      execProcess: (_call, done) => done(null, { pid }),
      listProcesses: (_call, done) => done(null, { processes: [{ pid, execId: noise.slice(0, 1000), init: false }] }),
    });
    const refused = `internal: the agent in the guest names a process ${pid}, which cannot be`;
    const stdio = { stdin: false, stdout: false, stderr: false, terminal: false, size: undefined };
    expect(await errorOf(guest.exec({ id: 'c1', execId: 'e' }, '{}', stdio))).toBe(refused);
    expect(await errorOf(guest.processes('c1'))).toBe(refused);
  });

  it('with a million processes is refused, and with what a megabyte holds is not', async () => {
    let count = 1_000_000;
    using guest = await guestOf({
      listProcesses: (_call, done) =>
        done(null, { processes: Array.from({ length: count }, (_, i) => ({ pid: i + 1, execId: '', init: false })) }),
    });
    expect(await errorOf(guest.processes('c1'))).toMatch(/^resource-exhausted: a message of \d+ bytes, of which/);
    count = 80_000;
    expect(await guest.processes('c1')).toHaveLength(count);
  });

  it('with an exit status beyond a byte has its last eight bits, whatever it says to have written', async () => {
    using guest = await guestOf({
      waitProcess: (call) => tellExit(call, { exitStatus: 0xffff_ff07, stdoutBytes: 2n ** 64n - 1n }),
    });
    expect(await guest.waitExit({ id: 'c1', execId: '' })).toMatchObject({ status: 7, written: { stderr: undefined } });
  });

  it.each(['unified', 'legacy'] as const)('with the largest counts can be told to containerd (%s)', async (mode) => {
    const most = 2n ** 64n - 1n;
    const all = Object.fromEntries(
      'usage_usec user_usec system_usec throttled_usec oom_kill max anon file __proto__ constructor'
        .split(' ')
        .map((key) => [key, most]),
    );
    const values = Object.fromEntries(
      'memory.current memory.max memory.peak memory.swap.current memory.swap.max pids.current pids.max'
        .split(' ')
        .map((key) => [key, most]),
    );
    const device = { major: 2 ** 32 - 1, minor: 2 ** 32 - 1, rbytes: most, wbytes: most, rios: most, wios: most };
    using guest = await guestOf({
      readStats: (_call, done) =>
        done(
          null,
          ReadStatsResponse.fromPartial({
            ...{ cpu: all, memory: all, memoryEvents: all, values, cpuQuotaUs: most, cpuPeriodUs: most },
            io: new Array(5000).fill(device),
          }),
        ),
    });
    const stats = await guest.stats('c1');
    expect(stats.io).toHaveLength(1024);
    expect(stats.cpu.usage_usec).toBe(2n ** 53n);
    expect(toMetrics(stats, mode).value.length).toBeGreaterThan(100);
  });

  it('with a status that gRPC does not have, or a long message, is an error of known form', async () => {
    using strange = await guestOf({
      startContainer: (_call, done) => done({ code: 999 as never, details: `no${noise.slice(0, 9000)}` }),
      pauseContainer: (_call, done) => done(failure('UNAVAILABLE', 'not lost at all')),
    });
    const error = await errorOf(strange.startContainer('c1'));
    expect(error).toMatch(/^unknown: no\n/);
    expect(error.length).toBeLessThan(4200);
    expect(await errorOf(strange.pauseContainer('c1'))).toMatch(/^unavailable: /);
  });

  it.each(['0', '', 'NaN', '-1', '1e9'])('with status "%s" and no message fails', async (code) => {
    const [socket, theirs] = await socketPair();
    serveRaw(theirs, (stream) => {
      theirs.write(Buffer.concat([answerHeaders(stream), trailers(stream, [literal('grpc-status', code)])]));
    });
    expect(await errorOf(Guest.connect(socket, greeting))).toMatch(/^(unimplemented|unknown): /);
    theirs.destroy();
  });
});
