import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, readFileSync, rmdirSync, rmSync } from 'node:fs';
import { type AddressInfo, createServer, type Server } from 'node:net';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';
import { parseListeners } from '../../../agent/listeners.ts';
import { Lines } from '../../support/spawn.ts';
import { compile, hasGcc, isRoot, temporaryFolder } from './harness.ts';

describe.skipIf(!hasGcc)('kiln-listeners', () => {
  const folder = temporaryFolder();
  const program = path.join(folder, 'listeners');
  const cleanups: (() => unknown)[] = [];
  beforeAll(() => compile(['guest-listeners.c'], program));
  afterEach(async () => {
    for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
  });
  afterAll(() => rmSync(folder, { recursive: true }));

  function start(...args: string[]): { lines: Lines; child: ChildProcess } {
    const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'inherit'] });
    cleanups.push(async () => {
      const exit = once(child, 'exit');
      if (child.kill('SIGKILL')) await exit;
    });
    return { lines: new Lines(child.stdout), child };
  }

  async function listen(host: string): Promise<{ server: Server; port: number }> {
    const server = createServer().listen(0, host);
    await once(server, 'listening');
    cleanups.push(() => server.close());
    return { server, port: (server.address() as AddressInfo).port };
  }

  const has = (family: 'ipv4Ports' | 'ipv6Ports', port: number) => (line: string) =>
    parseListeners(line)[family].includes(port);

  it('tells the listeners at loopback and at all addresses, each by its families', async () => {
    const four = await listen('127.0.0.1');
    const all = await listen('0.0.0.0');
    const other = await listen('127.0.0.2');
    const six = await listen('::1');
    const both = await listen('::');
    const { lines } = start();
    const said = parseListeners(await lines.waitFor(() => true, 'the first line'));
    const families = ({ port }: { port: number }) => [said.ipv4Ports.includes(port), said.ipv6Ports.includes(port)];
    expect(families(four)).toEqual([true, false]);
    expect(families(all)).toEqual([true, false]);
    expect(families(other)).toEqual([false, false]);
    expect(families(six)).toEqual([false, true]);
    expect(families(both)).toEqual([true, true]);
    expect(said.ipv4Ports).toEqual([...said.ipv4Ports].sort((one, two) => one - two));
  });

  it('tells when one has come, and when one is gone', async () => {
    const { lines } = start();
    await lines.waitFor(() => true, 'the first line');
    const { server, port } = await listen('127.0.0.1');
    await lines.waitFor(has('ipv4Ports', port), 'the listener');
    server.close();
    await vi.waitFor(() => expect(has('ipv4Ports', port)(lines.all.at(-1) ?? '')).toBe(false), { timeout: 10_000 });
  });

  it('ends when nobody reads what it says', async () => {
    const { lines, child } = start();
    await lines.waitFor(() => true, 'the first line');
    child.stdout?.destroy();
    await once(child, 'exit');
    expect(child.exitCode).toBe(0);
  });

  /** Where control groups of version 2 are mounted, be it beside version 1. */
  const root = ['/sys/fs/cgroup/unified', '/sys/fs/cgroup'].find((each) => {
    try {
      return readFileSync(path.join(each, 'cgroup.procs')) !== undefined && isRoot;
    } catch {
      return false;
    }
  });

  it.skipIf(root === undefined)('is told by the kernel, and does nothing while nothing changes', async () => {
    const cgroup = path.join(root!, `kiln-test-${process.pid}`);
    mkdirSync(cgroup);
    cleanups.push(() => vi.waitFor(() => rmdirSync(cgroup)));
    const { lines, child } = start(cgroup);
    await lines.waitFor(() => true, 'the first line');
    // proc(5), syscall: poll(2) with two descriptors and without an end.
    const waits = /^7 \S+ 0x2 0xffffffff(ffffffff)? /;
    const call = () => readFileSync(`/proc/${child.pid}/syscall`, 'utf8');
    await vi.waitFor(() => expect(call()).toMatch(waits));
    // A listener that is not below the cgroup is none of its business; one that is, is.
    const script = `
      const { createServer } = require('node:net');
      require('node:fs').writeFileSync(process.argv[1], String(process.pid));
      const server = createServer().listen(0, '127.0.0.1', () => console.log(server.address().port));
      process.stdin.on('data', () => server.close());`;
    const listener = spawn(process.execPath, ['-e', script, path.join(cgroup, 'cgroup.procs')], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    cleanups.push(async () => {
      const exit = once(listener, 'exit');
      if (listener.kill('SIGKILL')) await exit;
    });
    const port = Number(await new Lines(listener.stdout).waitFor(() => true, 'the port'));
    await lines.waitFor(has('ipv4Ports', port), 'the listener');
    await vi.waitFor(() => expect(call()).toMatch(waits));
    listener.stdin.write('close\n');
    await vi.waitFor(() => expect(has('ipv4Ports', port)(lines.all.at(-1) ?? '')).toBe(false), { timeout: 10_000 });
  });
});
