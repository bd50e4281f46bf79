import { once } from 'node:events';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync, watch, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Writable } from 'node:stream';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { openStdio, type Stdio, type StdioOptions, type StdioPaths } from '../../../src/shim/stdio.ts';
import { parseLoggerUri } from '../../../src/shim/stdio-logger.ts';
import { waitForEnd } from '../../support/wait-for-end.ts';

let folder: string;
let directory: string;
let stack: AsyncDisposableStack;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'kiln-logger-'));
  directory = join(folder, 'c');
  mkdirSync(directory);
  stack = new AsyncDisposableStack();
});

afterEach(async () => {
  await stack.disposeAsync();
  // Whatever a test does: nothing of ours is open or there, and nobody has the folder's name among its arguments for
  // longer than a process that was killed takes to die.
  const left = { open: openFiles(), files: readdirSync(directory) };
  for (const pid of processesOf(folder)) await waitForEnd(pid, 2_000);
  rmSync(folder, { recursive: true });
  expect(left).toEqual({ open: [], files: [] });
});

/** Makes a logger of these lines; `$OUT` is the test's folder. Its URI. */
function logger(script: string, query = '', scheme = 'binary'): string {
  const file = join(folder, 'logger');
  writeFileSync(file, `#!/bin/sh\nOUT=${folder}\n${script}\n`, { mode: 0o755 });
  return `${scheme}://${file}${query}`;
}

/** Writes each stream to a file of its own, as a logger should. */
const toFiles = 'exec 5>&-; cat <&3 >$OUT/out & cat <&4 >$OUT/err; wait';

async function open(uri: string, paths: Partial<StdioPaths> = {}, options: Partial<StdioOptions> = {}): Promise<Stdio> {
  const given = { stdin: '', stdout: uri, stderr: uri, terminal: false, ...paths };
  return stack.use(await openStdio(given, { id: 'c1', namespace: 'ns1', directory, ...options }));
}

const failure = (uri: string, paths: Partial<StdioPaths> = {}, options: Partial<StdioOptions> = {}): Promise<unknown> =>
  open(uri, paths, options).then(
    () => 'opened',
    (error: unknown) => error,
  );

const impatient = { loggerLimits: { readyMs: 300, endMs: 100, termMs: 200 } };

function writeOut(stream: Writable | null, chunk: Buffer | string): Promise<void> {
  return new Promise((resolve, reject) => {
    stream?.write(chunk, (error) => (error ? reject(error) : resolve()));
  });
}

const read = (name: string): string => readFileSync(join(folder, name), 'utf8');

/** Waits for the logger to make this file of the folder. */
async function madeFile(name: string): Promise<void> {
  const watcher = watch(folder);
  try {
    while (!readdirSync(folder).includes(name)) await once(watcher, 'change');
  } finally {
    watcher.close();
  }
}

function processesOf(text: string): number[] {
  const names = readdirSync('/proc').filter((name) => /^\d+$/.test(name));
  return names.map(Number).filter((pid) => {
    try {
      return ['cmdline', 'environ'].some((file) => readFileSync(`/proc/${pid}/${file}`, 'utf8').includes(text));
    } catch {
      return false;
    }
  });
}

function openFiles(): string[] {
  return readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      const target = readlinkSync(`/proc/self/fd/${fd}`);
      return target.startsWith(folder) ? [target] : [];
    } catch {
      return [];
    }
  });
}

