import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import type { TarEntry } from '../../../src/files/tar-entry.ts';
import { padding, tarEnd, tarHeader } from '../../../src/files/tar-write.ts';
import type { Guest } from '../../../src/guest/guest.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import { Changes, planChanges } from '../../../src/sandbox/changes.ts';

const upper = { path: '/snapshot/fs', work: '/snapshot/work', userxattr: false };
const overlay = { upper, writable: { kind: 'in-directory', directory: '/snapshot/work' } } as const;
const native = { upper: null, writable: { kind: 'of-snapshot', snapshot: '/snapshot' } } as const;
const view = { upper: null, writable: null };

describe('what a container writes comes to the host', () => {
  const nerdctl = { 'nerdctl/name': 'web' };
  test.each([
    ['auto', {}, true, false],
    ['auto', nerdctl, true, true],
    ['auto', { ...nerdctl, 'nerdctl/auto-remove': 'false' }, true, true],
    ['auto', { ...nerdctl, 'nerdctl/auto-remove': 'true' }, true, false],
    ['keep', {}, true, true],
    ['keep', { ...nerdctl, 'nerdctl/auto-remove': 'true' }, true, true],
    ['discard', nerdctl, false, false],
  ] as const)('with "%s" and %o at a pause: %s, at its end: %s', (setting, annotations, atPause, atExit) => {
    expect(planChanges(setting, overlay, annotations)).toEqual({ upper, atPause, atExit });
  });

  test('not where the snapshotter has no place for it, which is refused where it was asked for', () => {
    expect(planChanges('auto', native)).toBeUndefined();
    expect(planChanges('keep', view)).toBeUndefined();
    expect(() => planChanges('keep', native)).toThrow(expect.objectContaining({ code: 'unimplemented' }));
  });
});

describe('the changes of a container', () => {
  let dir: string;
  let asked: bigint[];
  let log: string;
  const at = (...parts: string[]) => join(dir, 'fs', ...parts);

  beforeEach(() => {
    dir = mkdtempSync(join(tmpdir(), 'kt-changes-'));
    for (const name of ['fs', 'work']) mkdirSync(join(dir, name));
    writeFileSync(join(dir, 'disk'), Buffer.alloc(1024));
    asked = [];
    log = '';
  });
  afterEach(() => rmSync(dir, { recursive: true, force: true }));

  function file(path: string, content: string, given: Partial<TarEntry> = {}): Buffer {
    const owner = { uid: process.getuid?.() ?? 0, gid: process.getgid?.() ?? 0 };
    const fields = {
      ...owner,
      mode: 0o644,
      mtimeNs: 0n,
      target: '',
      major: 0,
      minor: 0,
      xattrs: new Map(),
      unchanged: false,
    };
    const entry = { ...fields, path, type: 'file' as const, size: content.length, ...given };
    return Buffer.concat([
      tarHeader(entry),
      Buffer.from(entry.unchanged ? '' : content),
      padding(entry.unchanged ? 0 : content.length),
    ]);
  }

  /** @param answers what the guest sends, one after the other */
  function changes(plan: { atPause?: boolean; atExit?: boolean }, ...answers: (Buffer[] | Error)[]): Changes {
    const guest = {
      readChanges: (_id: string, sinceNs: bigint) => {
        asked.push(sinceNs);
        const answer = answers[asked.length - 1];
        const pieces = async function* () {
          if (answer instanceof Error) throw answer;
          yield* answer ?? [];
          yield tarEnd;
        };
        return { nowNs: Promise.resolve(BigInt(asked.length)), pieces: pieces() };
      },
    } as unknown as Guest;
    const whole = {
      upper: { path: at(), work: join(dir, 'work'), userxattr: false },
      atPause: false,
      atExit: false,
      ...plan,
    };
    const write = (line: string) => {
      log += line;
    };
    const logger = loggerTo({ write }, 'info');
    return new Changes(whole, { id: 'c1', guest: () => guest, disk: join(dir, 'disk'), logger });
  }

  test('come at each pause, and what has not changed since the last one only once', async () => {
    const seen = changes(
      { atPause: true },
      [file('f', 'one')],
      [file('f', 'one', { unchanged: true }), file('g', 'two')],
    );
    await seen.paused();
    await seen.paused();
    expect(asked).toEqual([0n, 1n]);
    expect([readFileSync(at('f'), 'utf8'), readFileSync(at('g'), 'utf8')]).toEqual(['one', 'two']);
  });

  test('come whole again when the host has changed what the guest takes for unchanged', async () => {
    const unchanged = [file('f', 'one', { unchanged: true })];
    const seen = changes({ atPause: true }, [file('f', 'one')], unchanged, [file('f', 'one')]);
    await seen.paused();
    writeFileSync(at('f'), 'of another size');
    await seen.paused();
    expect(asked).toEqual([0n, 1n, 0n]);
    expect(readFileSync(at('f'), 'utf8')).toBe('one');
  });

  test('that do not come fail a pause; at the end they are missed in the log, and nothing else', async () => {
    const lost = new KilnError('unavailable', 'the connection to the guest was lost');
    await expect(changes({ atPause: true }, lost).paused()).rejects.toMatchObject({ code: 'unavailable' });
    asked = [];
    await changes({ atExit: true }, lost).ended();
    expect(log).toContain('commit, diff and cp do not see it');
    expect(readdirSync(at())).toEqual([]);
  });

  test('are limited by the size of the disk', async () => {
    const seen = changes({ atPause: true }, [file('f', 'x'.repeat(2000))]);
    await expect(seen.paused()).rejects.toMatchObject({ code: 'resource-exhausted' });
  });

  test('do not come where they are not to', async () => {
    const seen = changes({});
    await seen.paused();
    await seen.ended();
    await seen.resuming();
    expect(asked).toEqual([]);
  });

  test('of devices are told in the log', async () => {
    const device = { type: 'block', major: 8, minor: 1 } as const;
    await changes({ atPause: true }, [file('disk', '', device)]).paused();
    expect(log).toContain('devices that the container has made are not made on the host');
    expect(log).toContain('disk');
  });
});
