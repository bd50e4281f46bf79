import { execFileSync } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { once } from 'node:events';
import {
  closeSync,
  constants,
  createWriteStream,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  symlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Readable, Writable } from 'node:stream';
import { buffer, text } from 'node:stream/consumers';
import { setTimeout as delay } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { noStdio, openStdio, type Stdio, type StdioPaths } from '../../../src/shim/stdio.ts';

let folder: string;
let stack: AsyncDisposableStack;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'kiln-stdio-'));
  stack = new AsyncDisposableStack();
});

afterEach(async () => {
  await stack.disposeAsync();
  rmSync(folder, { recursive: true });
});

const owner = () => ({ id: 'c1', namespace: 'default', directory: folder });

function mkfifo(name: string): string {
  const path = join(folder, name);
  execFileSync('mkfifo', [path]);
  return path;
}

async function open(paths: Partial<StdioPaths>): Promise<Stdio> {
  return stack.use(await openStdio({ stdin: '', stdout: '', stderr: '', terminal: false, ...paths }, owner()));
}

/** The client's end of an output FIFO, by epoll like ours so that a failing test hangs no thread. */
function openReader(path: string): Readable {
  const fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
  const socket = new Socket({ fd, readable: true, writable: false });
  stack.defer(() => void socket.destroy());
  return socket;
}

/** The client's end of stdin as a bare descriptor. Opening it as the client's library does would block: see fifo(7). */
function openWriter(path: string): number {
  return openSync(path, constants.O_WRONLY | constants.O_NONBLOCK);
}

function writeOut(stream: Writable | null, chunk: Buffer | string): Promise<void> {
  return new Promise((resolve, reject) => {
    stream?.write(chunk, (error) => (error ? reject(error) : resolve()));
  });
}

/** What the process's descriptors point at within the test's folder. */
function openFifos(): string[] {
  return readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      const target = readlinkSync(`/proc/self/fd/${fd}`);
      return target.startsWith(folder) ? [target] : [];
    } catch {
      return [];
    }
  });
}

/** Exactly `length` bytes from a stream that goes on. */
async function take(stream: Readable, length: number): Promise<Buffer> {
  const chunks: Buffer[] = [];
  for (let have = 0; have < length; ) {
    const chunk = stream.read(Math.min(length - have, stream.readableLength) || undefined) as Buffer | null;
    if (chunk === null) {
      await once(stream, 'readable');
      continue;
    }
    chunks.push(chunk);
    have += chunk.length;
  }
  return Buffer.concat(chunks);
}

const sha256 = (bytes: Buffer): string => createHash('sha256').update(bytes).digest('hex');