describe('a logger', () => {
  test('gets both outputs to the byte, each on its descriptor', async () => {
    const stdio = await open(logger(toFiles));
    const sent = Buffer.alloc(3 * 1024 * 1024, 'some text that is no multiple of a block. ');
    await writeOut(stdio.stderr, 'to stderr');
    for (let at = 0; at < sent.length; at += 100_003) await writeOut(stdio.stdout, sent.subarray(at, at + 100_003));
    await stdio.finish();
    await stdio.dispose();
    expect(readFileSync(join(folder, 'out')).equals(sent)).toBe(true);
    expect(read('err')).toBe('to stderr');
  });

  test('gets the parameters as arguments, and two variables as its whole environment', async () => {
    const script = `tr '\\0' '\\n' </proc/$$/environ >$OUT/environment; printf '<%s>' "$@" >$OUT/arguments; ${toFiles}`;
    const stdio = await open(logger(script, '?k=v&k2=a%20b%26c+d&k=other&flag'));
    await stdio.dispose();
    expect(read('environment')).toBe('CONTAINER_ID=c1\nCONTAINER_NAMESPACE=ns1\n');
    expect(read('arguments')).toBe('<k><v><k2><a b&c d><flag><>');
  });

  test('has the descriptors of the protocol and no others, and a session of its own', async () => {
    const script = `ls /proc/$$/fd >$OUT/fds; cut -d' ' -f6 /proc/$$/stat >$OUT/session; echo $$ >$OUT/pid; ${toFiles}`;
    const stdio = await open(logger(script));
    await stdio.dispose();
    // 10 and above are the shell's own: its script.
    expect(
      read('fds')
        .split('\n')
        .filter((fd) => Number(fd) < 10 && fd !== ''),
    ).toEqual(['0', '1', '2', '3', '4', '5']);
    expect(read('session')).toBe(read('pid'));
  });

  test('of a terminal gets stdout alone, and stderr ends with it', async () => {
    const stdio = await open(logger('exec 5>&-; cat <&4; echo $(cat <&3) >$OUT/both'), { stderr: '', terminal: true });
    expect(stdio.stderr).toBeNull();
    await writeOut(stdio.stdout, 'screen');
    await stdio.finish();
    await stdio.dispose();
    expect(read('both')).toBe('screen\n');
  });

  test('that stdout alone names gets stderr too', async () => {
    const stdio = await open(logger(toFiles), { stderr: '' });
    await writeOut(stdio.stderr, 'err');
    await stdio.finish();
    await stdio.dispose();
    expect(read('err')).toBe('err');
  });

  test('that reads slowly holds the writer back', async () => {
    const stdio = await open(logger('exec 5>&-; read -r go <&4; cat <&3 >$OUT/out; exit 0'));
    const sent = Buffer.alloc(1024 * 1024, 'x');
    let written = false;
    const done = writeOut(stdio.stdout, sent).then(() => {
      written = true;
    });
    await writeOut(stdio.stderr, 'wait for it\n'.slice(0, 4));
    expect(written).toBe(false);
    expect(stdio.stdout?.writableNeedDrain).toBe(true);
    await writeOut(stdio.stderr, 'go\n');
    await done;
    await stdio.finish();
    await stdio.dispose();
    expect(readFileSync(join(folder, 'out')).equals(sent)).toBe(true);
  });

  test('is waited for by dispose, so that what it makes of the last bytes is there', async () => {
    const stdio = await open(logger('exec 5>&-; cat <&3 >$OUT/part; sleep 0.3; mv $OUT/part $OUT/whole'));
    await writeOut(stdio.stdout, 'all of it');
    await stdio.finish();
    await stdio.dispose();
    expect(read('whole')).toBe('all of it');
  });

  test('that lives on after the end is told by SIGTERM, without a complaint', async () => {
    const errors: Error[] = [];
    const script = 'trap "echo told >$OUT/told; exit 0" TERM; exec 5>&-; cat <&3; while :; do sleep 0.05; done';
    const options = { loggerLimits: { ...impatient.loggerLimits, termMs: 10_000 } };
    const stdio = await open(logger(script), {}, { ...options, onError: (_name, error) => errors.push(error) });
    await stdio.finish();
    await stdio.dispose();
    expect(read('told')).toBe('told\n');
    expect(errors).toEqual([]);
  });

  test('that lives on after SIGTERM is killed with its children, and that is reported', async () => {
    const errors: Error[] = [];
    const script = `trap "" TERM; exec 5>&-; while :; do sh -c "sleep 1000; : ${folder}"; done`;
    const stdio = await open(logger(script), {}, { ...impatient, onError: (_name, error) => errors.push(error) });
    await stdio.finish();
    await stdio.dispose();
    expect(errors.map((error) => error.message)).toEqual([`the logger "${folder}/logger" ended (SIGKILL)`]);
  });

  test('that dies is reported once, and holds the writer back no more', async () => {
    const errors: string[] = [];
    const { promise: reported, resolve } = Promise.withResolvers<void>();
    const onError = (name: string, error: Error) => {
      errors.push(`${name}: ${error.message}`);
      resolve();
    };
    const script = 'exec 5>&-; read -r line <&4; echo "disk of the log is full" >&2; exit 3';
    const stdio = await open(logger(script), {}, { onError });
    const stuck = writeOut(stdio.stdout, Buffer.alloc(1024 * 1024));
    await writeOut(stdio.stderr, 'die\n');
    await reported;
    await stuck;
    for (let i = 0; i < 20; i += 1) await writeOut(stdio.stdout, Buffer.alloc(64 * 1024));
    await writeOut(stdio.stderr, 'nobody hears it');
    await stdio.finish();
    await stdio.dispose();
    const message = `the logger "${folder}/logger" ended (exit code 3) before the output did: disk of the log is full`;
    expect(errors).toEqual([`stdout: ${message}`]);
  });

  test('that fails after the end of the output is reported', async () => {
    const errors: string[] = [];
    const stdio = await open(
      logger('exec 5>&-; cat <&3; echo cannot flush >&2; exit 4'),
      {},
      {
        onError: (_name, error) => errors.push(error.message),
      },
    );
    await stdio.finish();
    await stdio.dispose();
    expect(errors).toEqual([`the logger "${folder}/logger" ended (exit code 4): cannot flush`]);
  });

  test('may write to its stdout and stderr without end', async () => {
    const stdio = await open(logger(`head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2; ${toFiles}`));
    await writeOut(stdio.stdout, 'heard');
    await stdio.finish();
    await stdio.dispose();
    expect(read('out')).toBe('heard');
  });

  test('may say more than a byte when it is ready', async () => {
    const stdio = await open(logger('echo ready >&5; echo still >&5; echo here >&5; exec cat <&3 >$OUT/out'));
    await writeOut(stdio.stdout, 'heard');
    await stdio.finish();
    await stdio.dispose();
    expect(read('out')).toBe('heard');
  });

  test('disposed of twice, and before anything was written, just ends', async () => {
    const stdio = await open(logger(toFiles));
    await Promise.all([stdio.dispose(), stdio.dispose()]);
    await stdio.finish();
    expect(read('out')).toBe('');
  });
});

