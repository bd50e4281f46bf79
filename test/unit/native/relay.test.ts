import { execFileSync } from 'node:child_process';
import { once } from 'node:events';
import { constants, existsSync, openSync, readdirSync, readFileSync, readlinkSync, rmSync, statSync } from 'node:fs';
import { open } from 'node:fs/promises';
import net from 'node:net';
import path from 'node:path';
import { performance } from 'node:perf_hooks';
import fc from 'fast-check';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { decodeReply, encodeFrame, messageType, statusCode } from '../../../src/rpc/ttrpc/index.ts';
import { compile, hasGcc, isAlive, launcherSources, run, temporaryFolder } from './harness.ts';
import { call, FakeKilnd, type Frames, gone, privateBytes, Queue, RelayBench } from './relay-bench.ts';

const maxData = 4 << 20;

/** What a failed call says: code and message. */
function failureOf(data: Uint8Array): string {
  try {
    decodeReply(data);
  } catch (error) {
    const { code, message } = error as { code: number; message: string };
    return `${code}: ${message}`;
  }
  return 'no failure';
}

describe.skipIf(!hasGcc)('the relay (needs gcc)', () => {
  let folder: string;
  let compiled: string;
  let bench: RelayBench;
  let kilnd: FakeKilnd;

  beforeAll(() => {
    folder = temporaryFolder();
    compiled = path.join(folder, 'launcher');
    compile(launcherSources, compiled, ['-DUNAVAILABLE_AFTER_MS=400', '-DHOLD_LIMIT=4']);
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));
  beforeEach(async () => {
    bench = new RelayBench(compiled);
    kilnd = await FakeKilnd.listen(bench);
  });
  afterEach(async () => {
    await kilnd.die();
    bench[Symbol.dispose]();
  });

  /** A client of containerd that has said something, and so has a session with kilnd. */
  async function connected(id = 'one') {
    const client = await bench.dial(id);
    client.send(0, 99, 'hello');
    const session = await kilnd.sessions.next();
    expect((await session.received.next()).data.toString()).toBe('hello');
    return { client, session };
  }

  /** kilnd dies, the relay starts another one, which serves. */
  async function restartKilnd(): Promise<void> {
    await kilnd.die();
    const start = await bench.starts.next();
    kilnd = await FakeKilnd.listen(bench);
    start.end('ready\n');
  }

  describe('start', () => {
    test('leaves a relay of nobody, and its output ends at once', async () => {
      const { header, socket } = await bench.startRelay(kilnd);
      const pid = header.relayPid;
      expect(isAlive(pid)).toBe(true);
      expect(readFileSync(`/proc/${pid}/comm`, 'utf8')).toBe('kiln-relay\n');
      expect(readFileSync(`/proc/${pid}/cmdline`, 'utf8').replace(/\0+$/, '')).toBe(
        `kiln-relay default one ${bench.socketOf('one')}`,
      );
      expect(readlinkSync(`/proc/${pid}/cwd`)).toBe('/');
      const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
        .replace(/^.*\) /, '')
        .split(' ');
      expect(Number(stat[3])).toBe(pid); // a session of its own
      const descriptors = readdirSync(`/proc/${pid}/fd`).map((fd) => readlinkSync(`/proc/${pid}/fd/${fd}`));
      expect(descriptors.filter((target) => target === '/dev/null')).toHaveLength(3);
      // The socket that it listens on, and the keeper connection.
      expect(descriptors.filter((target) => target.startsWith('socket:'))).toHaveLength(2);
      expect(descriptors).toHaveLength(5);
      expect(statSync(bench.socketOf('one')).mode & 0o777).toBe(0o600);
      const permitted = execFileSync('sh', [
        '-c',
        'echo -999 2>/dev/null >/proc/self/oom_score_adj; cat /proc/self/oom_score_adj',
      ]);
      expect(readFileSync(`/proc/${pid}/oom_score_adj`, 'utf8')).toBe(permitted.toString());
      expect(header).toMatchObject({
        role: 'keeper',
        socketPath: bench.socketOf('one'),
        context: { namespace: 'default', id: 'one', bundle: bench.bundle, address: '/run/c.sock', ttrpcAddress: '' },
      });
      expect(socket.destroyed).toBe(false);
    });

    test('finds a relay that lives, and replaces a dead one', async () => {
      const first = await bench.startRelay(kilnd);
      expect((await bench.start()).text).toBe(`unix://${bench.socketOf('one')}`);
      expect(isAlive(first.header.relayPid)).toBe(true);
      process.kill(first.header.relayPid, 'SIGKILL');
      await first.closed;
      expect(existsSync(bench.socketOf('one'))).toBe(true);
      const second = await bench.startRelay(kilnd);
      expect(second.header.relayPid).not.toBe(first.header.relayPid);
      const { client, session } = await connected();
      client.request(1, 'x');
      expect((await session.received.next()).data.toString()).toBe('x');
    });

    test('ten times at once makes one relay', async () => {
      const outcomes = await Promise.all(Array.from({ length: 10 }, () => bench.start()));
      expect(new Set(outcomes.map(({ text }) => text))).toEqual(new Set([`unix://${bench.socketOf('one')}`]));
      const keeper = await kilnd.keepers.next();
      const { client, session } = await connected();
      client.request(1, 'x');
      expect((await session.received.next()).data.toString()).toBe('x');
      expect(kilnd.keepers.size).toBe(0);
      keeper.say('end');
      session.socket.end();
      await gone(keeper.header.relayPid);
    });

    test('that cannot listen says where, on stdout alone', async () => {
      rmSync(path.join(bench.stateDir, 's'), { recursive: true });
      expect(await bench.start()).toMatchObject({ code: 1, stderr: '', text: expect.stringContaining('/s/one') });
    });

    test('costs little more than before, and a relay costs little memory', async () => {
      for (let n = 0; n < 5; n += 1) await bench.startRelay(kilnd, `warm-${n}`);
      const times: number[] = [];
      for (let n = 0; n < 20; n += 1) {
        const from = performance.now();
        await bench.launch(['-namespace', 'default', '-id', `c${n}`, 'start']);
        times.push(performance.now() - from);
        const keeper = await kilnd.keepers.next();
        keeper.say('end');
      }
      const { client, session } = await connected('warm-0');
      client.request(1, call('Wait'));
      await session.received.next();
      const keeper = await bench.startRelay(kilnd, 'measured');
      const other = await connected('measured');
      other.client.request(1, call('Wait'));
      await other.session.received.next();
      const bytes = privateBytes(keeper.header.relayPid);
      console.info(
        `start: median ${times.sort((a, b) => a - b)[10]?.toFixed(2)} ms; relay: ${bytes / 1024} KiB private`,
      );
      expect(bytes).toBeLessThan(200 * 1024);
    });
  });

  describe('frames', () => {
    test('go through byte for byte, up to 4 MiB, both ways', async () => {
      await bench.startRelay(kilnd);
      const { client, session } = await connected();
      expect(session.header).toMatchObject({ role: 'session', client: 1, replayed: 0 });
      for (const [streamId, length] of [0, 1, 511, 512, 513, 70_000, maxData].entries()) {
        const data = Buffer.from(Array.from({ length }, (_, n) => (n * 31 + length) & 0xff));
        client.send(2 * streamId + 1, messageType.request, data, 0x5);
        const arrived = await session.received.next();
        expect(arrived).toMatchObject({ streamId: 2 * streamId + 1, type: 1, flags: 0x5 });
        expect(arrived.data.equals(data)).toBe(true);
        session.send(2 * streamId + 1, messageType.response, data, 0xff);
        const back = await client.received.next();
        expect(back).toMatchObject({ streamId: 2 * streamId + 1, type: 2, flags: 0xff });
        expect(back.data.equals(data)).toBe(true);
      }
    });

    test('of other types go through, too, and responses in any order', async () => {
      await bench.startRelay(kilnd);
      const { client, session } = await connected();
      client.request(1, 'a');
      client.request(3, 'b');
      client.send(3, messageType.data, 'c', 1);
      client.send(8, 77, 'd');
      const seen: string[] = [];
      for (let n = 0; n < 4; n += 1) {
        const { streamId, type, data } = await session.received.next();
        seen.push(`${streamId} ${type} ${data}`);
      }
      expect(seen).toEqual(['1 1 a', '3 1 b', '3 3 c', '8 77 d']);
      session.respond(3, 'B');
      session.send(1, messageType.data, 'part');
      session.respond(1, 'A');
      const back: string[] = [];
      for (let n = 0; n < 3; n += 1) back.push((await client.received.next()).data.toString());
      expect(back).toEqual(['B', 'part', 'A']);
    });

    test('of many clients do not mix', async () => {
      await bench.startRelay(kilnd);
      const clients = await Promise.all(Array.from({ length: 100 }, () => bench.dial()));
      for (const [n, client] of clients.entries()) client.request(1, `from ${n}`);
      for (let n = 0; n < clients.length; n += 1) {
        const session = await kilnd.sessions.next();
        void session.received.next().then(({ data }) => session.respond(1, `to ${data}`));
      }
      const answers = await Promise.all(clients.map((client) => client.received.next()));
      expect(answers.map(({ data }) => data.toString())).toEqual(clients.map((_, n) => `to from ${n}`));
    });

    test('split at random go through whole and in order', async () => {
      await bench.startRelay(kilnd);
      const { client, session } = await connected();
      let streamId = 1;
      const pieces = async (from: Frames, bytes: Buffer, cuts: readonly number[]) => {
        let at = 0;
        for (const cut of [...cuts, bytes.length]) {
          const end = Math.min(bytes.length, at + 1 + (cut % 20_000));
          if (end > at && !from.socket.write(bytes.subarray(at, end))) await once(from.socket, 'drain');
          at = end;
          await new Promise(setImmediate);
        }
        from.socket.write(bytes.subarray(at));
      };
      const lengths = fc.array(fc.oneof(fc.nat(30), fc.nat(100_000)), { minLength: 1, maxLength: 12 });
      await fc.assert(
        fc.asyncProperty(lengths, fc.array(fc.nat(), { maxLength: 30 }), async (sizes, cuts) => {
          const frames = sizes.map((size) => {
            streamId += 2;
            return { streamId, data: Buffer.alloc(size, streamId) };
          });
          const bytes = (type: number) =>
            Buffer.concat(frames.map((frame) => encodeFrame({ streamId: frame.streamId, type, flags: 0 }, frame.data)));
          for (const [from, to, type] of [
            [client, session, messageType.request],
            [session, client, messageType.response],
          ] as const) {
            await pieces(from, bytes(type), cuts);
            for (const frame of frames) {
              const arrived = await to.received.next();
              expect(arrived.streamId).toBe(frame.streamId);
              expect(arrived.data.equals(frame.data)).toBe(true);
            }
          }
        }),
        { seed: 7, numRuns: 60 },
      );
    });

    test('a frame above 4 MiB is refused on its stream, skipped, and the connection goes on', async () => {
      await bench.startRelay(kilnd);
      const { client, session } = await connected();
      const header = Buffer.alloc(10);
      header.writeUInt32BE(maxData + 1, 0);
      header.writeUInt32BE(5, 4);
      header.writeUInt8(messageType.request, 8);
      client.socket.write(header);
      const refused = await client.received.next();
      expect(refused).toMatchObject({ streamId: 5, type: messageType.response });
      expect(failureOf(refused.data)).toBe(
        `${statusCode.ResourceExhausted}: message length 4194305 exceed maximum message size of 4194304`,
      );
      client.socket.write(Buffer.alloc(maxData + 1, 0xff));
      client.request(7, 'after it');
      expect((await session.received.next()).data.toString()).toBe('after it');
    });

    test('a client that disappears ends its session, and no other', async () => {
      await bench.startRelay(kilnd);
      const one = await connected();
      const two = await connected();
      one.client.request(1, 'last words');
      one.client.socket.end();
      expect((await one.session.received.next()).data.toString()).toBe('last words');
      await one.session.closed;
      two.client.request(1, 'x');
      expect((await two.session.received.next()).data.toString()).toBe('x');
    });

    test('a client that does not read its answers holds back kilnd, not the other clients', async () => {
      await bench.startRelay(kilnd);
      const lazy = await connected();
      lazy.client.socket.pause();
      for (let n = 0; n < 8; n += 1) lazy.session.respond(2 * n + 1, Buffer.alloc(1 << 20));
      const busy = await connected();
      busy.client.request(1, 'x');
      busy.session.respond(1, (await busy.session.received.next()).data);
      expect((await busy.client.received.next()).data.toString()).toBe('x');
      expect(lazy.session.socket.writableLength).toBeGreaterThan(4 << 20);
      lazy.client.socket.resume();
      for (let n = 0; n < 8; n += 1) expect((await lazy.client.received.next()).data).toHaveLength(1 << 20);
    });

    test('a client with too much unanswered is not read from until something is answered', async () => {
      await bench.startRelay(kilnd);
      const { client, session } = await connected();
      for (let n = 0; n < 10; n += 1) client.request(2 * n + 1, Buffer.alloc(maxData));
      for (let n = 0; n < 8; n += 1) await session.received.next();
      // 32 MiB wait for an answer now; the ninth frame comes when one of them has it.
      session.send(99, messageType.data, 'mark');
      await client.received.next();
      expect(session.received.size).toBe(0);
      expect(client.socket.writableLength).toBeGreaterThan(0);
      session.respond(1, '');
      session.respond(3, '');
      expect((await session.received.next()).streamId).toBe(17);
      expect((await session.received.next()).streamId).toBe(19);
    });
  });

  describe('kilnd that dies', () => {
    test('in the middle of a response leaves only whole frames to containerd, and the next one answers', async () => {
      await bench.startRelay(kilnd);
      const { client, session } = await connected();
      client.request(1, call('State'));
      client.request(3, call('Pids'));
      await session.received.next();
      await session.received.next();
      session.respond(3, 'whole');
      session.socket.write(encodeFrame({ streamId: 1, type: 2, flags: 0 }, Buffer.alloc(5000, 'a')).subarray(0, 3000));
      await restartKilnd();
      const next = await kilnd.sessions.next();
      expect(next.header).toMatchObject({ client: 1, replayed: 1 });
      expect(await next.received.next()).toMatchObject({ streamId: 1, data: call('State') });
      next.respond(1, 'from the next');
      expect((await client.received.next()).data.toString()).toBe('whole');
      expect((await client.received.next()).data.toString()).toBe('from the next');
      expect(client.decoder.midFrame).toBe(false);
    });

    test('has its unanswered requests sent to the next, in order and marked, and those that came meanwhile', async () => {
      await bench.startRelay(kilnd);
      const { client, session } = await connected();
      for (const id of [1, 3, 5, 7, 9]) client.request(id, `request ${id}`);
      for (let n = 0; n < 5; n += 1) await session.received.next();
      session.respond(7, '');
      session.respond(1, '');
      await client.received.next();
      await client.received.next();
      await kilnd.die();
      const start = await bench.starts.next();
      client.request(11, 'request 11');
      kilnd = await FakeKilnd.listen(bench);
      start.end('ready\n');
      const next = await kilnd.sessions.next();
      expect(next.header.replayed).toBe(3);
      const order: number[] = [];
      for (let n = 0; n < 4; n += 1) order.push((await next.received.next()).streamId);
      expect(order).toEqual([3, 5, 9, 11]);
      for (const id of order) next.respond(id, `answer ${id}`);
      for (const id of order) expect((await client.received.next()).data.toString()).toBe(`answer ${id}`);
      expect(client.socket.destroyed).toBe(false);
    });

    test('again and again does not end a Wait', async () => {
      const { header } = await bench.startRelay(kilnd);
      const { client, session } = await connected();
      client.request(1, call('Wait', 'x'));
      await session.received.next();
      for (let life = 0; life < 6; life += 1) {
        await restartKilnd();
        expect((await kilnd.keepers.next()).header).toEqual(header);
        const next = await kilnd.sessions.next();
        expect(next.header.replayed).toBe(1);
        expect((await next.received.next()).data).toEqual(call('Wait', 'x'));
        if (life === 5) next.respond(1, 'exit');
      }
      expect((await client.received.next()).data.toString()).toBe('exit');
    });

    test('at any moment leaves each request with one answer', async () => {
      await bench.startRelay(kilnd);
      const moments = fc.array(fc.record({ answers: fc.nat(8), bytes: fc.nat(3000) }), { maxLength: 4 });
      const sizes = fc.array(fc.nat(60), { minLength: 1, maxLength: 20 });
      await fc.assert(
        fc.asyncProperty(moments, sizes, async (deaths, lengths) => {
          const client = await bench.dial();
          const sent = new Map(lengths.map((length, n) => [2 * n + 1, call('Wait', 'x'.repeat(length))]));
          for (const [id, request] of sent) client.request(id, request);
          for (const { answers, bytes } of deaths) {
            const session = await kilnd.sessions.next();
            for (let n = 0; n < Math.min(answers, session.header.replayed); n += 1) {
              const { streamId, data } = await session.received.next();
              session.respond(streamId, data);
            }
            // The beginning of an answer that never comes to its end.
            const half = encodeFrame({ streamId: 1, type: messageType.response, flags: 0 }, Buffer.alloc(4000));
            await new Promise((resolve) => session.socket.write(half.subarray(0, bytes), resolve));
            kilnd.drop();
            await kilnd.keepers.next();
          }
          const session = await kilnd.sessions.next();
          const answered = new Map<number, Buffer>();
          const answering = (async () => {
            for (;;) {
              const { streamId, data } = await session.received.next();
              session.respond(streamId, data);
            }
          })();
          void answering;
          while (answered.size < sent.size) {
            const { streamId, data } = await client.received.next();
            expect(answered.has(streamId)).toBe(false);
            answered.set(streamId, data);
          }
          expect(new Map([...answered].sort(([a], [b]) => a - b))).toEqual(sent);
          expect([client.received.size, client.decoder.midFrame]).toEqual([0, false]);
          client.socket.end();
          await client.closed;
        }),
        { seed: 11, numRuns: 40 },
      );
    });

    test('each time it is given a request is given it no more', async () => {
      await bench.startRelay(kilnd);
      const { client, session } = await connected();
      client.request(1, call('Create'));
      await session.received.next();
      for (let life = 0; life < 3; life += 1) {
        await restartKilnd();
        await (await kilnd.sessions.next()).received.next();
      }
      await restartKilnd();
      const { data } = await client.received.next();
      expect(failureOf(data)).toBe(`${statusCode.Unavailable}: kilnd ended 4 times before it answered this request`);
      expect((await kilnd.sessions.next()).header.replayed).toBe(0);
    });

    test('and cannot be started: requests fail in time with the reason, Wait goes on waiting', async () => {
      await bench.startRelay(kilnd);
      const { client, session } = await connected();
      client.request(1, call('Wait'));
      client.request(3, call('Kill'));
      await session.received.next();
      await session.received.next();
      bench.installKilnd('#!/bin/sh\necho "error: no guest image" >&3\n');
      await kilnd.die();
      const from = performance.now();
      const failed = await client.received.next();
      expect(failed.streamId).toBe(3);
      expect(failureOf(failed.data)).toBe('14: kilnd is not running and cannot be started: no guest image');
      expect(performance.now() - from).toBeGreaterThan(300);
      expect(performance.now() - from).toBeLessThan(5000);
      client.request(5, call('State'));
      expect((await client.received.next()).streamId).toBe(5);
      // Once there is a kilnd again it is found, and has the Wait.
      kilnd = await FakeKilnd.listen(bench);
      const next = await kilnd.sessions.next();
      expect(next.header.replayed).toBe(1);
      expect((await next.received.next()).data).toEqual(call('Wait'));
      client.request(7, call('State'));
      expect((await next.received.next()).streamId).toBe(7);
    });

    test('is started once by many relays', async () => {
      const ids = Array.from({ length: 12 }, (_, n) => `c${n}`);
      await Promise.all(ids.map((id) => bench.startRelay(kilnd, id)));
      await restartKilnd();
      const back = new Set<string>();
      for (const _ of ids) back.add((await kilnd.keepers.next()).header.context.id);
      expect(back.size).toBe(ids.length);
      expect(bench.starts.size).toBe(0);
    });

    test('is not started for a container whose bundle has gone', async () => {
      const { header } = await bench.startRelay(kilnd);
      rmSync(bench.bundle, { recursive: true });
      await kilnd.die();
      await gone(header.relayPid);
      expect(existsSync(bench.socketOf('one'))).toBe(false);
      expect(bench.starts.size).toBe(0);
    });

    test('or only closes a session, as for garbage, gets another session with what it has not answered', async () => {
      const keeper = await bench.startRelay(kilnd);
      const { client, session } = await connected();
      client.request(1, 'x');
      await session.received.next();
      session.socket.write(Buffer.alloc(64, 0xee)); // a header that announces 4 GB
      await session.closed;
      const next = await kilnd.sessions.next();
      expect(next.header.replayed).toBe(1);
      next.respond(1, 'y');
      expect((await client.received.next()).data.toString()).toBe('y');
      expect(keeper.socket.destroyed).toBe(false);
    });
  });

  describe('the keeper connection', () => {
    async function fifo(name = 'fifo'): Promise<string> {
      const file = path.join(bench.folder, name);
      execFileSync('mkfifo', [file]);
      return file;
    }

    test('hold keeps a FIFO open for both sides, also while kilnd is away, until release', async () => {
      const keeper = await bench.startRelay(kilnd);
      const file = await fifo();
      expect(await keeper.ask(`hold ${file}`)).toBe('ok');
      expect(await keeper.ask(`hold ${file}`)).toBe('ok');
      const fd = openSync(file, constants.O_RDONLY | constants.O_NONBLOCK);
      const reader = new net.Socket({ fd, readable: true, writable: false });
      const chunks = new Queue<string>();
      reader.on('data', (chunk) => chunks.push(chunk.toString()));
      let ended = false;
      reader.on('end', () => {
        ended = true;
      });
      const write = async (text: string) => {
        const writer = await open(file, 'w');
        await writer.write(text);
        await writer.close();
        expect(await chunks.next()).toBe(text);
      };
      await write('one');
      await restartKilnd();
      const next = await kilnd.keepers.next();
      await write('two');
      expect(ended).toBe(false);
      const end = once(reader, 'end');
      expect(await next.ask(`release ${file}`)).toBe('ok');
      await end;
      reader.destroy();
    });

    test('hold of what is no FIFO, or cannot be opened, is refused with the reason', async () => {
      const keeper = await bench.startRelay(kilnd);
      expect(await keeper.ask(`hold ${bench.folder}`)).toBe('error it is not a FIFO');
      expect(await keeper.ask('hold /dev/null')).toBe('error it is not a FIFO');
      expect(await keeper.ask('hold /no/such/fifo')).toBe('error No such file or directory');
      expect(await keeper.ask('hold relative')).toBe('error the path is not absolute');
      expect(await keeper.ask('release /no/such/fifo')).toBe('ok');
      expect(await keeper.ask('dance')).toBe('error unknown message');
    });

    test('hold of too many FIFOs is refused, and one that is released makes room', async () => {
      const keeper = await bench.startRelay(kilnd);
      const files = await Promise.all(['a', 'b', 'c', 'd', 'e'].map((name) => fifo(name)));
      const answers: string[] = [];
      for (const file of files) answers.push(await keeper.ask(`hold ${file}`));
      expect(answers).toEqual(['ok', 'ok', 'ok', 'ok', 'error too many FIFOs are held']);
      await keeper.ask(`release ${files[0]}`);
      expect(await keeper.ask(`hold ${files[4]}`)).toBe('ok');
    });

    test('hold follows a path that has become another FIFO', async () => {
      const keeper = await bench.startRelay(kilnd);
      const file = await fifo();
      await keeper.ask(`hold ${file}`);
      rmSync(file);
      await fifo();
      expect(await keeper.ask(`hold ${file}`)).toBe('ok');
      const held = readdirSync(`/proc/${keeper.header.relayPid}/fd`)
        .map((fd) => readlinkSync(`/proc/${keeper.header.relayPid}/fd/${fd}`))
        .filter((target) => target.startsWith(bench.folder));
      expect(held).toEqual([file]);
    });

    test('thousands of messages at once are all answered, in order', async () => {
      const keeper = await bench.startRelay(kilnd);
      const file = await fifo('f');
      const messages = Array.from({ length: 5000 }, (_, n) => (n % 2 === 0 ? `hold ${file}` : 'hold /nowhere'));
      keeper.say(...messages);
      for (let n = 0; n < messages.length; n += 1) {
        expect(await keeper.answers.next()).toBe(n % 2 === 0 ? 'ok' : 'error No such file or directory');
      }
    });

    test('a message without an end costs kilnd the connection, and nothing else', async () => {
      const keeper = await bench.startRelay(kilnd);
      const { client, session } = await connected();
      keeper.socket.write(Buffer.alloc(10_000, 'x'));
      await keeper.closed;
      await kilnd.keepers.next();
      client.request(1, 'x');
      expect((await session.received.next()).data.toString()).toBe('x');
    });

    test('end: nobody connects any more, sessions go on to their end, then clients and relay are gone', async () => {
      const keeper = await bench.startRelay(kilnd);
      const { client, session } = await connected();
      client.request(1, 'x');
      await session.received.next();
      keeper.say('end');
      while (existsSync(bench.socketOf('one'))) await new Promise(setImmediate);
      await expect(bench.dial()).rejects.toThrow(/ENOENT/);
      session.respond(1, 'last');
      expect((await client.received.next()).data.toString()).toBe('last');
      session.socket.end();
      await Promise.all([client.closed, keeper.closed]);
      await gone(keeper.header.relayPid);
      expect(bench.starts.size).toBe(0);
    });

    test('end: a client that does not take its answers is not waited for long', async () => {
      const keeper = await bench.startRelay(kilnd);
      const { client, session } = await connected();
      client.socket.pause();
      for (let n = 0; n < 4; n += 1) session.respond(2 * n + 1, Buffer.alloc(1 << 20));
      keeper.say('end');
      session.socket.destroy();
      await keeper.closed;
      await gone(keeper.header.relayPid);
    });

    test("end: a socket that is another relay's by now stays", async () => {
      const old = await bench.startRelay(kilnd);
      rmSync(bench.socketOf('one')); // as kilnd does in a delete
      const fresh = await bench.startRelay(kilnd);
      old.say('end');
      await gone(old.header.relayPid);
      const { client, session } = await connected();
      expect(session.header.relayPid).toBe(fresh.header.relayPid);
      client.request(1, 'x');
      expect((await session.received.next()).data.toString()).toBe('x');
    });

    test('without a welcome there is no session, and requests fail in time', async () => {
      kilnd.welcomes = false;
      const keeper = await bench.startRelay(kilnd);
      const client = await bench.dial();
      client.request(1, call('Create'));
      expect(failureOf((await client.received.next()).data)).toMatch(/^14: kilnd is not running .*it does not answer$/);
      expect(kilnd.sessions.size).toBe(0);
      keeper.say('welcome');
      await keeper.ask('release /');
      client.request(3, call('Create'));
      expect((await (await kilnd.sessions.next()).received.next()).streamId).toBe(3);
    });
  });

  test('the launcher refuses an answer without the end of a socket path', async () => {
    await kilnd.die();
    const server = net.createServer({ allowHalfOpen: true }, (socket) =>
      socket.resume().on('end', () => socket.end('\0x')),
    );
    server.listen(path.join(bench.stateDir, 'kilnd.sock'));
    await once(server, 'listening');
    const outcome = await run(bench.launcher, ['-namespace', 'n', '-id', 'i', 'start'], {
      cwd: bench.bundle,
      env: bench.environment(),
    });
    server.close();
    expect(outcome).toMatchObject({ code: 1, text: expect.stringContaining('of different versions') });
  });
});