describe('stdout and stderr', () => {
  test('arrive byte for byte, and the reader sees the end after finish', async () => {
    const paths = { stdout: mkfifo('out'), stderr: mkfifo('err') };
    const stdio = await open(paths);
    const received = Promise.all([buffer(openReader(paths.stdout)), text(openReader(paths.stderr))]);
    const sent = randomBytes(16 * 1024 * 1024);
    stdio.stderr?.write('to stderr');
    for (let at = 0; at < sent.length; at += 100_003) await writeOut(stdio.stdout, sent.subarray(at, at + 100_003));
    await stdio.finish();
    const [out, err] = await received;
    expect(out.length).toBe(sent.length);
    expect(sha256(out)).toBe(sha256(sent));
    expect(err).toBe('to stderr');
  });

  test('wait in the pipe for a reader that comes late', async () => {
    const stdout = mkfifo('out');
    const stdio = await open({ stdout });
    await writeOut(stdio.stdout, 'early ');
    const received = text(openReader(stdout));
    await writeOut(stdio.stdout, 'late');
    await stdio.finish();
    expect(await received).toBe('early late');
  });

  test('hold the writer back when nobody reads and the pipe is full', async () => {
    const stdout = mkfifo('out');
    const stdio = await open({ stdout });
    const sent = randomBytes(1024 * 1024);
    let written = false;
    const done = writeOut(stdio.stdout, sent).then(() => {
      written = true;
    });
    expect(stdio.stdout?.writableNeedDrain).toBe(true);
    const reader = openReader(stdout);
    // 64 KiB are in the pipe; when they are taken out, the rest follows.
    expect(await take(reader, 1000)).toEqual(sent.subarray(0, 1000));
    expect(written).toBe(false);
    expect(sha256(await take(reader, sent.length - 1000))).toBe(sha256(sent.subarray(1000)));
    await done;
    await stdio.finish();
  });

  test('survive a reader that leaves and one that returns', async () => {
    const stdout = mkfifo('out');
    const stdio = await open({ stdout });
    const first = openReader(stdout);
    await writeOut(stdio.stdout, 'one');
    expect((await take(first, 3)).toString()).toBe('one');
    first.destroy();
    await once(first, 'close');
    await writeOut(stdio.stdout, 'two');
    const second = text(openReader(stdout));
    await writeOut(stdio.stdout, 'three');
    await stdio.finish();
    expect(await second).toBe('twothree');
  });

  test('with the same path are one stream', async () => {
    const path = mkfifo('both');
    const stdio = await open({ stdout: path, stderr: path });
    expect(stdio.stderr).toBe(stdio.stdout);
    const received = text(openReader(path));
    await writeOut(stdio.stdout, 'out ');
    await writeOut(stdio.stderr, 'err');
    await stdio.finish();
    expect(await received).toBe('out err');
  });

  test('of a terminal are stdout alone', async () => {
    const stdio = await open({ stdout: mkfifo('out'), stderr: join(folder, 'none'), terminal: true });
    expect(stdio.stdout).not.toBeNull();
    expect(stdio.stderr).toBeNull();
  });

  test('that nobody wants are null', async () => {
    const stdio = await open({});
    expect([stdio.stdin, stdio.stdout, stdio.stderr]).toEqual([null, null, null]);
    stdio.startStdin();
    stdio.closeStdin();
    await stdio.finish();
  });

  test('finish after dispose, and dispose during a stalled finish, resolve', async () => {
    const stdio = await open({ stdout: mkfifo('out') });
    stdio.stdout?.write(randomBytes(300 * 1024));
    const finished = stdio.finish();
    await stdio.dispose();
    await finished;
    await stdio.finish();
    expect(openFifos()).toEqual([]);
  });
});

describe('output to files', () => {
  test('by path is appended to the file that exists', async () => {
    const path = join(folder, 'log');
    writeFileSync(path, 'before\n');
    const stdio = await open({ stdout: path, stderr: path });
    await writeOut(stdio.stdout, 'out\n');
    await writeOut(stdio.stderr, 'err\n');
    await stdio.finish();
    expect(readFileSync(path, 'utf8')).toBe('before\nout\nerr\n');
    expect(openFifos()).toEqual([]);
  });

  test('by file:// makes the file and its folders', async () => {
    const uri = `file://${folder}/a%20b/c/log`;
    const stdio = await open({ stdout: uri, stderr: uri });
    await writeOut(stdio.stdout, 'text');
    await stdio.finish();
    expect(readFileSync(join(folder, 'a b/c/log'), 'utf8')).toBe('text');
  });

  test('on a full disk is dropped and reported once, and the process is not held up', async () => {
    const path = join(folder, 'full');
    symlinkSync('/dev/full', path);
    const errors: string[] = [];
    const stdio = stack.use(
      await openStdio(
        { stdin: '', stdout: path, stderr: '', terminal: false },
        { ...owner(), onError: (name, error) => errors.push(`${name}: ${error.message}`) },
      ),
    );
    for (let i = 0; i < 100; i += 1) await writeOut(stdio.stdout, randomBytes(64 * 1024));
    await stdio.finish();
    expect(errors).toEqual(['stdout: ENOSPC: no space left on device, write']);
  });

  test('disposed of while a write is under way closes the file after it', async () => {
    const path = join(folder, 'log');
    writeFileSync(path, '');
    const stdio = await open({ stdout: path });
    stdio.stdout?.write(randomBytes(1024 * 1024));
    await stdio.dispose();
    expect(openFifos()).toEqual([]);
    expect(readFileSync(path).length).toBe(1024 * 1024);
  });
});

