import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { loopbackNameservers, readLoopbackNameservers } from '../../../src/network/resolv-conf.ts';

describe('the loopback name servers of a resolv.conf', () => {
  it.each([
    ['nameserver 127.0.0.11\noptions ndots:0\n', ['127.0.0.11']],
    [
      '# made by hand\nsearch lan\nnameserver\t127.0.0.53 trailing\nnameserver 10.0.0.1\nnameserver ::1',
      ['127.0.0.53', '::1'],
    ],
    ['nameserver 0:0:0:0:0:0:0:1\nnameserver ::1\n', ['::1']],
    ['nameserver 10.0.0.1\nnameserver 8.8.8.8\nnameserver fe80::1%eth0\n', []],
    // A resolver looks at three.
    ['nameserver 10.0.0.1\nnameserver 10.0.0.2\nnameserver 10.0.0.3\nnameserver 127.0.0.1\n', []],
    ['nameserver 127.0.0.256\nnameserver localhost\n nameserver 127.0.0.1\n#nameserver 127.0.0.1\nnameserver\n', []],
    ['', []],
  ])('of %j are %j', (text, found) => {
    expect(loopbackNameservers(text)).toEqual(found);
  });
});

describe('the file', () => {
  const folder = mkdtempSync(join(tmpdir(), 'kt-resolv-'));
  afterAll(() => rmSync(folder, { recursive: true }));
  const text = 'nameserver 127.0.0.11\n';

  it('may be a link', () => {
    writeFileSync(join(folder, 'file'), text);
    symlinkSync('file', join(folder, 'link'));
    expect(readLoopbackNameservers(join(folder, 'file'))).toEqual(['127.0.0.11']);
    expect(readLoopbackNameservers(join(folder, 'link'))).toEqual(['127.0.0.11']);
  });

  it('names none where it is gone, or none that could be read', () => {
    execFileSync('mkfifo', [join(folder, 'fifo')]);
    for (const name of ['gone', 'fifo', '.']) expect(readLoopbackNameservers(join(folder, name))).toEqual([]);
    expect(readLoopbackNameservers('/dev/zero')).toEqual([]);
  });

  it('is not read to the end of what a container may write to it', () => {
    writeFileSync(join(folder, 'large'), `${'#'.repeat(70_000)}\n${text}`);
    expect(readLoopbackNameservers(join(folder, 'large'))).toEqual([]);
  });
});
