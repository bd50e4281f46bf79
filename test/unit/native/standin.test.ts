import { type ChildProcess, spawn } from 'node:child_process';
import {
  chmodSync,
  closeSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import path from 'node:path';
import type { Readable } from 'node:stream';
import { text } from 'node:stream/consumers';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { compile, hasGcc, isAlive, isRoot, kill, run, temporaryFolder } from './harness.ts';

interface StandIn {
  readonly pid: number;
  readonly process: ChildProcess;
  /** What it said on its status descriptor, to its end. */
  readonly status: string;
  readonly exited: Promise<{ code: number | null; signal: NodeJS.Signals | null }>;
}

describe.skipIf(!hasGcc || !isRoot)('the stand-in (needs gcc and root)', () => {
  let folder: string;
  let program: string;
  let root: string;
  const started = new Set<StandIn>();

  beforeAll(() => {
    folder = temporaryFolder();
    program = path.join(folder, 'kiln-standin');
    root = path.join(folder, 'empty');
    mkdirSync(root);
    compile(['standin.c', 'standin-confine.c'], program);
  });
  afterEach(async () => {
    for (const standIn of started) {
      kill(standIn.pid);
      await standIn.exited;
    }
    started.clear();
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  async function start(netns: string, rootDir = root, id = 'container-1'): Promise<StandIn> {
    const child = spawn(program, [netns, rootDir, id], { stdio: ['pipe', 'pipe', 'pipe', 'pipe'] });
    const exited = new Promise<Awaited<StandIn['exited']>>((resolve) => {
      child.once('exit', (code, signal) => resolve({ code, signal }));
    });
    const status = await text(child.stdio[3] as Readable);
    const standIn: StandIn = { pid: child.pid ?? 0, process: child, status, exited };
    started.add(standIn);
    return standIn;
  }

  const proc = (standIn: StandIn, file: string) => path.join('/proc', String(standIn.pid), file);
  const procText = (standIn: StandIn, file: string) => readFileSync(proc(standIn, file), 'utf8');
  const statusField = (standIn: StandIn, field: string) =>
    new RegExp(`^${field}:\\s*(\\S+)`, 'm').exec(procText(standIn, 'status'))?.[1];

  test('is ready in a network namespace of its own, with lo up', async () => {
    const standIn = await start('-');
    expect(standIn.status).toBe('ready\n');
    expect(readlinkSync(proc(standIn, 'ns/net'))).not.toBe(readlinkSync('/proc/self/ns/net'));
    expect(procText(standIn, 'net/fib_trie')).toContain('127.0.0.1'); // there only while lo is up
  });

  test('joins the network namespace it is given', async () => {
    const first = await start('-');
    const second = await start(proc(first, 'ns/net'));
    expect(second.status).toBe('ready\n');
    expect(readlinkSync(proc(second, 'ns/net'))).toBe(readlinkSync(proc(first, 'ns/net')));
  });

  test('shows an empty root, and the host a mount less to unmount', async () => {
    writeFileSync(path.join(root, 'on-the-host'), '');
    const mountsBefore = readFileSync('/proc/self/mountinfo', 'utf8');
    const standIn = await start('-');
    expect(standIn.status).toBe('ready\n');
    expect(readdirSync(proc(standIn, 'root'))).toEqual([]);
    expect(readlinkSync(proc(standIn, 'root'))).toBe('/');
    expect(readlinkSync(proc(standIn, 'cwd'))).toBe('/');
    expect(readFileSync('/proc/self/mountinfo', 'utf8')).toBe(mountsBefore);
    expect(procText(standIn, 'mountinfo').trim().split('\n')).toEqual([
      expect.stringMatching(/ \/ \/ ro,nosuid,nodev,noexec,relatime - tmpfs kiln-standin ro,/),
    ]);
    expect(readdirSync(root)).toEqual(['on-the-host']);
  });

  test('refuses whatever somebody wants to put into its root', async () => {
    const standIn = await start('-');
    const inRoot = (name: string) => path.join(proc(standIn, 'root'), name);
    expect(() => writeFileSync(inRoot('file'), 'lost')).toThrow(/EROFS/);
    expect(() => mkdirSync(inRoot('directory'))).toThrow(/EROFS/);
    expect(() => chmodSync(inRoot('.'), 0o777)).toThrow(/EROFS/);
    const copy = await run('cp', ['/etc/passwd', inRoot('etc/passwd')]);
    expect(copy.code).toBe(1);
  });

  test('has no descriptors, capabilities or ways to new ones', async () => {
    const standIn = await start('-');
    expect(readdirSync(proc(standIn, 'fd'))).toEqual([]);
    for (const set of ['CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb']) {
      expect([set, statusField(standIn, set)]).toEqual([set, '0000000000000000']);
    }
    expect(statusField(standIn, 'NoNewPrivs')).toBe('1');
  });

  test('can be told in ps, leads a session, and has the signals it should', async () => {
    const standIn = await start('-', root, 'my-container');
    expect(procText(standIn, 'comm')).toBe('kiln-standin\n');
    expect(procText(standIn, 'cmdline').split('\0')).toEqual([program, '-', root, 'my-container', '']);
    const [, , , session] = procText(standIn, 'stat')
      .replace(/^.*\) /, '')
      .split(' ');
    expect(Number(session)).toBe(standIn.pid);
    expect(Number.parseInt(statusField(standIn, 'SigIgn') ?? '', 16)).toBe(0x1003); // HUP, INT, PIPE
    expect(Number.parseInt(statusField(standIn, 'SigCgt') ?? '', 16)).toBe(0);
    expect(Number.parseInt(statusField(standIn, 'SigBlk') ?? '', 16)).toBe(0);
  });

  test('has less than 200 KiB of private memory', async () => {
    const standIn = await start('-');
    // Anonymous, not Private_*: of a file just compiled, the pages count as dirty and, with one reader, as private.
    const anonymous = /^Anonymous:\s*(\d+) kB/m.exec(procText(standIn, 'smaps_rollup'))?.[1];
    expect(Number(anonymous)).toBeLessThan(200);
  });

  test.each(['SIGTERM', 'SIGKILL'] as const)('dies of %s', async (signal) => {
    const standIn = await start('-');
    process.kill(standIn.pid, 'SIGHUP');
    process.kill(standIn.pid, 'SIGINT');
    process.kill(standIn.pid, signal);
    expect(await standIn.exited).toEqual({ code: null, signal });
  });

  test('outlives the process that started it', async () => {
    // The shell is gone when run() resolves; the status comes by its stdout.
    const script = '"$0" - "$1" id 3>&1 </dev/null >/dev/null 2>&1 & echo $!';
    const outcome = await run('sh', ['-c', script, program, root]);
    const pid = Number(/\d+/.exec(outcome.text)?.[0]);
    try {
      expect(outcome.text.replace(String(pid), '').trim()).toBe('ready');
      expect(isAlive(pid)).toBe(true);
    } finally {
      kill(pid);
    }
  });

  test('ends when nobody hears that it is ready', async () => {
    const fifo = path.join(folder, 'fifo');
    await run('mkfifo', [fifo]);
    // "r+" opens a fifo at once; when it is closed again, the writing end is left without a reader.
    const both = openSync(fifo, 'r+');
    const writer = openSync(fifo, 'w');
    closeSync(both);
    try {
      const outcome = await run(program, ['-', root, 'id'], { extraFds: [writer] });
      expect(outcome).toMatchObject({ code: 1, text: '', stderr: '' });
    } finally {
      closeSync(writer);
    }
  });

  test('names the network namespace it cannot open or join', async () => {
    const missing = await start('/nonexistent/netns');
    expect(missing.status).toBe(
      'error: cannot open the network namespace /nonexistent/netns: No such file or directory',
    );
    expect(await missing.exited).toEqual({ code: 1, signal: null });
    const wrong = await start('/etc/passwd');
    expect(wrong.status).toBe('error: cannot join the network namespace /etc/passwd: Invalid argument');
  });

  test('names the root folder it cannot use', async () => {
    const missing = await start('-', path.join(folder, 'missing'));
    expect(missing.status).toBe(
      `error: cannot mount the empty root on ${path.join(folder, 'missing')}: No such file or directory`,
    );
    expect(await missing.exited).toEqual({ code: 1, signal: null });
    expect((await start('-', '/etc/passwd')).status).toMatch(/empty root on \/etc\/passwd: Not a directory$/);
  });

  test('says how it is used when arguments or the status descriptor are missing', async () => {
    const outcome = await run(program, ['-', root, 'id']);
    expect(outcome).toMatchObject({ code: 2, text: '', stderr: expect.stringMatching(/^usage: kiln-standin/) });
  });
});