describe('stdin', () => {
  test('gives the bytes of the client, byte for byte', async () => {
    const path = mkfifo('in');
    const stdio = await open({ stdin: path });
    const sent = randomBytes(16 * 1024 * 1024);
    const keep = openSync(path, constants.O_RDWR);
    const client = createWriteStream(path);
    await once(client, 'open');
    // As ctr does: CloseIO when all is written.
    client.end(sent);
    client.on('close', () => stdio.closeStdin());
    const received = buffer(stdio.stdin as Readable);
    stdio.startStdin();
    closeSync(keep);
    expect(sha256(await received)).toBe(sha256(sent));
  });

  test('does not end when the client leaves, but when stdin is closed', async () => {
    const path = mkfifo('in');
    const keep = openSync(path, constants.O_RDWR);
    const stdio = await open({ stdin: path });
    stdio.startStdin();
    const stdin = stdio.stdin as Readable;
    let ended = false;
    stdin.on('end', () => {
      ended = true;
    });
    closeSync(keep);
    const first = openWriter(path);
    writeSync(first, 'one');
    closeSync(first);
    expect((await take(stdin, 3)).toString()).toBe('one');
    const second = openWriter(path);
    writeSync(second, 'two');
    closeSync(second);
    expect((await take(stdin, 3)).toString()).toBe('two');
    expect(ended).toBe(false);
    stdio.closeStdin();
    expect(await text(stdin)).toBe('');
    expect(ended).toBe(true);
  });

  test('closed with bytes in the pipe gives them before it ends', async () => {
    const path = mkfifo('in');
    const client = openSync(path, constants.O_RDWR);
    const stdio = await open({ stdin: path });
    const sent = randomBytes(60_000);
    stdio.startStdin();
    writeSync(client, sent);
    stdio.closeStdin();
    closeSync(client);
    expect(await buffer(stdio.stdin as Readable)).toEqual(sent);
  });

  test('closed while the client still writes ends only when the client is done', async () => {
    const path = mkfifo('in');
    const keep = openSync(path, constants.O_RDWR);
    const stdio = await open({ stdin: path });
    stdio.startStdin();
    const client = openWriter(path);
    closeSync(keep);
    stdio.closeStdin();
    writeSync(client, 'still here');
    expect((await take(stdio.stdin as Readable, 10)).toString()).toBe('still here');
    closeSync(client);
    expect(await text(stdio.stdin as Readable)).toBe('');
  });

  test('closed before the process starts gives what the client sends, then ends', async () => {
    const path = mkfifo('in');
    const client = openSync(path, constants.O_RDWR);
    writeSync(client, 'short');
    const stdio = await open({ stdin: path });
    stdio.closeStdin();
    stdio.startStdin();
    closeSync(client);
    expect(await text(stdio.stdin as Readable)).toBe('short');
  });

  test('ends at the start when the client has closed its end already, as ctr does with an empty input', async () => {
    const stdio = await open({ stdin: mkfifo('in') });
    expect([stdio.startStdin(), stdio.startStdin()]).toEqual([true, true]);
    expect(await text(stdio.stdin as Readable)).toBe('');
    expect(openFifos()).toEqual([]);
  });

  test('of a task that is taken over waits for a client to come', async () => {
    const path = mkfifo('in');
    const stdio = await open({ stdin: path });
    expect(stdio.startStdin({ clientMayReturn: true })).toBe(false);
    const client = openWriter(path);
    writeSync(client, 'back');
    closeSync(client);
    expect((await take(stdio.stdin as Readable, 4)).toString()).toBe('back');
    stdio.closeStdin();
    expect(await text(stdio.stdin as Readable)).toBe('');
  });

  test('holds the client back when the process does not read', async () => {
    const path = mkfifo('in');
    const keep = openSync(path, constants.O_RDWR);
    const stdio = await open({ stdin: path });
    stdio.startStdin();
    closeSync(keep);
    const client = new Socket({ fd: openWriter(path), readable: false, writable: true });
    stack.defer(() => void client.destroy());
    const sent = randomBytes(4 * 1024 * 1024);
    client.end(sent);
    await once(stdio.stdin as Readable, 'readable');
    expect(stdio.stdin?.readableLength).toBeLessThan(256 * 1024);
    expect(client.writableFinished).toBe(false);
    stdio.closeStdin();
    expect(sha256(await buffer(stdio.stdin as Readable))).toBe(sha256(sent));
  });

  test('is not opened before the start: a client gets no byte away', async () => {
    const path = mkfifo('in');
    await open({ stdin: path });
    expect(() => openWriter(path)).toThrow('ENXIO');
  });

  test('is opened once, however often it is started', async () => {
    const path = mkfifo('in');
    const keep = openSync(path, constants.O_RDWR);
    stack.defer(() => closeSync(keep));
    const stdio = await open({ stdin: path });
    stdio.startStdin();
    const descriptors = openFifos().length;
    stdio.startStdin();
    expect(openFifos()).toHaveLength(descriptors);
  });
});

