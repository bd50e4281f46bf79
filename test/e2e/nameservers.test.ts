import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, vi } from 'vitest';
import { NetworkNamespace } from '../../src/sys/netns.ts';
import { underKiln } from '../support/paths.ts';
import { Lines, mustRun, type RunningProgram, stream } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';
import { signal, waitForEnd } from '../support/wait-for-end.ts';

// A name server at 127.0.0.11 of the network namespace that a container has on the host, as Docker puts it there.

/**
 * A program for Node: the name server, RFC 1035. "big.test" has more addresses than a datagram takes; the answers to
 * "one.test" and "two.test" come when both were asked for.
 */
const nameServer = `
  const records = (count) => Array.from({ length: count }, () => Buffer.from('c00c000100010000003c00040a0b0c0d', 'hex'));
  const waiting = new Map();
  const answer = (query, byTcp, send) => {
    const end = query.indexOf(0, 12) + 5;
    const name = query.toString('latin1', 13, end - 5);
    const isAddress = query.readUInt16BE(end - 4) === 1;
    const truncated = name.startsWith('big') && !byTcp;
    const count = truncated || !isAddress ? 0 : name.startsWith('big') ? 200 : 1;
    const head = Buffer.from([query[0], query[1], truncated ? 0x83 : 0x81, 0x80, 0, 1, 0, count, 0, 0, 0, 0]);
    const reply = () => send(Buffer.concat([head, query.subarray(12, end), ...records(count)]));
    if (!/^(one|two)/.test(name)) return reply();
    waiting.set(name, reply);
    if (waiting.size === 2) for (const each of waiting.values()) each();
  };
  const socket = require('node:dgram').createSocket('udp4');
  socket.on('message', (query, { port, address }) => answer(query, false, (data) => socket.send(data, port, address)));
  const server = require('node:net').createServer((each) => {
    each.on('error', () => {});
    each.once('data', (data) => answer(data.subarray(2), true, (message) => {
      each.write(Buffer.from([message.length >> 8, message.length & 255]));
      each.write(message);
    }));
  });
  socket.bind(53, '127.0.0.11', () => server.listen(53, '127.0.0.11', () => console.log('ready')));
`;

describe.runIf(underKiln)('a container whose name server is in its network namespace on the host', () => {
  const scene = useScene({ version: '2.1' });
  const folder = mkdtempSync(join(tmpdir(), 'kt-dns-'));
  const resolvConf = join(folder, 'resolv.conf');
  let namespace: NetworkNamespace;
  let server: RunningProgram;
  const inside = (...command: string[]) => ['nsenter', [`--net=${path()}`, ...command]] as const;
  const path = () => `/proc/${process.pid}/fd/${namespace.fd}`;

  const serve = async () => {
    server = stream(...inside(process.execPath, '-e', nameServer), { timeout: 600_000 });
    await new Lines(server.stdout).waitFor((line) => line === 'ready', 'the name server');
  };
  beforeAll(async () => {
    namespace = NetworkNamespace.create();
    await mustRun(...inside('ip', 'link', 'set', 'lo', 'up'));
  });
  beforeEach(() => writeFileSync(resolvConf, 'nameserver 127.0.0.11\n'));
  afterEach(() => server?.[Symbol.asyncDispose]());
  afterAll(() => {
    namespace[Symbol.dispose]();
    rmSync(folder, { recursive: true });
  });

  const flags = () => [
    ...['--with-ns', `network:${path()}`],
    ...['--mount', `type=bind,src=${resolvConf},dst=/etc/resolv.conf,options=rbind:rw`],
  ];
  const start = async () => {
    const id = scene.id('dns');
    await scene.start(id, ['sleep', '100000'], { flags: flags() });
    return id;
  };
  const exec = async (id: string, script: string) => {
    const args = ['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', scene.id('exec'), id, 'sh', '-c', script];
    return (await scene.containerd.ctr(args)).stdout.toString();
  };
  const address = '10.11.12.13';

  it('gets its answers by UDP and, where they are large, by TCP, from the program’s first moment on', async () => {
    await serve();
    const script = 'nslookup -type=a name.test; ping -c 1 -W 1 big.test';
    const { stdout } = await scene.run(scene.id('dns'), ['sh', '-c', script], { flags: ['--rm', ...flags()] });
    expect(stdout.toString()).toContain('Server:\t\t127.0.0.11');
    expect(stdout.toString()).toContain(`Address: ${address}`);
    expect(stdout.toString()).toContain(`PING big.test (${address})`);
  });

  it('asks for several names at once', async () => {
    await serve();
    const id = await start();
    const script = 'for name in one two; do nslookup -type=a $name.test & done; wait';
    expect((await exec(id, script)).match(new RegExp(`Address: ${address}`, 'g'))).toHaveLength(2);
    await scene.remove(id);
  });

  it('is told at once that nobody answers, and asks again when somebody does', async () => {
    const id = await start();
    expect(await exec(id, 'nslookup -type=a name.test')).toContain('SERVFAIL');
    await serve();
    expect(await exec(id, 'nslookup -type=a name.test')).toContain(address);
    await scene.remove(id);
  });

  it('can be a name server itself', async () => {
    await serve();
    writeFileSync(resolvConf, 'nameserver 127.0.0.11\nnameserver 127.0.0.1\n');
    const id = await start();
    await exec(id, 'nc -ll -p 53 -e echo own >/dev/null 2>&1 &');
    const asked = 'until [ "$(nc 127.0.0.1 53)" = own ]; do usleep 10000; done; echo reached';
    expect(await exec(id, asked)).toContain('reached');
    expect(await exec(id, 'ping -c 1 -W 1 big.test')).toContain(address);
    await scene.remove(id);
  });

  it('has one that comes with another network while it runs', async () => {
    await serve();
    writeFileSync(resolvConf, 'nameserver 10.0.0.1\n');
    const id = await start();
    // In place, since the file is what is mounted.
    writeFileSync(resolvConf, 'nameserver 127.0.0.11\n');
    await vi.waitFor(
      async () => {
        // kilnd may not look yet.
        await mustRun(...inside('sh', '-c', 'ip address add 10.0.0.9/32 dev lo; ip address del 10.0.0.9/32 dev lo'));
        expect(await exec(id, 'nslookup -type=a name.test 127.0.0.11')).toContain(address);
      },
      { timeout: 60_000, interval: 200 },
    );
    await scene.remove(id);
  });

  it('has it again after kilnd was killed', async () => {
    await serve();
    const id = await start();
    const pids = scene.kilndPids();
    for (const pid of pids) signal(pid, 'SIGKILL');
    for (const pid of pids) await waitForEnd(pid, 20_000);
    await vi.waitFor(async () => expect(await exec(id, 'nslookup -type=a name.test')).toContain(address), {
      timeout: 60_000,
      interval: 200,
    });
    await scene.remove(id);
  });
});