describe('a logger of binary-v2', () => {
  test('is ready when it writes a byte', async () => {
    const stdio = await open(logger(`printf r >&5; ${toFiles}`, '?a=b', 'binary-v2'));
    await writeOut(stdio.stdout, 'text');
    await stdio.finish();
    await stdio.dispose();
    expect(read('out')).toBe('text');
  });

  test('is refused when it closes descriptor 5 without one', async () => {
    expect(await failure(logger('echo oops >&2; exec 5>&-; cat <&3', '', 'binary-v2'))).toMatchObject({
      code: 'failed-precondition',
      message: `the logger "${folder}/logger" closed descriptor 5 without a byte before it was ready: oops`,
      hint: 'a logger writes a byte to descriptor 5',
    });
  });

  test('that fails first is refused with what it said', async () => {
    expect(await failure(logger('echo no such bucket >&2; exit 9', '', 'binary-v2'))).toMatchObject({
      message: `the logger "${folder}/logger" ended (exit code 9) before it was ready: no such bucket`,
    });
  });
});

describe('a logger is refused', () => {
  test('that does not exist', async () => {
    expect(await failure('binary:///no/such/logger')).toMatchObject({
      code: 'failed-precondition',
      message: 'cannot run the logger "/no/such/logger": ENOENT',
    });
  });

  test('that cannot be executed', async () => {
    writeFileSync(join(folder, 'text'), 'text', { mode: 0o644 });
    expect(await failure(`binary://${folder}/text`)).toMatchObject({
      message: `cannot run the logger "${folder}/text": EACCES`,
    });
  });

  test.each([
    ['exit code 5', 'echo wrong arguments >&2; exit 5'],
    ['exit code 0', 'echo wrong arguments; exit 0'],
    ['SIGKILL', 'echo wrong arguments; kill -9 $$'],
  ])('that ends before it is ready (%s)', async (how, script) => {
    for (let i = 0; i < 5; i += 1) {
      expect(await failure(logger(script))).toMatchObject({
        code: 'failed-precondition',
        message: `the logger "${folder}/logger" ended (${how}) before it was ready: wrong arguments`,
      });
    }
  });

  test('that never gets ready, and is killed with its children', async () => {
    const script = `trap "" TERM; echo thinking; touch $OUT/up; sh -c "sleep 1000; : ${folder}"`;
    const refused = failure(logger(script), {}, { loggerLimits: { ...impatient.loggerLimits, readyMs: 1000 } });
    await madeFile('up');
    expect(await refused).toMatchObject({
      code: 'deadline-exceeded',
      message: `the logger "${folder}/logger" was not ready within 1 s: thinking`,
    });
  });

  test('before anybody holds its streams: it sees them end, and ends', async () => {
    const held: string[] = [];
    const holds = { holdFifo: async (path: string) => void held.push(path), releaseFifo: async () => {} };
    const uri = logger('cat <&3; cat <&4; echo ended >$OUT/ended; exit 3');
    const limits = { readyMs: 300, endMs: 5_000, termMs: 5_000 };
    expect(await failure(uri, {}, { loggerLimits: limits, holds })).toMatchObject({ code: 'deadline-exceeded' });
    expect(held).toEqual([]);
    const early = logger('exec 3<&- 4<&-; exit 3');
    expect(await failure(early, {}, { holds })).toMatchObject({ code: 'failed-precondition' });
    expect(held).toEqual([]);
  });

  test('for one output when the other goes elsewhere', async () => {
    const uri = logger(toFiles);
    const message = expect.stringContaining('but stderr is');
    expect(await failure(uri, { stderr: '/tmp/x' })).toMatchObject({ code: 'invalid-argument', message });
    expect(await failure('', { stderr: uri })).toMatchObject({ code: 'invalid-argument', message });
  });

  test.each([
    ['binary://host/path', '"host" is where a host stands'],
    ['binary://', 'names no program'],
    ['binary:///', 'names no program'],
    ['binary:///a%zz', 'not a valid URI'],
  ])('with a URI like %s', async (uri, message) => {
    expect(await failure(uri)).toMatchObject({ code: 'invalid-argument', message: expect.stringContaining(message) });
  });
});

