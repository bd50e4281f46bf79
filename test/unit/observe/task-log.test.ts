import { execFileSync } from 'node:child_process';
import { closeSync, constants, mkdtempSync, openSync, readdirSync, readSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { formatLine, TaskLog } from '../../../src/observe/task-log.ts';

let bundle: string;
let readers: number[];

beforeEach(() => {
  bundle = mkdtempSync(join(tmpdir(), 'kiln-task-log-'));
  execFileSync('mkfifo', [join(bundle, 'log')]);
  readers = [];
});

afterEach(() => {
  for (const fd of readers) closeSync(fd);
  rmSync(bundle, { recursive: true });
});

/** containerd's end: it opens O_RDWR, but a reader alone lets a test be the last one that leaves. */
function openReader(): number {
  const fd = openSync(join(bundle, 'log'), constants.O_RDONLY | constants.O_NONBLOCK);
  readers.push(fd);
  return fd;
}

function closeReader(fd: number): void {
  readers.splice(readers.indexOf(fd), 1);
  closeSync(fd);
}

function readAll(fd: number): string {
  const buffer = Buffer.alloc(128 * 1024);
  return buffer.toString('utf8', 0, readSync(fd, buffer));
}

describe("the task's log", () => {
  test('arrives in logrus form', () => {
    const fd = openReader();
    using log = new TaskLog(bundle, 'web');
    log.info('container started');
    log.warn('two');
    log.error('say "hi"\n');
    log.debug('four');
    const time = 'time="\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\d\\.\\d{3}Z"';
    expect(readAll(fd).split('\n')).toEqual([
      expect.stringMatching(new RegExp(`^${time} level=info msg="container started" id=web$`)),
      expect.stringMatching(new RegExp(`^${time} level=warning msg=two id=web$`)),
      expect.stringMatching(new RegExp(`^${time} level=error msg="say \\\\"hi\\\\"\\\\n" id=web$`)),
      expect.stringMatching(new RegExp(`^${time} level=debug msg=four id=web$`)),
      '',
    ]);
  });

  test('drops lines without blocking while nobody reads, and tells so afterwards', () => {
    using log = new TaskLog(bundle, 'web');
    log.info('one');
    log.info('two');
    expect(log.dropped).toBe(2);
    const fd = openReader();
    log.info('three');
    expect(log.dropped).toBe(0);
    const text = readAll(fd);
    expect(text).toContain('level=warning msg="2 lines before this one were lost"');
    expect(text).toContain('msg=three');
    expect(text).not.toContain('msg=one');
  });

  test('goes on when containerd was restarted', () => {
    const before = openReader();
    using log = new TaskLog(bundle, 'web');
    log.info('one');
    closeReader(before);
    log.info('two');
    expect(log.dropped).toBe(1);
    const after = openReader();
    log.info('three');
    expect(readAll(after)).toContain('msg=three');
  });

  test('goes on at once when a new containerd reads already', () => {
    const before = openReader();
    using log = new TaskLog(bundle, 'web');
    log.info('one');
    rmSync(join(bundle, 'log'));
    execFileSync('mkfifo', [join(bundle, 'log')]);
    const after = openReader();
    closeReader(before);
    log.info('two');
    expect(log.dropped).toBe(0);
    expect(readAll(after)).toContain('msg=two');
  });

  test('drops lines while the pipe is full, and keeps the pipe', () => {
    const fd = openReader();
    using log = new TaskLog(bundle, 'web');
    while (log.dropped === 0) log.info('x'.repeat(1000));
    expect(readAll(fd)).not.toContain('lost');
    log.info('room again');
    expect(log.dropped).toBe(0);
    expect(readAll(fd)).toContain('msg="room again"');
  });

  test('is silent about a bundle that is gone', () => {
    using log = new TaskLog(join(bundle, 'none'), 'web');
    log.info('one');
    expect(log.dropped).toBe(1);
  });

  test('leaves no descriptor', () => {
    openReader();
    const before = readdirSync('/proc/self/fd').length;
    const log = new TaskLog(bundle, 'web');
    log.info('one');
    log.close();
    log.close();
    log.info('two');
    expect(readdirSync('/proc/self/fd').length).toBe(before);
  });
});

describe('formatLine', () => {
  test.each(['x'.repeat(10_000), '\u0001'.repeat(10_000), 'é "'.repeat(5_000), '\u{1F525}'.repeat(5_000)])(
    'cuts a long message so that two lines fit into one atomic write (%#)',
    (message) => {
      const line = formatLine('info', message, 'web');
      expect(Buffer.byteLength(line)).toBeLessThanOrEqual(2048);
      expect(Buffer.byteLength(line)).toBeGreaterThan(1900);
      expect(line).toMatch(/…" id=web\n$/);
    },
  );
});
