import { type ChildProcess, spawn } from 'node:child_process';
import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { mkdirSync, readFileSync, rmdirSync, rmSync } from 'node:fs';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, vi } from 'vitest';
import { NetworkNamespace } from '../../../src/sys/netns.ts';
import { Lines, run } from '../../support/spawn.ts';
import { compile, hasGcc, isRoot, temporaryFolder } from './harness.ts';

/** Where control groups of version 2 are mounted, be it beside version 1. */
const root = ['/sys/fs/cgroup/unified', '/sys/fs/cgroup'].find((each) => {
  try {
    return readFileSync(path.join(each, 'cgroup.procs')) !== undefined && isRoot;
  } catch {
    return false;
  }
});

/** For Node, in a cgroup: enters it, then tells of each line "udp6 ::1 53" or "tcp 127.0.0.1 53" what answers there. */
const client = `
  require('node:fs').writeFileSync(process.argv[1], String(process.pid));
  const { createSocket } = require('node:dgram');
  const { connect } = require('node:net');
  require('node:readline').createInterface({ input: process.stdin }).on('line', (line) => {
    const [kind, address, port] = line.split(' ');
    const say = (what) => console.log(line + ': ' + what);
    if (kind === 'tcp') {
      const socket = connect(Number(port), address);
      socket.on('data', (data) => { say(data + ' of ' + socket.remoteAddress + ' ' + socket.remotePort); socket.destroy(); });
      socket.on('error', (error) => say(error.code));
      return;
    }
    const connected = kind.endsWith('connected');
    const socket = createSocket(kind.slice(0, 4));
    socket.on('message', (data, peer) => { say(data + ' of ' + peer.address + ' ' + peer.port); socket.close(); });
    socket.on('error', (error) => { say(error.code); socket.close(); });
    if (connected) socket.connect(Number(port), address, () => socket.send('?'));
    else socket.send('?', Number(port), address);
  });
  console.log('ready');`;

