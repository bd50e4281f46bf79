import { execFileSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { T } from '../../support/ninep.ts';
import { useShares } from './share.ts';

describe('a guest that wants more than it may have', () => {
  const share = useShares();

  test('gets errors, and no end of the server, when it holds as many files as it may', async () => {
    const { client, server } = await share();
    const limit = 5000; // It is some 500,000 else, where the host allows that.
    execFileSync('prlimit', ['--pid', String(server.pid), `--nofile=${limit}`]);
    const batch = 500;
    let refused = 0;
    for (let made = 0; made < limit && refused === 0; made += batch) {
      const walks = Array.from({ length: batch }, () => client.walk('0'));
      refused = (await Promise.allSettled(walks)).filter(({ status }) => status === 'rejected').length;
    }
    expect(refused).toBeGreaterThan(0);
    await client.version(65536);
    await client.attach(0);
    await client.walk('0');
  });

  test('gets errors, and no more memory, for fids and attributes that need no file of their own', async () => {
    const { client, server, source } = await share();
    const kib = () => Number(/^VmRSS:\s+(\d+) kB/m.exec(readFileSync(`/proc/${server.pid}/status`, 'utf8'))?.[1]);
    writeFileSync(path.join(source, 'file'), '');
    const value = Buffer.alloc(60_000, 'v');
    let refused = 0;
    for (let made = 0; made < 600; made += 50) {
      const attributes = Array.from({ length: 50 }, async () => {
        const fid = await client.walk('0/file');
        await client.call(T.xattrcreate, [[4, fid], 'user.x', [8, value.length], [4, 0]]);
        await client.write(fid, 0, value);
      });
      refused += (await Promise.allSettled(attributes)).filter(({ status }) => status === 'rejected').length;
    }
    expect(refused).toBeGreaterThan(300);
    expect(kib()).toBeLessThan(40_000);
    await client.version(65536); // All is given back.
    await client.attach(0);
    await client.setxattr('0/file', 'user.x', 'value');
    expect((await client.getxattr(await client.walk('0/file'), 'user.x')).toString()).toBe('value');
  });

  test('cannot write more to an attribute than it has room for, also not with many requests at once', async () => {
    const { client } = await share();
    const value = Buffer.alloc(60_000, 'v');
    for (let round = 0; round < 200; round++) {
      const fid = await client.walk('0');
      await client.call(T.xattrcreate, [[4, fid], 'user.x', [8, value.length], [4, 0]]);
      const parts = [value, ...Array.from({ length: 20 }, () => 'v')];
      const writes = await Promise.allSettled(parts.map((part) => client.write(fid, 0, part)));
      expect(writes.filter(({ status }) => status === 'fulfilled')).toHaveLength(1);
      await client.clunk(fid).catch(() => {}); // Not every file system takes one as long.
    }
  });
});
