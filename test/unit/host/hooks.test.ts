import { execFileSync } from 'node:child_process';
import { chmodSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import { type HookCommand, runHook } from '../../../src/host/hooks.ts';

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'kiln-hook-'));
});
afterEach(() => rmSync(directory, { recursive: true, force: true }));

const file = (name: string): string => join(directory, name);
const content = (name: string): string => readFileSync(file(name), 'utf8');

/** A hook of a few lines of shell, which run in `directory`. */
function hook(script: string, more: Partial<HookCommand> = {}): HookCommand {
  return { path: '/bin/sh', args: ['sh', '-c', script], env: ['PATH=/usr/bin:/bin'], ...more };
}

const run = (command: HookCommand, state = '{"id":"c1"}', signal?: AbortSignal) =>
  runHook(command, { state, cwd: directory, signal });

async function failureOf(running: Promise<void>): Promise<KilnError> {
  const error: unknown = await running.then(
    () => new Error('it succeeded'),
    (thrown: unknown) => thrown,
  );
  if (error instanceof KilnError) return error;
  throw error;
}

/** Resolves when a process is gone; a zombie whose parent is gone is taken away by init at once. */
async function gone(pid: number): Promise<void> {
  for (;;) {
    try {
      if (/^State:\s+[ZX]/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'))) return;
    } catch {
      return;
    }
    await new Promise(setImmediate);
  }
}

describe('a hook', () => {
  test('reads the state on its stdin, also by /dev/stdin', async () => {
    await run(hook('cat > read; '), '{"id":"a"}');
    expect(content('read')).toBe('{"id":"a"}');
    await run(hook('cat /dev/stdin > again'), '{"id":"b"}');
    expect(content('again')).toBe('{"id":"b"}');
  });

  test('reads a state that is larger than a pipe', async () => {
    const state = JSON.stringify({ annotations: { long: 'x'.repeat(1_000_000) } });
    await run(hook('cat > read'), state);
    expect(content('read')).toBe(state);
  });

  test('need not read its stdin, however large the state is', async () => {
    await run(hook('exec <&-; : > ran'), 'x'.repeat(1_000_000));
    expect(existsSync(file('ran'))).toBe(true);
  });

  test('gets its arguments verbatim, the first as its own name', async () => {
    const path = file('show');
    writeFileSync(path, '#!/bin/sh\ntr "\\0" "\\n" < /proc/$$/cmdline > argv\n');
    chmodSync(path, 0o755);
    await run({ path, args: ['my name', '', 'two  words', '$HOME', "'"], env: ['PATH=/usr/bin:/bin'] });
    // The kernel puts a script's interpreter and path in the place of argv[0].
    expect(content('argv')).toBe(`/bin/sh\n${path}\n\ntwo  words\n$HOME\n'\n`);
    await run({ path: '/bin/sh', args: ['my name', '-c', 'echo "$0" > zero'] });
    await run({ path: '/bin/sh', args: ['my name', '-c', 'read -r all < /proc/$$/cmdline; echo "$all" > zero'] });
    expect(content('zero')).toMatch(/^my name/);
  });

  test('without arguments has its path as its name', async () => {
    const path = file('bare');
    writeFileSync(path, '#!/bin/sh\necho "$0 $#" > bare-ran\n');
    chmodSync(path, 0o755);
    await run({ path });
    expect(content('bare-ran')).toBe(`${path} 0\n`);
  });

  test('has the environment that it lists, and nothing else', async () => {
    await run({ path: '/usr/bin/env', args: ['env', '-u', 'NONE', 'sh', '-c', 'cat /proc/$$/environ > seen'] });
    expect(content('seen')).toBe('');
    await run(hook('tr "\\0" "\\n" < /proc/$$/environ > seen', { env: ['PATH=/usr/bin:/bin', 'A=b=c', 'E=', 'A=2'] }));
    expect(content('seen')).toBe('PATH=/usr/bin:/bin\nA=b=c\nE=\n');
  });

  test('leads a process group of its own in the folder it is given, and is not protected from the OOM killer', async () => {
    await run(
      hook('pwd > where; read -r _ _ _ _ group rest < /proc/$$/stat; [ "$group" = $$ ] && : > leads; exec cat > s'),
    );
    expect(content('where').trim()).toBe(directory);
    expect(existsSync(file('leads'))).toBe(true);
  });

  test('has no descriptors but its three', async () => {
    const list = () => content('fds').trim().split('\n');
    await run(hook('ls /proc/self/fd > fds'));
    const plain = execFileSync('ls', ['/proc/self/fd'], { encoding: 'utf8', stdio: ['pipe', 'pipe', 'pipe'] });
    expect(list()).toEqual(plain.trim().split('\n'));
  });

  test('may leave a process in the background that holds its stderr', async () => {
    await run(hook('sleep 1000 & echo $! > pid'));
    const pid = Number(content('pid'));
    process.kill(pid, 'SIGKILL');
  });
});

describe('a hook that fails', () => {
  test('is an error with its path, its status and what it said', async () => {
    const error = await failureOf(run(hook('echo out; echo no such bridge >&2; exit 3')));
    expect([error.code, error.message]).toEqual(['internal', '/bin/sh failed (exit code 3): no such bridge']);
  });

  test('says what it said through /dev/stderr, too', async () => {
    const error = await failureOf(run(hook('echo by name > /dev/stderr; exit 1')));
    expect(error.message).toBe('/bin/sh failed (exit code 1): by name');
  });

  test('with nothing to say is an error, too', async () => {
    expect((await failureOf(run(hook('exit 1')))).message).toBe('/bin/sh failed (exit code 1)');
  });

  test('by a signal is an error with the signal', async () => {
    expect((await failureOf(run(hook('echo x >&2; kill -TERM $$')))).message).toBe('/bin/sh failed (SIGTERM): x');
  });

  test('with a lot to say is told by the end of it, without control characters', async () => {
    const script = `i=0; while [ $i -lt 20000 ]; do echo "line $i of many"; i=$((i+1)); done >&2; printf '\\033[31mlast\\n' >&2; exit 1`;
    const { message } = await failureOf(run(hook(script)));
    expect(message.endsWith('line 19999 of many\nlast')).toBe(true);
    expect(Buffer.byteLength(message)).toBeLessThan(2200);
  });

  test('does not wait for a process in the background that holds its stderr', async () => {
    const error = await failureOf(run(hook('sleep 1000 & echo $! > pid; echo words >&2; exit 1')));
    expect(error.message).toBe('/bin/sh failed (exit code 1): words');
    process.kill(Number(content('pid')), 'SIGKILL');
  });

  test.each<[string, () => string, string]>([
    ['is not there', () => file('nothing'), 'ENOENT'],
    ['may not be executed', () => file('plain'), 'EACCES'],
    ['is a folder', () => directory, 'EACCES'],
  ])('because it %s is an error with its path', async (_what, path, code) => {
    writeFileSync(file('plain'), '#!/bin/sh\n', { mode: 0o644 });
    const error = await failureOf(run({ path: path() }));
    expect([error.code, error.message]).toEqual(['failed-precondition', `${path()} cannot be executed: ${code}`]);
  });
});

describe('a hook that is stopped', () => {
  test('because it took too long ends with its whole process group', async () => {
    const started = performance.now();
    const error = await failureOf(
      run(hook('sleep 1000 & echo $! > pid; echo waiting >&2; wait; : > survived', { timeoutMs: 500 })),
    );
    expect([error.code, error.message]).toEqual([
      'deadline-exceeded',
      '/bin/sh took longer than its timeout of 0.5 s: waiting',
    ]);
    expect(performance.now() - started).toBeLessThan(10_000);
    await gone(Number(content('pid')));
    expect(existsSync(file('survived'))).toBe(false);
  });

  test('though it ignores every signal that can be ignored', async () => {
    const error = await failureOf(run(hook('trap "" TERM INT HUP; sleep 1000', { timeoutMs: 200 })));
    expect(error.code).toBe('deadline-exceeded');
  });

  test('from outside rejects with the reason', async () => {
    const abort = new AbortController();
    const reason = new KilnError('canceled', 'deleted meanwhile');
    const running = run(hook('sleep 1000'), '{}', abort.signal);
    abort.abort(reason);
    expect(await failureOf(running)).toBe(reason);
    expect(await failureOf(run(hook(': > ran'), '{}', abort.signal))).toBe(reason);
    expect(existsSync(file('ran'))).toBe(false);
  });

  test('not at once for a timeout of a hundred years', async () => {
    await run(hook('exit 0', { timeoutMs: 100 * 365 * 86400 * 1000 }));
  });
});
