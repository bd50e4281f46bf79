import {
  chmodSync,
  closeSync,
  constants,
  linkSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  statfsSync,
  statSync,
  symlinkSync,
  truncateSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { lockFile } from '../../support/file-locks.ts';
import { attr, lockType, T } from '../../support/ninep.ts';
import { errno, fails } from './errno.ts';
import { useShares } from './share.ts';

const { O_RDONLY, O_WRONLY, O_RDWR, O_TRUNC, O_APPEND, O_EXCL } = constants;

describe('a volume', () => {
  const share = useShares();

  test('shows the files of the host, and the host what the guest writes', async () => {
    const { client, source } = await share();
    writeFileSync(path.join(source, 'from-host'), 'hello');
    const fid = await client.open('0/from-host', O_RDONLY);
    expect((await client.read(fid, 0, 100)).toString()).toBe('hello');
    const made = await client.create('0/from-guest', { mode: 0o640 });
    await client.write(made, 0, 'answer');
    expect(readFileSync(path.join(source, 'from-guest'), 'utf8')).toBe('answer');
    expect(statSync(path.join(source, 'from-guest')).mode & 0o7777).toBe(0o640);
    writeFileSync(path.join(source, 'from-host'), 'changed on the host');
    expect((await client.read(fid, 0, 100)).toString()).toBe('changed on the host');
  });

  test('can be one file', async () => {
    const { client, folder } = await share((folder) => {
      writeFileSync(path.join(folder, 'one'), 'text');
      return [{ source: path.join(folder, 'one') }];
    });
    const fid = await client.open('1', O_RDWR);
    await client.write(fid, 4, 'ure');
    expect(readFileSync(path.join(folder, 'one'), 'utf8')).toBe('texture');
  });

  test('gives what a user of the guest makes to that user, in the group that the guest says', async () => {
    const { client, source } = await share();
    const owner = (name: string) => {
      const { uid, gid } = lstatSync(path.join(source, name));
      return [uid, gid];
    };
    // Which only root may write to: whether this user may is the guest's kernel's to say.
    chmodSync(source, 0o700);
    const root = client.newFid();
    await client.attach(root, { uid: 1234 });
    await client.create('0/file', { gid: 77, from: root });
    await client.mkdir('0/folder', { gid: 78, from: root });
    await client.symlink('0/link', 'anywhere', { gid: 79, from: root });
    expect(owner('file')).toEqual([1234, 77]);
    expect(owner('folder')).toEqual([1234, 78]);
    expect(owner('link')).toEqual([1234, 79]);
    await client.create('0/of-root');
    expect(owner('of-root')).toEqual([0, 0]);
  });

  test('gives each user what is theirs, also when requests of several users and many threads are under way', async () => {
    const { client, source } = await share();
    const user = client.newFid();
    await client.attach(user, { uid: 1000 });
    writeFileSync(path.join(source, 'locked'), '');
    const locked = await client.open('0/locked', O_RDWR);
    const host = lockFile(path.join(source, 'locked'), { start: 0, length: 0 });
    // Each lock that is waited for keeps a thread, so that one more is started by a thread that worked for somebody.
    for (let round = 0; round < 20; round++) {
      const made = Array.from({ length: 8 }, (_, i) => [
        client.mkdir(`0/user-${round}-${i}`, { from: user }),
        client.mkdir(`0/root-${round}-${i}`),
      ]);
      await Promise.all(made.flat());
      client.lock(locked, lockType.write, { wait: true, process: round }).catch(() => {}); // until the connection ends
    }
    const wrong = readdirSync(source).filter((name) => {
      const { uid } = statSync(path.join(source, name));
      return uid !== (name.startsWith('user') ? 1000 : 0);
    });
    expect(wrong).toEqual([]);
    host?.[Symbol.dispose]();
  });

  test('changes mode, owner, times and size, of a file that is open or not', async () => {
    const { client, source } = await share();
    const file = path.join(source, 'file');
    writeFileSync(file, 'some text');
    const fid = await client.walk('0/file');
    await client.setattr(fid, attr.mode, { mode: 0o4711 });
    expect(statSync(file).mode & 0o7777).toBe(0o4711);
    await client.setattr(fid, attr.uid | attr.gid, { uid: 11, gid: 12 });
    expect(statSync(file)).toMatchObject({ uid: 11, gid: 12 });
    await client.setattr(fid, attr.uid, { uid: 13 });
    expect(statSync(file)).toMatchObject({ uid: 13, gid: 12 });
    await client.setattr(fid, attr.atime | attr.mtime | attr.atimeSet | attr.mtimeSet, {
      atime: 1_000_000_000_123_456_789n,
      mtime: 2_000_000_000_987_654_321n,
    });
    expect(await client.getattr(fid)).toMatchObject({
      atime: 1_000_000_000_123_456_789n,
      mtime: 2_000_000_000_987_654_321n,
    });
    await client.setattr(fid, attr.size, { size: 4 });
    expect(readFileSync(file, 'utf8')).toBe('some');
    await client.lopen(fid, O_RDWR);
    await client.setattr(fid, attr.size, { size: 2 });
    expect(readFileSync(file, 'utf8')).toBe('so');
    await client.setattr(fid, attr.mtime);
    expect(Date.now() - statSync(file).mtimeMs).toBeLessThan(10_000);
  });

  test('changes a symbolic link and not what it leads to', async () => {
    const { client, source } = await share();
    writeFileSync(path.join(source, 'file'), '');
    symlinkSync('file', path.join(source, 'link'));
    const before = statSync(path.join(source, 'file'));
    const link = await client.walk('0/link');
    await client.setattr(link, attr.uid, { uid: 5 });
    await client.setattr(link, attr.mtime | attr.mtimeSet, { mtime: 1_000_000_000n });
    expect(lstatSync(path.join(source, 'link'))).toMatchObject({ uid: 5, mtimeMs: 1000 });
    expect(statSync(path.join(source, 'file'))).toMatchObject({ uid: before.uid, mtimeMs: before.mtimeMs });
    expect(await client.readlink(link)).toBe('file');
    await fails(client.lopen(link, O_RDONLY), errno.ELOOP);
  });

  test('keeps a file that is removed while it is open', async () => {
    const { client, source } = await share();
    const fid = await client.create('0/file');
    await client.write(fid, 0, 'still here');
    await client.unlink('0/file');
    expect(readdirSync(source)).toEqual([]);
    expect((await client.read(fid, 0, 100)).toString()).toBe('still here');
    expect(await client.getattr(fid)).toMatchObject({ nlink: 0, size: 10 });
    await client.setattr(fid, attr.size | attr.mode, { size: 5, mode: 0o600 });
    expect(await client.getattr(fid)).toMatchObject({ size: 5, mode: 0o100600 });
  });

  test('knows a file again after it, or the folder that it is in, was renamed', async () => {
    const { client, source } = await share();
    mkdirSync(path.join(source, 'folder'));
    writeFileSync(path.join(source, 'folder', 'file'), 'text');
    const fid = await client.walk('0/folder/file');
    await client.rename('0/folder/file', '0/folder/renamed');
    renameSync(path.join(source, 'folder'), path.join(source, 'moved'));
    expect(await client.getattr(fid)).toMatchObject({ size: 4 });
    await client.lopen(fid, O_RDONLY);
    expect((await client.read(fid, 0, 100)).toString()).toBe('text');
    expect(readdirSync(path.join(source, 'moved'))).toEqual(['renamed']);
  });

  test('renames over a file and an empty folder, and refuses what rename(2) refuses', async () => {
    const { client, source } = await share();
    for (const name of ['a', 'b']) writeFileSync(path.join(source, name), name);
    for (const name of ['empty', 'full', 'full/inner']) mkdirSync(path.join(source, name));
    await client.rename('0/a', '0/b');
    expect(readFileSync(path.join(source, 'b'), 'utf8')).toBe('a');
    await fails(client.rename('0/empty', '0/full'), errno.ENOTEMPTY);
    await client.rename('0/full', '0/empty');
    await fails(client.rename('0/empty', '0/empty/inner/below'), errno.EINVAL);
    await fails(client.rename('0/b', '0/empty'), errno.EISDIR);
    await fails(client.rename('0/nothing', '0/b'), errno.ENOENT);
  });

  test('makes hard links, and one file of them', async () => {
    const { client, source } = await share();
    writeFileSync(path.join(source, 'file'), 'text');
    const fid = await client.walk('0/file');
    await client.link(fid, '0/second');
    linkSync(path.join(source, 'file'), path.join(source, 'third'));
    const [first, second, third] = await Promise.all(
      ['file', 'second', 'third'].map(async (name) => client.getattr(await client.walk(`0/${name}`))),
    );
    expect(first!.nlink).toBe(3);
    expect(new Set([first, second, third].map((one) => one!.qid.path)).size).toBe(1);
    await fails(client.link(fid, '0/second'), errno.EEXIST);
    await client.unlink('0/file');
    unlinkSync(path.join(source, 'third'));
    expect(readdirSync(source)).toEqual(['second']);
  });

  test('makes symbolic links whose text is whatever it is, and sees those of the host be swapped', async () => {
    const { client, source } = await share();
    const target = `/no/such/${'x'.repeat(3000)}`;
    await client.symlink('0/long', target);
    expect(readlinkSync(path.join(source, 'long'))).toBe(target);
    for (const name of ['..1', '..2']) {
      mkdirSync(path.join(source, name));
      writeFileSync(path.join(source, name, 'key'), name);
      symlinkSync(name, path.join(source, '..new'));
      renameSync(path.join(source, '..new'), path.join(source, '..data'));
      expect(await client.readlink(await client.walk('0/..data'))).toBe(name);
    }
  });

  test('appends wherever the guest thinks that the end is', async () => {
    const { client, source } = await share();
    writeFileSync(path.join(source, 'log'), 'one ');
    const fid = await client.open('0/log', O_WRONLY | O_APPEND);
    writeFileSync(path.join(source, 'log'), 'two ', { flag: 'a' });
    await client.write(fid, 4, 'three');
    expect(readFileSync(path.join(source, 'log'), 'utf8')).toBe('one two three');
  });

  test('opens a file empty, and a new one only if it is new, where it is asked to', async () => {
    const { client, source } = await share();
    writeFileSync(path.join(source, 'file'), 'text');
    await client.open('0/file', O_WRONLY | O_TRUNC);
    expect(statSync(path.join(source, 'file')).size).toBe(0);
    await fails(client.create('0/file', { flags: O_RDWR | O_EXCL }), errno.EEXIST);
    await client.create('0/file', { flags: O_RDWR });
    await fails(client.open('0', O_RDWR), errno.EISDIR);
    await fails(client.open('0/nothing', O_RDONLY), errno.ENOENT);
  });

  test('keeps the holes of a sparse file, up to the largest offset', async () => {
    const { client, source } = await share();
    const fid = await client.create('0/sparse');
    await client.write(fid, 1 << 30, 'end');
    const { size, blocks } = statSync(path.join(source, 'sparse'));
    expect([size, blocks < 100]).toEqual([(1 << 30) + 3, true]);
    expect(await client.getattr(fid)).toMatchObject({ size: (1 << 30) + 3, blocks });
    expect((await client.read(fid, 1 << 20, 10)).every((byte) => byte === 0)).toBe(true);
    truncateSync(path.join(source, 'sparse'), 0);
    expect(await client.read(fid, 0, 10)).toHaveLength(0);
  });

  test('tells how full the file system is', async () => {
    const { client, source } = await share();
    const reply = await client.call(T.statfs, [[4, await client.walk('0')]]);
    const expected = statfsSync(source);
    expect([reply.u32(), reply.u32(), reply.number()]).toEqual([expected.type, expected.bsize, expected.blocks]);
  });

  test('writes to the disk when it is asked to, also folders', async () => {
    const { client } = await share();
    const fid = await client.create('0/file');
    await client.write(fid, 0, 'text');
    await client.fsync(fid);
    await client.fsync(fid, true);
    await client.fsync(await client.open('0', O_RDONLY));
    await fails(client.fsync(await client.walk('0/file')), errno.EBADF);
  });

  test('lists 100,000 files, each once, also when some go meanwhile', async () => {
    const { client, source } = await share();
    const names = Array.from({ length: 100_000 }, (_, i) => `file-${i}`);
    for (const name of names) closeSync(openSync(path.join(source, name), 'w'));
    const fid = await client.open('0', O_RDONLY);
    const listed = (await client.readdir(fid)).map(({ name }) => name).filter((name) => !name.startsWith('.'));
    expect(new Set(listed).size).toBe(100_000);
    expect(listed).toHaveLength(100_000);
    for (const name of names.slice(0, 99_990)) rmSync(path.join(source, name));
    // The same fid from its start.
    expect((await client.readdir(fid, 300)).map(({ name }) => name).sort()).toEqual(
      ['.', '..', ...names.slice(99_990)].sort(),
    );
  });

  test('has names with every byte but slash and NUL, of up to 255 bytes', async () => {
    const { client, source } = await share();
    const names = [
      'with space',
      'new\nline',
      '-rf',
      '*?$(',
      'ümläut',
      '日本語',
      '...',
      '\\',
      'x'.repeat(255),
      '\x7f\x01',
    ];
    for (const name of names) await client.clunk(await client.create(`0/${name}`));
    expect(readdirSync(source).sort()).toEqual([...names].sort());
    const listed = await client.readdir(await client.open('0', O_RDONLY));
    expect(listed.map(({ name }) => name).sort()).toEqual(['.', '..', ...names].sort());
    await fails(client.create(`0/${'x'.repeat(256)}`), errno.ENAMETOOLONG);
    writeFileSync(Buffer.concat([Buffer.from(`${source}/`), Buffer.from([0xff, 0xfe])]), '');
    const raw = await client.call(T.readdir, [
      [4, await client.open('0', O_RDONLY)],
      [8, 0],
      [4, 8000],
    ]);
    expect(raw.bytes.includes(Buffer.from([2, 0, 0xff, 0xfe]))).toBe(true);
  });

  test('makes FIFOs and sockets, which are the guest’s own affair, and no devices', async () => {
    const { client, source } = await share();
    await client.mknod('0/fifo', 0o010600);
    await client.mknod('0/socket', 0o140600);
    expect(statSync(path.join(source, 'fifo')).isFIFO()).toBe(true);
    expect(statSync(path.join(source, 'socket')).isSocket()).toBe(true);
    // Opened here, it would wait for somebody at its other end.
    await fails(client.open('0/fifo', O_RDONLY), errno.EACCES);
    await fails(client.create('0/fifo', { flags: O_RDWR }), errno.EACCES);
  });

  test('takes the setuid bit off a file that somebody but root writes to', async () => {
    const { client, source } = await share();
    const file = path.join(source, 'program');
    const root = client.newFid();
    await client.attach(root, { uid: 1000 });
    writeFileSync(file, 'text');
    chmodSync(file, 0o6755);
    await client.write(await client.open('0/program', O_WRONLY), 0, 'root');
    expect(statSync(file).mode & 0o7777).toBe(0o6755);
    await client.write(await client.open('0/program', O_WRONLY, root), 0, 'user');
    expect(statSync(file).mode & 0o7777).toBe(0o755);
  });

  test('shows what is mounted below its source only when it is recursive', async () => {
    const { client } = await share(() => [{ source: '/' }, { source: '/', recursive: true }]);
    const names = async (name: string) => {
      const entries = await client.readdir(await client.open(name, O_RDONLY));
      return entries.map((entry) => entry.name);
    };
    expect(await names('1/proc')).not.toContain('version');
    expect(await names('2/proc')).toContain('version');
  });

  test('has no two files with the same number, also of two file systems', async () => {
    const { client } = await share(() => [{ source: '/' }, { source: '/proc' }, { source: '/sys' }]);
    const paths = await Promise.all(
      ['0', '1', '2', '3'].map(async (name) => (await client.getattr(await client.walk(name))).qid.path),
    );
    expect(new Set(paths).size).toBe(4);
  });
});