describe('a logger that is taken over', () => {
  test('gets what comes after what it had, and is ended as any other', async () => {
    const uri = logger(toFiles);
    const earlier = await open(uri);
    await writeOut(earlier.stdout, 'before ');
    const later = await open(uri, {}, { adopt: true });
    // As kilnd's end does.
    for (const stream of [earlier.stdout, earlier.stderr]) stream?.destroy();
    await writeOut(later.stdout, 'after');
    await writeOut(later.stderr, 'err');
    await later.finish();
    await later.dispose();
    expect([read('out'), read('err')]).toEqual(['before after', 'err']);
  });

  test('and has ended loses what comes, holds nobody back, and is told of', async () => {
    const uri = logger('exec 5>&-; cat <&3 >/dev/null');
    const earlier = await open(uri);
    await earlier.dispose();
    const errors: string[] = [];
    const later = await open(
      uri,
      {},
      { adopt: true, onError: (name, { message }) => void errors.push(`${name}: ${message}`) },
    );
    await writeOut(later.stdout, Buffer.alloc(200_000));
    await later.finish();
    expect(errors).toEqual([`stdout: the logger "${join(folder, 'logger')}" has ended`]);
  });
});

test('the streams of a logger are held by whoever outlives kilnd, until they are done with', async () => {
  const held = new Set<string>();
  const holds = {
    holdFifo: async (path: string) => void held.add(path),
    releaseFifo: async (path: string) => void held.delete(path),
  };
  const stdio = await open(logger(toFiles), {}, { holds });
  expect([...held].toSorted()).toEqual([join(directory, 'logger-stderr'), join(directory, 'logger-stdout')]);
  await stdio.finish();
  expect([...held]).toEqual([]);
  await stdio.dispose();
});

test('a logger’s URI is read as containerd reads it', () => {
  expect(parseLoggerUri('/run/fifo')).toBeNull();
  expect(parseLoggerUri('file:///x')).toBeNull();
  expect(parseLoggerUri('binary:///usr/bin/a%20b?x=1')).toEqual({
    program: '/usr/bin/a b',
    args: ['x', '1'],
    ready: 'byte-or-end',
  });
  expect(parseLoggerUri('BINARY-V2:///l')).toEqual({ program: '/l', args: [], ready: 'byte' });
});
