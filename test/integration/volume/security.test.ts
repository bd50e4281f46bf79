import { constants, mkdirSync, readdirSync, readFileSync, renameSync, symlinkSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { encode, type Field, T } from '../../support/ninep.ts';
import { errno, fails } from './errno.ts';
import { useShares } from './share.ts';

const { O_RDONLY, O_RDWR, O_WRONLY } = constants;

describe('a guest that speaks 9P itself', () => {
  const share = useShares();

  /** A secret of the host beside the volume, which is nobody's to see. */
  async function shareWithSecret(more: Parameters<typeof share>[0] = () => []) {
    const made = await share((folder) => {
      writeFileSync(path.join(folder, 'secret'), 'secret');
      mkdirSync(path.join(folder, 'other'));
      writeFileSync(path.join(folder, 'other', 'file'), 'of the other volume');
      return [{ source: path.join(folder, 'other') }, ...more(folder)];
    });
    mkdirSync(path.join(made.source, 'inner'));
    return made;
  }

  test('sees the volumes by their numbers and nothing else', async () => {
    const { client } = await shareWithSecret();
    const root = await client.readdir(await client.open('', O_RDONLY));
    expect(root.map(({ name }) => name).sort()).toEqual(['.', '..', '0', '1']);
  });

  test('cannot go up, neither from a volume nor from the root nor by a name with slashes', async () => {
    const { client } = await shareWithSecret();
    const volume = await client.walk('0');
    for (const name of ['..', '.', '', '../secret', 'inner/..', '/etc/passwd', '/', 'inner/../../secret']) {
      for (const from of [0, volume]) {
        const walk = client.call(T.walk, [[4, from], [4, client.newFid()], [2, 1], name]);
        await fails(walk, errno.EINVAL);
      }
      await fails(client.call(T.mkdir, [[4, volume], name, [4, 0o755], [4, 0]]), errno.EINVAL);
      await fails(client.call(T.symlink, [[4, volume], name, 'x', [4, 0]]), errno.EINVAL);
      await fails(client.call(T.unlinkat, [[4, volume], name, [4, 0]]), errno.EINVAL);
      await fails(client.call(T.renameat, [[4, volume], name, [4, volume], 'x']), errno.EINVAL);
      await fails(client.call(T.renameat, [[4, volume], 'inner', [4, volume], name]), errno.EINVAL);
      await fails(client.call(T.link, [[4, volume], [4, volume], name]), errno.EINVAL);
      await fails(client.call(T.lcreate, [[4, volume], name, [4, 2], [4, 0o644], [4, 0]]), errno.EINVAL);
      await fails(client.call(T.mknod, [[4, volume], name, [4, 0o100644], [4, 0], [4, 0], [4, 0]]), errno.EINVAL);
    }
    await fails(client.call(T.walk, [[4, volume], [4, 999], [2, 1], 'a\0b']), errno.EINVAL);
    // As far as it goes, and no fid is made: "inner", and not what is above it.
    const reply = await client.call(T.walk, [[4, volume], [4, 999], [2, 3], 'inner', '..', '..']);
    expect(reply.u16()).toBe(1);
    await fails(client.getattr(999), errno.EBADF);
  });

  test('cannot go through a symbolic link, to outside or to another volume', async () => {
    const { client, source, folder } = await shareWithSecret();
    symlinkSync(path.join(folder, 'secret'), path.join(source, 'absolute'));
    symlinkSync('../secret', path.join(source, 'relative'));
    symlinkSync('..', path.join(source, 'up'));
    symlinkSync('/', path.join(source, 'slash'));
    symlinkSync('/1', path.join(source, 'volume'));
    symlinkSync('/proc/self/root', path.join(source, 'magic'));
    for (const name of ['absolute', 'relative', 'up', 'slash', 'volume', 'magic']) {
      await fails(client.open(`0/${name}`, O_RDONLY), errno.ELOOP);
      await fails(client.create(`0/${name}`, { flags: O_RDWR }), errno.ELOOP);
    }
    for (const name of ['up/secret', 'slash/etc', 'volume/file', 'magic/etc']) {
      await fails(client.walk(`0/${name}`), errno.ENOENT);
    }
    const link = await client.walk('0/slash');
    await fails(client.call(T.walk, [[4, link], [4, 999], [2, 1], 'etc']), errno.ENOTDIR);
    await fails(client.call(T.mkdir, [[4, link], 'new', [4, 0o755], [4, 0]]), errno.ENOTDIR);
    expect(readFileSync(path.join(folder, 'secret'), 'utf8')).toBe('secret');
  });

  test('has a folder that it has found and the host has moved out, and nothing beside it', async () => {
    const { client, source, folder } = await shareWithSecret();
    const inner = await client.walk('0/inner');
    renameSync(path.join(source, 'inner'), path.join(folder, 'moved'));
    await fails(client.call(T.walk, [[4, inner], [4, 999], [2, 1], '..']), errno.EINVAL);
    expect((await client.readdir(await client.lopen(inner, O_RDONLY))).map(({ name }) => name).sort()).toEqual([
      '.',
      '..',
    ]);
  });

  test('cannot rename or link from one volume to another', async () => {
    const { client } = await shareWithSecret();
    await fails(client.rename('1/file', '0/file'), errno.EXDEV);
    await fails(client.link(await client.walk('1/file'), '0/file'), errno.EXDEV);
  });

  test('cannot change the root, or a volume’s own name', async () => {
    const { client, source } = await shareWithSecret();
    await fails(client.mkdir('new'), errno.EROFS);
    await fails(client.create('new'), errno.EROFS);
    await fails(client.symlink('new', '/'), errno.EROFS);
    await fails(client.unlink('0', 0x200), errno.EROFS);
    await fails(client.rename('0', '2'), errno.EROFS);
    await fails(client.setattr(0, 1, { mode: 0o777 }), errno.EROFS);
    await fails(client.setxattr('', 'user.x', 'y'), errno.EROFS);
    expect(readdirSync(source)).toEqual(['inner']);
  });

  test('can make no device, and open none that is there', async () => {
    const { client } = await shareWithSecret(() => [{ source: '/dev' }]);
    for (const type of [0o060000, 0o020000]) {
      await fails(client.mknod('0/device', type | 0o666, { major: 1, minor: 3 }), errno.EPERM);
    }
    await fails(client.open('2/null', O_RDWR), errno.EACCES);
    await fails(client.create('2/null', { flags: O_RDWR }), errno.EACCES);
  });

  test('has no FIFO opened that is there: that would be ENXIO where nobody reads', async () => {
    const { client } = await share();
    await client.mknod('0/fifo', 0o010644);
    await fails(client.open('0/fifo', O_WRONLY), errno.EACCES);
    await fails(client.create('0/fifo', { flags: O_WRONLY }), errno.EACCES);
  });

  test('cannot write to a read-only volume in any way, also not to what is mounted in it', async () => {
    const { client, folder } = await shareWithSecret((folder) => {
      mkdirSync(path.join(folder, 'ro'));
      writeFileSync(path.join(folder, 'ro', 'file'), 'text');
      return [
        { source: path.join(folder, 'ro'), readOnly: 'mount' },
        { source: '/', readOnly: 'tree', recursive: true },
      ];
    });
    const file = await client.walk('2/file');
    const before = await client.getattr(file);
    for (const flags of [1, 2, 0o1000, 0o1001]) await fails(client.open('2/file', flags), errno.EROFS);
    await fails(client.create('2/new'), errno.EROFS);
    await fails(client.mkdir('2/new'), errno.EROFS);
    await fails(client.symlink('2/new', 'x'), errno.EROFS);
    await fails(client.mknod('2/new', 0o010600), errno.EROFS);
    await fails(client.link(file, '2/new'), errno.EROFS);
    await fails(client.rename('2/file', '2/new'), errno.EROFS);
    await fails(client.unlink('2/file'), errno.EROFS);
    for (const valid of [1, 2, 4, 8, 32, 64]) await fails(client.setattr(file, valid, { mode: 0o777 }), errno.EROFS);
    await fails(client.setxattr('2/file', 'user.x', 'y'), errno.EROFS);
    const open = await client.open('2/file', O_RDONLY);
    await fails(client.write(open, 0, 'x'), errno.EBADF);
    await fails(client.setattr(open, 8, { size: 0 }), errno.EROFS);
    await fails(client.mkdir('3/tmp/kiln-never'), errno.EROFS);
    await fails(client.create('3/proc/kiln-never'), errno.EROFS);
    await client.getattr(file);
    expect(await client.getattr(await client.walk('2/file'))).toEqual({ ...before, atime: expect.anything() });
    expect(readdirSync(path.join(folder, 'ro'))).toEqual(['file']);
  });

  test('has no other export than the whole', async () => {
    const { client, source } = await shareWithSecret();
    for (const aname of ['/0', '0', '..', '/..', '/../..', source, 'ctl', '/etc', '/proc/self/root', '//', '.']) {
      await fails(client.attach(client.newFid(), { aname }), errno.ENOENT);
    }
    await client.attach(client.newFid(), { aname: '/', uname: 'anybody' });
    await client.attach(client.newFid(), { uid: 0xffffffff }); // as Linux does when it mounts
    await fails(client.attach(0), errno.EBADF);
    await fails(client.call(T.auth, [[4, 1], '', '', [4, 0]]), errno.EOPNOTSUPP);
  });

  test('gets an error for a fid that does not fit, and the server goes on', async () => {
    const { client } = await shareWithSecret();
    await fails(client.getattr(12345), errno.EBADF);
    await fails(client.clunk(12345), errno.EBADF);
    const fid = await client.create('0/file');
    await fails(client.walk('', { from: 0, to: fid }), errno.EBADF);
    await fails(client.lopen(fid, O_RDWR), errno.EBADF);
    await fails(client.walk('file', { from: fid, to: fid }), errno.EINVAL);
    await fails(
      client.call(T.readdir, [
        [4, fid],
        [8, 0],
        [4, 100],
      ]),
      errno.ENOTDIR,
    );
    await fails(client.read(await client.walk('0/file'), 0, 10), errno.EBADF);
    await fails(client.write(await client.open('0/file', O_RDONLY), 0, 'x'), errno.EBADF);
    await fails(client.readlink(fid), errno.EINVAL);
    const names = Array.from({ length: 17 }, () => 'inner');
    await fails(client.call(T.walk, [[4, 0], [4, 999], [2, 17], ...names]), errno.EINVAL);
    // The attribute is half written, and then the fid is used as a file.
    const xattr = await client.walk('0/file');
    await client.call(T.xattrcreate, [[4, xattr], 'user.x', [8, 10], [4, 0]]);
    await client.write(xattr, 0, 'half');
    await fails(client.write(xattr, 0, 'again'), errno.EINVAL);
    await fails(client.write(xattr, 4, 'too much'), errno.EINVAL);
    await fails(client.lopen(xattr, O_RDWR), errno.EBADF);
    await fails(client.clunk(xattr), errno.EINVAL);
    await fails(
      client.call(T.xattrcreate, [[4, await client.walk('0/file')], 'user.x', [8, 1 << 20], [4, 0]]),
      errno.E2BIG,
    );
    await client.getattr(fid);
  });

  test('gets EINVAL for a message that ends too early, whatever it is, and the server goes on', async () => {
    const { client } = await shareWithSecret();
    for (const [name, type] of Object.entries(T)) {
      if (['flush', 'auth', 'rename'].includes(name)) continue;
      await fails(client.call(type, [[1, 0]]), errno.EINVAL);
    }
    await fails(client.call(T.write, [[4, 0], [8, 0], [4, 0xffffffff], 'short']), errno.EINVAL);
    await fails(
      client.call(T.walk, [
        [4, 0],
        [4, 1],
        [2, 1],
        [2, 0xffff],
      ]),
      errno.EINVAL,
    );
    await fails(client.call(99, []), errno.EOPNOTSUPP);
    await fails(client.call(200, []), errno.EOPNOTSUPP);
    await client.getattr(0);
  });

  test('gets no more than fits into a message', async () => {
    const { client } = await share();
    const fid = await client.create('0/file');
    await client.write(fid, 0, Buffer.alloc(100_000, 'x'));
    expect((await client.read(fid, 0, 0xffffffff)).length).toBe(100_000);
    expect(await client.version(8192)).toBe('9P2000.L');
    await client.attach(0);
    expect((await client.read(await client.open('0/file', O_RDONLY), 0, 0xffffffff)).length).toBe(8192 - 11);
    await fails(client.version(100), errno.EINVAL);
    expect(await client.version(1 << 30)).toBe('9P2000.L');
    expect(client.msize).toBe(1 << 20);
    expect(await client.version(8192, '9P2000.u')).toBe('unknown');
  });

  test.each([
    [
      'of no size',
      encode([
        [4, 0],
        [1, 100],
        [2, 0],
      ]),
    ],
    [
      'smaller than a header',
      encode([
        [4, 6],
        [1, 100],
        [2, 0],
      ]),
    ],
    [
      'larger than was agreed on',
      encode([
        [4, 0xffffffff],
        [1, 100],
        [2, 0],
      ]),
    ],
    ['of another protocol', Buffer.from('GET / HTTP/1.1\r\nHost: localhost\r\n\r\n')],
  ])('is left alone after a message %s', async (_, bytes) => {
    const { client, server } = await share();
    await client.send(bytes);
    await client.closed;
    expect(await server.ended).toContain('the guest sent a message of an impossible size');
  });

  test('forgets everything with a new version, and is served on', async () => {
    const { client, server } = await share();
    const fid = await client.create('0/file');
    for (let i = 0; i < 1000; i++) await client.walk('0');
    await client.version(65536);
    await fails(client.getattr(fid), errno.EBADF);
    expect(readdirSync(`/proc/${server.pid}/fd`).length).toBeLessThan(20);
    await client.attach(0);
    expect((await client.getattr(await client.walk('0/file'))).size).toBe(0);
  });

  test('can have many requests under way, on the same fids, and removes them at the same time', async () => {
    const { client } = await share();
    for (let round = 0; round < 30; round++) {
      const fid = client.newFid();
      const outcome = await Promise.allSettled([
        client.walk('0', { to: fid }),
        client.call(T.lcreate, [[4, fid], `file${round}`, [4, 2], [4, 0o644], [4, 0]]),
        ...Array.from({ length: 20 }, () => client.write(fid, 0, 'text')),
        ...Array.from({ length: 20 }, () => client.getattr(fid)),
        client.clunk(fid),
        ...Array.from({ length: 20 }, () => client.read(fid, 0, 1000)),
        client.walk('0', { to: fid }),
      ]);
      expect(outcome.length).toBe(64);
    }
    await client.getattr(0);
  });

  test('gets EINVAL for a group that is none, and the server goes on', async () => {
    const { client } = await share();
    const gid = 0xffffffff;
    await fails(client.create('0/file', { gid }), errno.EINVAL);
    await fails(client.mkdir('0/folder', { gid }), errno.EINVAL);
    await fails(client.symlink('0/link', 'target', { gid }), errno.EINVAL);
    await fails(client.mknod('0/fifo', 0o010644, { gid }), errno.EINVAL);
    expect(await client.readdir(await client.open('0', O_RDONLY))).toHaveLength(2); // "." and ".."
  });

  test('can send any messages whatever: they are answered, and nothing but its volumes changes', async () => {
    const { client, server, folder } = await shareWithSecret();
    const random = numbersFrom(20_260);
    const pick = <T>(list: readonly T[]) => list[random() % list.length]!;
    const types = Object.values(T).filter((type) => type !== T.version);
    const texts = ['0', '1', 'inner', 'file', '..', '', '/', 'user.x', 'x'.repeat(300), '9P2000.L', '../secret'];
    const field = (): Field => {
      switch (random() % 8) {
        case 0:
          return pick(texts);
        case 1:
          return [8, pick([0, 1, 4096, 2 ** 31, 0x7fffffffffffffffn, -1])];
        case 2:
          return [2, random() % 20];
        case 3:
          return [1, random() % 256];
        case 4:
          return Buffer.alloc(random() % 64, random());
        default:
          return [4, random() % 24];
      }
    };
    for (let batch = 0; batch < 300; batch++) {
      // A flush may be of one that waits for it in turn; so none flushes what is under way.
      const calls = Array.from({ length: 64 }, () => {
        const type = pick(types);
        const fields = type === T.flush ? [[2, 0xfffe] as const] : Array.from({ length: random() % 9 }, field);
        return client.call(type, fields);
      });
      await Promise.allSettled(calls);
      if (batch % 20 === 0) await client.call(T.version, [[4, 65536], '9P2000.L'], 0xffff);
      await client.attach(0).catch(() => {});
      await client.walk('0', { to: 1 }).catch(() => {});
      await client.walk('0/inner', { to: 2 }).catch(() => {});
    }
    await client.version(65536);
    await client.attach(0);
    expect(server.pid && readFileSync(`/proc/${server.pid}/comm`, 'utf8')).toBe('kiln-volumes\n');
    expect(readdirSync(folder).sort()).toEqual(['other', 'sandbox', 'secret', 'source']);
    expect(readFileSync(path.join(folder, 'secret'), 'utf8')).toBe('secret');
  });
});

/** A linear congruential generator: the same numbers for the same seed. */
function numbersFrom(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0;
    return state >>> 8;
  };
}
