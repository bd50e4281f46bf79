import { execFileSync } from 'node:child_process';
import {
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { tarEnd, tarHeader } from '../../../src/files/tar-write.ts';
import { applyLayer } from '../../../src/image/layer.ts';
import { lgetxattr } from '../../../src/sys/xattr.ts';
import { type LayerEntry, layerTar, opaque, whiteout } from '../../support/images.ts';

const isRoot = process.getuid?.() === 0;
const file = (path: string, content = path): LayerEntry => ({ kind: 'file', path, content });
const dir = (path: string): LayerEntry => ({ kind: 'dir', path });
const symlink = (path: string, target: string): LayerEntry => ({ kind: 'symlink', path, target });
const link = (path: string, target: string): LayerEntry => ({ kind: 'link', path, target });

const owner = { uid: process.getuid?.() ?? 0, gid: process.getgid?.() ?? 0 };
const empty = {
  type: 'file',
  mode: 0o644,
  ...owner,
  size: 0,
  mtimeNs: 0n,
  target: '',
  major: 0,
  minor: 0,
  unchanged: false,
} as const;

describe('a layer', () => {
  let outside: string;
  let root: string;
  let warnings: string[];
  beforeEach(() => {
    outside = mkdtempSync(join(tmpdir(), 'kiln-layer-'));
    root = join(outside, 'rootfs');
    mkdirSync(root);
    warnings = [];
  });
  afterEach(() => {
    // Whatever a layer tried, there is nothing beside its folder.
    const beside = readdirSync(outside);
    rmSync(outside, { recursive: true, force: true });
    expect(beside).toEqual(['rootfs']);
  });

  const apply = async (...layers: LayerEntry[][]) => {
    for (const entries of layers) {
      const tar = Readable.from([await layerTar(entries)]);
      await applyLayer(tar, { root, warn: (message) => warnings.push(message) });
    }
  };
  const read = (path: string) => readFileSync(join(root, path), 'utf8');
  const files = () =>
    execFileSync('find', ['.', '-mindepth', '1', '-printf', '%P\n'], { cwd: root, encoding: 'utf8' })
      .split('\n')
      .filter(Boolean)
      .sort();

  it('has its files, folders and links, with their modes, owners and times', async () => {
    const mtime = new Date('2001-02-03T04:05:06Z');
    await apply([
      { ...dir('d'), mode: 0o2750, mtime, ...(isRoot ? { uid: 3_000_000, gid: 7 } : {}) },
      { ...file('d/f', 'text'), mode: 0o4755, mtime },
      symlink('d/s', '/etc/passwd'),
      link('hard', 'd/f'),
      { kind: 'fifo', path: 'pipe' },
    ]);
    expect(read('d/f')).toBe('text');
    expect(statSync(join(root, 'd/f')).mode & 0o7777).toBe(0o4755);
    expect(statSync(join(root, 'd')).mode & 0o7777).toBe(0o2750);
    expect([statSync(join(root, 'd/f')).mtime, statSync(join(root, 'd')).mtime]).toEqual([mtime, mtime]);
    expect(readlinkSync(join(root, 'd/s'))).toBe('/etc/passwd');
    expect(statSync(join(root, 'hard')).ino).toBe(statSync(join(root, 'd/f')).ino);
    expect(lstatSync(join(root, 'pipe')).isFIFO()).toBe(true);
    if (isRoot) expect(statSync(join(root, 'd'))).toMatchObject({ uid: 3_000_000, gid: 7 });
  });

  it('keeps capabilities of files, and leaves out attributes that mean something to the host', async () => {
    const xattrs = { 'user.tea': 'green', 'trusted.overlay.opaque': 'y' };
    await apply([{ ...file('f'), xattrs }]);
    expect(warnings).toEqual(['"f": its attribute "trusted.overlay.opaque" is left out']);
  });

  it('replaces what is there, but for folders, which stay', async () => {
    await apply(
      [dir('a'), file('a/x'), file('b'), symlink('c', 'a')],
      [{ ...dir('a'), mode: 0o700 }, dir('b'), file('b/y'), file('c', 'plain')],
    );
    expect(files()).toEqual(['a', 'a/x', 'b', 'b/y', 'c']);
    expect(read('c')).toBe('plain');
    expect(read('a/x')).toBe('a/x');
  });

  it('hides files of the layers below', async () => {
    await apply([file('a/x'), file('a/y'), file('b/z')], [whiteout('a/x'), whiteout('b'), whiteout('nothing')]);
    expect(files()).toEqual(['a', 'a/y']);
  });

  it('hides whole folders of the layers below, and none of its own files, in whatever order', async () => {
    await apply([file('a/x'), file('a/sub/y')], [file('a/new'), file('a/sub/own'), opaque('a'), file('a/late')]);
    expect(files()).toEqual(['a', 'a/late', 'a/new', 'a/sub', 'a/sub/own']);
    await apply([file('a/new', 'newer'), whiteout('a/new'), whiteout('a/late')]);
    expect(read('a/new')).toBe('newer');
  });

  it('hides a folder but for its own files in it, and a file but for its own link to it', async () => {
    await apply(
      [file('d/sub/x'), file('d/y'), file('a')],
      [file('d/sub/own'), whiteout('d'), link('b', 'a'), whiteout('a')],
    );
    expect(files()).toEqual(['b', 'd', 'd/sub', 'd/sub/own']);
    expect(read('b')).toBe('a');
  });

  it('knows its own files by whatever link they are named', async () => {
    await apply(
      [file('usr/x'), symlink('l', '/usr')],
      [file('usr/own'), file('l/other'), opaque('l'), whiteout('l/own')],
    );
    expect(files()).toEqual(['l', 'usr', 'usr/other', 'usr/own']);
  });

  it('takes names from the root, and makes folders that are not listed', async () => {
    await apply([file('/abs/f'), file('./dot/f'), file('deep/er/f')]);
    expect(files()).toEqual(['abs', 'abs/f', 'deep', 'deep/er', 'deep/er/f', 'dot', 'dot/f']);
  });

  it('goes through links as a container would', async () => {
    await apply(
      [dir('usr/lib'), symlink('lib', 'usr/lib'), symlink('abs', '/usr/lib')],
      [file('lib/a'), file('abs/b')],
    );
    expect(files()).toEqual(['abs', 'lib', 'usr', 'usr/lib', 'usr/lib/a', 'usr/lib/b']);
  });

  it('makes what links lead to, as a container would', async () => {
    await apply([symlink('lib', 'usr/lib'), symlink('usr/lib', '../deep/er/'), file('lib/a'), file('lib/b/c')]);
    expect(files()).toEqual(['deep', 'deep/er', 'deep/er/a', 'deep/er/b', 'deep/er/b/c', 'lib', 'usr', 'usr/lib']);
  });

  it('keeps names and attributes that are no text', async () => {
    // Version 2, effective; permitted is CAP_SETUID: linux/capability.h.
    const capability = Buffer.from('0100000280000000000000000000000000000000', 'hex');
    const xattrs = new Map([['user.tea', Buffer.of(0xff, 0)]]);
    if (isRoot) xattrs.set('security.capability', capability);
    const name = 'not \xff utf-8';
    await applyLayer(Readable.from([tarHeader({ ...empty, path: name, xattrs }), tarEnd]), { root, warn: () => {} });
    const path = Buffer.from(`${root}/${name}`, 'latin1');
    for (const [key, value] of xattrs) expect(lgetxattr(path, key)).toEqual(value);
  });

  it('of GNU tar keeps its holes and times', async () => {
    const script =
      'truncate -s 8M holes; printf end >>holes; touch -d @1000000000.123456789 holes; tar -cSf - --format=pax holes';
    const tar = execFileSync('sh', ['-euc', `cd "$(mktemp -d)"; ${script}; rm -r "$PWD"`]);
    await applyLayer(Readable.from([tar]), { root, warn: () => {} });
    const { size, blocks, mtimeNs } = lstatSync(join(root, 'holes'), { bigint: true });
    expect([size, mtimeNs]).toEqual([8_388_611n, 1_000_000_000_123_456_789n]);
    expect(blocks * 512n).toBeLessThan(size / 2n);
    expect(read('holes').slice(-4)).toBe('\0end');
  });

  it('may lack the end of a tar', async () => {
    const tar = await layerTar([file('f')]);
    await applyLayer(Readable.from([tar.subarray(0, 1024)]), { root, warn: () => {} });
    await applyLayer(Readable.from([]), { root, warn: () => {} });
    expect(read('f')).toBe('f');
  });

  it('leaves device nodes out, and says so', async () => {
    await apply([{ kind: 'char', path: 'dev/null', major: 1, minor: 3 }]);
    expect(warnings).toEqual(['device nodes of an image are left out: "dev/null"']);
    expect(existsSync(join(root, 'dev/null'))).toBe(false);
  });
});

describe('a layer that wants out', () => {
  let outside: string;
  let root: string;
  beforeEach(() => {
    outside = mkdtempSync(join(tmpdir(), 'kiln-layer-'));
    root = join(outside, 'rootfs');
    mkdirSync(root);
  });
  afterEach(() => {
    const beside = readdirSync(outside);
    rmSync(outside, { recursive: true, force: true });
    expect(beside).toEqual(['rootfs']);
  });
  const apply = async (...layers: LayerEntry[][]) => {
    for (const entries of layers) {
      await applyLayer(Readable.from([await layerTar(entries)]), { root, warn: () => {} });
    }
  };

  it.each<[string, LayerEntry[]]>([
    ['by a name with ".."', [file('../evil')]],
    ['by ".." in the middle', [file('a/../../evil')]],
    ['by a folder called ".."', [dir('..')]],
    ['by a hard link with ".."', [link('l', '../../../etc/passwd')]],
    ['by a whiteout with ".."', [file('../.wh.rootfs', '')]],
    ['through a file that is no folder', [file('f'), file('f/evil')]],
    ['by links that go round', [symlink('a', 'b'), symlink('b', 'a'), file('a/evil')]],
    ['by a hard link to itself', [link('l', 'l')]],
    ['by a hard link to nothing', [link('l', '')]],
  ])('%s is refused', async (_how, entries) => {
    await expect(apply(entries)).rejects.toMatchObject({ code: 'invalid-argument' });
  });

  it.each<[string, LayerEntry[]]>([
    ['an absolute link', [symlink('l', '/'), file('l/evil')]],
    ['a link that climbs', [symlink('l', '../../../..'), file('l/evil')]],
    ['links behind links', [symlink('a', '/'), symlink('b', 'a/../..'), file('b/evil')]],
  ])('through %s stays in', async (_how, entries) => {
    await apply(entries);
    expect(readFileSync(join(root, 'evil'), 'utf8')).toMatch(/evil$/);
  });

  it('by a link in a file’s place replaces the link, and not what it leads to', async () => {
    const target = join(outside, 'victim');
    await apply([symlink('f', target)], [file('f', 'mine')]);
    expect(existsSync(target)).toBe(false);
    expect(readFileSync(join(root, 'f'), 'utf8')).toBe('mine');
  });

  it('by a link that a whiteout goes through hides nothing outside', async () => {
    await apply([symlink('l', `/../..${outside}`)], [whiteout('l/rootfs'), opaque('l')]);
    expect(existsSync(root)).toBe(true);
  });

  it('by a hard link to a link links the link', async () => {
    await apply([symlink('s', '/etc/hostname'), link('h', 's')]);
    expect(lstatSync(join(root, 'h')).isSymbolicLink()).toBe(true);
  });

  it('is refused where it is cut off, or no tar', async () => {
    const tar = await layerTar([{ kind: 'file', path: 'f', content: Buffer.alloc(5000) }]);
    const cut = Readable.from([tar.subarray(0, 2000)]);
    await expect(applyLayer(cut, { root, warn: () => {} })).rejects.toThrow(/cannot unpack a layer/);
    const noise = Readable.from([Buffer.alloc(2048, 'x')]);
    await expect(applyLayer(noise, { root, warn: () => {} })).rejects.toThrow(/cannot unpack a layer/);
  });
});