describe('openStdio', () => {
  const refusal = async (paths: Partial<StdioPaths>): Promise<unknown> => {
    return openStdio({ stdin: '', stdout: '', stderr: '', terminal: false, ...paths }, owner()).then(
      () => 'opened',
      (error: unknown) => error,
    );
  };

  test.each([
    ['ttrpc+unix:///run/x?streaming_id=1', 'unimplemented', 'stdout: ttrpc+unix:// is not supported yet'],
    ['file://elsewhere/log', 'invalid-argument', 'stdout: file://elsewhere/log does not name a file of this host'],
    ['out', 'invalid-argument', 'stdout: out is neither an absolute path nor a URI'],
    ['/none/out', 'not-found', 'stdout: /none/out does not exist'],
    ['file:///dev/null/x/log', 'invalid-argument', 'stdout: cannot be opened: ENOTDIR'],
    ['/tmp', 'invalid-argument', 'stdout: cannot be opened: EISDIR'],
    ['/dev/ptmx', 'invalid-argument', 'stdout: /dev/ptmx is a device, not a FIFO or a regular file'],
  ])('refuses %s', async (stdout, code, message) => {
    expect(await refusal({ stdout })).toMatchObject({ code, message: expect.stringContaining(message) });
  });

  test('refuses a stdin that is missing or no FIFO', async () => {
    expect(await refusal({ stdin: '/none/in' })).toMatchObject({ code: 'not-found' });
    expect(await refusal({ stdin: '/dev/null' })).toMatchObject({ message: 'stdin: /dev/null is not a FIFO' });
  });

  test('that fails half way leaves nothing open', async () => {
    const paths = { stdin: mkfifo('in'), stdout: mkfifo('out'), stderr: join(folder, 'none') };
    expect(await refusal(paths)).toMatchObject({ code: 'not-found' });
    expect(openFifos()).toEqual([]);
  });

  test('reports a stdin FIFO that is gone at the start', async () => {
    const path = mkfifo('in');
    const stdio = await open({ stdin: path });
    rmSync(path);
    expect(() => stdio.startStdin()).toThrow(expect.objectContaining({ code: 'not-found' }));
  });
});

test('dispose leaves no descriptor, whatever is going on', async () => {
  const paths = { stdin: mkfifo('in'), stdout: mkfifo('out'), stderr: mkfifo('err') };
  const client = openSync(paths.stdin, constants.O_RDWR);
  writeSync(client, 'never read');
  const stdio = await open(paths);
  stdio.startStdin();
  expect(openFifos()).toHaveLength(7);
  stdio.stdout?.write(randomBytes(1024 * 1024));
  stdio.stderr?.write('x');
  await stdio.dispose();
  await stdio.dispose();
  closeSync(client);
  expect(openFifos()).toEqual([]);
  stdio.closeStdin();
  stdio.startStdin();
  expect(openFifos()).toEqual([]);
});