describe.skipIf(!hasGcc || root === undefined)('kiln-nameservers', () => {
  const folder = temporaryFolder();
  const program = path.join(folder, 'nameservers');
  const cgroup = path.join(root ?? '', `kiln-test-${process.pid}`);
  const cleanups: (() => unknown)[] = [];
  let namespace: NetworkNamespace;
  let lines: Lines;
  let child: ChildProcess;

  beforeAll(() => compile(['guest-nameservers.c'], program));
  beforeEach(async () => {
    namespace = NetworkNamespace.create();
    cleanups.push(() => namespace[Symbol.dispose]());
    await inside('ip', ['link', 'set', 'lo', 'up']);
    mkdirSync(cgroup);
    cleanups.push(() => vi.waitFor(() => rmdirSync(cgroup)));
    ({ lines, child } = await startClient(namespace));
  });
  afterEach(async () => {
    for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
  });
  afterAll(() => rmSync(folder, { recursive: true }));

  const enter = (into: NetworkNamespace) => `--net=/proc/${process.pid}/fd/${into.fd}`;
  const inside = (file: string, args: readonly string[]) => run('nsenter', [enter(namespace), file, ...args]);
  const redirect = (address: string, own: string, port: number, where = cgroup) =>
    inside(program, [where, address, own, `${port}`]);

  async function startClient(into: NetworkNamespace) {
    const args = [enter(into), process.execPath, '-e', client, path.join(cgroup, 'cgroup.procs')];
    const started = spawn('nsenter', args, { stdio: ['pipe', 'pipe', 'inherit'] });
    cleanups.push(async () => {
      const exit = once(started, 'exit');
      if (started.kill('SIGKILL')) await exit;
    });
    const said = new Lines(started.stdout);
    await said.waitFor((line) => line === 'ready', 'the client');
    return { lines: said, child: started };
  }

  /** A server for both, at an address in the namespace, that answers with its name. */
  async function serve(address: string, port: number, name: string): Promise<number> {
    const script = `
      const [address, port, name] = process.argv.slice(1);
      const socket = require('node:dgram').createSocket(address.includes(':') ? 'udp6' : 'udp4');
      socket.on('message', (_, peer) => socket.send(name, peer.port, peer.address));
      socket.bind(Number(port), address, () => {
        const { port } = socket.address();
        require('node:net').createServer((each) => each.end(name)).listen(port, address, () => console.log(port));
      });`;
    const args = [enter(namespace), process.execPath, '-e', script, address, `${port}`, name];
    const server = spawn('nsenter', args, { stdio: ['ignore', 'pipe', 'inherit'] });
    cleanups.push(async () => {
      const exit = once(server, 'exit');
      if (server.kill('SIGKILL')) await exit;
    });
    return Number(await new Lines(server.stdout).waitFor(() => true, 'the port'));
  }

  /** A client gets each line once. */
  async function ask(line: string, by = { lines, child }): Promise<string> {
    by.child.stdin?.write(`${line}\n`);
    const told = await by.lines.waitFor((each) => each.startsWith(`${line}: `), `an answer to ${line}`);
    return told.slice(line.length + 2);
  }

  it('has what is sent to port 53 of an address arrive at a port, and come from there', async () => {
    const port = await serve('127.0.0.11', 0, 'ours');
    expect(await redirect('127.0.0.11', '127.0.0.11', port)).toMatchObject({ code: 0, stderr: '' });
    const dockers = 'ours of 127.0.0.11 53';
    expect(await ask('udp4 127.0.0.11 53')).toBe(dockers);
    expect(await ask('udp4-connected 127.0.0.11 53')).toBe(dockers);
    expect(await ask('tcp 127.0.0.11 53')).toBe(dockers);
    expect(await ask('udp6 ::ffff:127.0.0.11 53')).toBe('ours of ::ffff:127.0.0.11 53');
    expect(await ask('udp6-connected ::ffff:127.0.0.11 53')).toBe('ours of ::ffff:127.0.0.11 53');
    // Nothing else does.
    expect(await ask('tcp 127.0.0.12 53')).toBe('ECONNREFUSED');
    expect(await ask('udp4-connected 127.0.0.12 53')).toBe('ECONNREFUSED');
    expect(await ask('udp4-connected 127.0.0.11 54')).toBe('ECONNREFUSED');
  });

  it('does the same for IPv6', async () => {
    const port = await serve('::1', 0, 'six');
    expect(await redirect('::1', '::1', port)).toMatchObject({ code: 0, stderr: '' });
    for (const kind of ['udp6', 'udp6-connected', 'tcp']) expect(await ask(`${kind} ::1 53`)).toBe('six of ::1 53');
  });

  it('leaves a name server in the guest what it listens at, but not what is Docker’s', async () => {
    const port = await serve('127.0.0.11', 0, 'docker');
    const other = await serve('127.0.0.11', 0, 'host');
    await redirect('127.0.0.11', '127.0.0.11', port);
    await redirect('127.0.0.1', '127.0.0.11', other);
    expect(await ask('udp4 127.0.0.1 53')).toBe('host of 127.0.0.1 53');
    await serve('0.0.0.0', 53, 'own');
    for (const kind of ['udp4', 'udp4-connected', 'tcp']) {
      expect(await ask(`${kind} 127.0.0.11 53`)).toBe('docker of 127.0.0.11 53');
    }
    const again = await startClient(namespace);
    for (const kind of ['udp4', 'udp4-connected', 'tcp', 'udp6']) {
      const address = kind === 'udp6' ? '::ffff:127.0.0.1' : '127.0.0.1';
      expect(await ask(`${kind} ${address} 53`, again), kind).toBe(`own of ${address} 53`);
    }
  });

  it('does nothing in another network namespace, or for those outside of the cgroup', async () => {
    const port = await serve('127.0.0.11', 0, 'ours');
    await redirect('127.0.0.11', '127.0.0.11', port);
    using nested = NetworkNamespace.create();
    await run('nsenter', [enter(nested), 'ip', 'link', 'set', 'lo', 'up']);
    const other = await startClient(nested);
    expect(await ask('tcp 127.0.0.11 53', other)).toBe('ECONNREFUSED');
    const outside = createSocket('udp4');
    cleanups.push(() => outside.close());
    outside.connect(53, '127.0.0.11', () => outside.send('?'));
    expect(await once(outside, 'error')).toMatchObject([{ code: 'ECONNREFUSED' }]);
  });

  it('says what it cannot do', async () => {
    for (const [args, message] of [
      [[cgroup, 'localhost', '127.0.0.1', '1'], 'localhost is no IP address'],
      [[cgroup, '::1', '127.0.0.1', '1'], '::1 and 127.0.0.1 are of different families'],
      [[path.join(folder, 'none'), '127.0.0.1', '127.0.0.1', '1'], `${folder}/none: No such file or directory`],
      [[folder, '127.0.0.1', '127.0.0.1', '1'], 'cannot attach the program to the cgroup: Bad file descriptor'],
      [[], 'usage: kiln-nameservers CGROUP ADDRESS OWN PORT'],
    ] as const) {
      expect(await run(program, args)).toMatchObject({ code: 1, stderr: `${message}\n` });
    }
  });
});