describe('the FIFOs that are held while kilnd is away', () => {
  const calls: string[] = [];
  const holds = {
    holdFifo: async (path: string) => void calls.push(`hold ${path.slice(folder.length + 1)}`),
    releaseFifo: async (path: string) => void calls.push(`release ${path.slice(folder.length + 1)}`),
  };
  beforeEach(() => {
    calls.length = 0;
  });
  const openHeld = async (paths: Partial<StdioPaths>, adopt = false) => {
    const given = { stdin: '', stdout: '', stderr: '', terminal: false, ...paths };
    return stack.use(await openStdio(given, { ...owner(), holds, adopt }));
  };

  test('are the outputs before the process runs, and stdin from its start on', async () => {
    const [stdin, stdout, stderr] = [mkfifo('in'), mkfifo('out'), mkfifo('err')];
    const stdio = await openHeld({ stdin, stdout, stderr });
    expect(calls).toEqual(['hold out', 'hold err']);
    // The client's end, which must be there for stdin to stay open; one cannot be opened before a reader is.
    const reader = openSync(stdin, constants.O_RDONLY | constants.O_NONBLOCK);
    const client = openWriter(stdin);
    stdio.startStdin();
    closeSync(reader);
    expect(calls.slice(2)).toEqual(['hold in']);
    stdio.closeStdin();
    expect(calls.slice(3)).toEqual(['release in']);
    closeSync(client);
    await stdio.finish();
    expect(calls.slice(4).toSorted()).toEqual(['release err', 'release out']);
  });

  test('are released once, however often the end is asked for', async () => {
    const [stdin, stdout, stderr] = [mkfifo('in'), mkfifo('out'), mkfifo('err')];
    const stdio = await openHeld({ stdin, stdout, stderr });
    stdio.startStdin();
    calls.length = 0;
    await stdio.finish();
    await stdio.dispose();
    stdio.closeStdin();
    await stdio.dispose();
    expect(calls.toSorted()).toEqual(['release err', 'release in', 'release out']);
  });

  test('are released once the relay says so to everybody who ends the streams', async () => {
    const answer = Promise.withResolvers<void>();
    const given = { ...noStdio, stdout: mkfifo('out') };
    const slow = { holdFifo: async () => {}, releaseFifo: () => answer.promise };
    const stdio = stack.use(await openStdio(given, { ...owner(), holds: slow }));
    let ended = 0;
    const ends = [stdio.finish(), stdio.dispose()].map((end) => end.then(() => (ended += 1)));
    await delay(20);
    expect(ended).toBe(0);
    answer.resolve();
    await Promise.all(ends);
  });

  test('are not files, nor a stdin that has ended at once; one path is held once', async () => {
    const [stdin, stdout] = [mkfifo('in'), mkfifo('out')];
    writeFileSync(join(folder, 'file'), '');
    await openHeld({ stdout: join(folder, 'file'), stderr: `file://${join(folder, 'file2')}` });
    expect(calls).toEqual([]);
    const stdio = await openHeld({ stdin, stdout, stderr: stdout });
    stdio.startStdin();
    expect(calls).toEqual(['hold out']);
  });

  test('are those of a process that is taken over again, with a stdin whose client may return', async () => {
    const [stdin, stdout] = [mkfifo('in'), mkfifo('out')];
    const stdio = await openHeld({ stdin, stdout }, true);
    stdio.startStdin({ clientMayReturn: true });
    expect(calls).toEqual(['hold out', 'hold in']);
    await stdio.dispose();
    expect(calls.slice(2).toSorted()).toEqual(['release in', 'release out']);
  });
});
