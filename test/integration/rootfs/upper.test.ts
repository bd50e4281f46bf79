/** What a guest says it has written becomes the files of a snapshot on the host; also what a hostile one says. */
import {
  lstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { packFiles } from '../../../src/files/pack.ts';
import { Place } from '../../../src/files/place.ts';
import type { TarEntry } from '../../../src/files/tar-entry.ts';
import { padding, tarEnd, tarHeader } from '../../../src/files/tar-write.ts';
import { SnapshotUpper } from '../../../src/rootfs/upper.ts';
import { lgetxattr, llistxattr, lsetxattr } from '../../../src/sys/xattr.ts';
import { mustRun } from '../../support/spawn.ts';

const maxBytes = 64 * 2 ** 20;

let dir: string;
let upper: SnapshotUpper;

beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), 'kt-upper-'));
  for (const name of ['fs', 'work', 'outside']) mkdirSync(join(dir, name));
  upper = new SnapshotUpper({ path: join(dir, 'fs'), work: join(dir, 'work'), userxattr: false });
});

afterEach(() => rmSync(dir, { recursive: true, force: true }));

const at = (...parts: string[]) => join(dir, 'fs', ...parts);

function entry(given: Partial<TarEntry>, content = ''): Buffer {
  const defaults = {
    path: 'a',
    type: 'file',
    mode: 0o644,
    uid: 0,
    gid: 0,
    mtimeNs: 0n,
    target: '',
    major: 0,
    minor: 0,
  } as const;
  const whole = { ...defaults, xattrs: new Map(), unchanged: false, size: content.length, ...given };
  return Buffer.concat([tarHeader(whole), Buffer.from(content), padding(content.length)]);
}

async function* streamOf(...parts: Buffer[]) {
  yield* parts;
  yield tarEnd;
}

async function all(stream: AsyncIterable<Buffer>): Promise<Buffer[]> {
  const pieces: Buffer[] = [];
  for await (const piece of stream) pieces.push(piece);
  return pieces;
}

const replace = (...parts: Buffer[]) => upper.replace(streamOf(...parts), { maxBytes });

function xattrsOf(file: string): string[] {
  const path = Buffer.from(file);
  return llistxattr(path).map((name) => `${name}=${lgetxattr(path, name)?.toString('hex')}`);
}

/** All below a directory, as one can compare it. */
async function listing(of: string): Promise<string> {
  const find = "find . -mindepth 1 -printf '%P %y %m %U:%G %n %s %T@ %l\\n' | sort";
  const { stdout } = await mustRun('sh', ['-euc', `cd "$1"; ${find}`, 'sh', of]);
  const attributes = ['deep/er', 'deep/er/file', 'deep/again'].flatMap((name) => xattrsOf(join(of, name)));
  return stdout.toString() + attributes.join('\n');
}

describe('the upper directory', () => {
  test('becomes what was packed elsewhere: owners, modes, times, links, holes, attributes, odd names, marks', async () => {
    const source = join(dir, 'source');
    mkdirSync(source);
    const script = `
      cd "$1"; mkdir -m 1777 tmp; mkdir -p deep/er; echo content >deep/er/file; chown 70000:5 deep/er/file; chmod 6751 deep/er/file
      ln deep/er/file deep/again; ln -s /etc/passwd soft; chown -h 5:6 soft; mkfifo fifo; mknod -m 0 gone c 0 0; touch -d @0 gone
      truncate -s 3G holes; printf end >>holes; touch -d '2001-02-03 04:05:06.789012345' deep
      printf x >"$(printf 'odd \\377\\n name')"; printf y >"$(printf %0255d 0)"
    `;
    await mustRun('sh', ['-euc', script, 'sh', source]);
    const er = Buffer.from(join(source, 'deep/er'));
    const file = Buffer.from(join(source, 'deep/er/file'));
    lsetxattr(er, 'trusted.overlay.opaque', Buffer.from('y'));
    lsetxattr(file, 'user.mine', Buffer.from([0, 255, 10]));
    // linux/capability.h, struct vfs_cap_data: revision 2, effective, CAP_NET_RAW.
    lsetxattr(file, 'security.capability', Buffer.from('0100000200200000000000000000000000000000', 'hex'));
    const place = new Place(openSync(source, 'r'));
    const bytes = await all(packFiles({ place, as: '.' }, { xattr: (name) => name }));
    place[Symbol.dispose]();
    const { files } = await upper.replace(streamOf(...bytes), { maxBytes });
    expect(await listing(at())).toBe(await listing(source));
    expect(files).toBe((await listing(source)).split('\n').filter((line) => / [dflpc] \d/.test(line)).length + 1);
    expect(lstatSync(at('holes')).blocks).toBeLessThan(64);
  });

  test('keeps files that have not changed, and loses those that are gone', async () => {
    await replace(
      entry({ path: 'kept' }, 'kept'),
      entry({ path: 'lost' }, 'lost'),
      entry({ path: 'd', type: 'directory' }),
    );
    const before = lstatSync(at('kept')).ino;
    await replace(entry({ path: 'kept', unchanged: true, size: 4 }));
    expect(readdirSync(at())).toEqual(['kept']);
    expect(lstatSync(at('kept'))).toMatchObject({ ino: before, nlink: 1 });
    await expect(replace(entry({ path: 'kept', unchanged: true, size: 5 }))).rejects.toMatchObject({
      code: 'failed-precondition',
    });
    await expect(replace(entry({ path: 'never', unchanged: true }))).rejects.toMatchObject({
      code: 'failed-precondition',
    });
  });

  test('tells what the host has put in since, and only that', async () => {
    expect(await upper.edits()).toBeUndefined();
    await replace(entry({ path: 'guests' }, 'g'), entry({ path: 'd', type: 'directory', mode: 0o755 }));
    expect(await upper.edits()).toBeUndefined();
    // An old file's time of change is the time when it came here.
    writeFileSync(at('d/hosts'), 'h');
    utimesSync(at('d/hosts'), 1, 1);
    using edits = await upper.edits();
    const { stdout } = await mustRun('tar', ['-tf', '-'], { stdin: Buffer.concat(await all(edits!.stream)) });
    expect(stdout.toString()).toBe('./d/\n./d/hosts\n');
    await upper.noteTaken();
    expect(await upper.edits()).toBeUndefined();
  });

  describe('stays as it was, and so does all else, when a stream', () => {
    beforeEach(async () => {
      await replace(entry({ path: 'before' }, 'before'));
      writeFileSync(join(dir, 'outside', 'file'), 'outside');
    });

    const d = (path: string) => entry({ path, type: 'directory' });
    const link = (path: string, target: string) => entry({ path, type: 'symlink', target });
    test.each<[string, Buffer[]]>([
      ['names a parent', [entry({ path: '../outside/file' }, 'x')]],
      ['names a parent on the way', [d('d'), entry({ path: 'd/../../outside/file' }, 'x')]],
      ['names the parent itself', [d('..')]],
      ['names an absolute path', [entry({ path: '/etc/kiln-test' }, 'x')]],
      ['has an empty name on the way', [d('d'), entry({ path: 'd//f' }, 'x')]],
      ['leads over a link of its own', [link('l', '../outside'), entry({ path: 'l/file' }, 'x')]],
      ['leads over an absolute link of its own', [link('l', '/'), entry({ path: 'l/kiln-test' }, 'x')]],
      ['puts a link in a directory’s place', [d('d'), link('d', '../outside'), entry({ path: 'd/file' }, 'x')]],
      ['writes through a link', [link('l', '../outside/file'), entry({ path: 'l' }, 'x')]],
      ['makes a directory of a link', [link('l', '../outside'), d('l')]],
      ['links hard to a parent', [entry({ path: 'h', type: 'link', target: '../outside/file' })]],
      ['links hard to an absolute path', [entry({ path: 'h', type: 'link', target: '/etc/passwd' })]],
      ['links hard over a link', [link('l', '../outside'), entry({ path: 'h', type: 'link', target: 'l/file' })]],
      ['links hard to a directory', [d('d'), entry({ path: 'h', type: 'link', target: 'd' })]],
      ['links hard to what is not there', [entry({ path: 'h', type: 'link', target: 'nothing' })]],
      ['has a file twice', [entry({ path: 'f' }, '1'), entry({ path: 'f' }, '2')]],
      ['has a file without its directory', [entry({ path: 'd/f' }, 'x')]],
      ['has a file below a file', [entry({ path: 'f' }, 'x'), entry({ path: 'f/f' }, 'x')]],
      ['makes a file of the top', [entry({ path: '.' }, 'x')]],
      ['has a name that is too long', [entry({ path: 'x'.repeat(256) }, 'x')]],
      ['ends too early', [entry({ path: 'f' }, 'x'.repeat(5000)).subarray(0, 1024)]],
      ['is no tar stream', [Buffer.from('x'.repeat(4096))]],
      ['has more content than the disk holds', [entry({ path: 'f' }, 'x'.repeat(maxBytes + 1))]],
      [
        'has more files than the disk holds',
        [Buffer.concat(Array.from({ length: 16_385 }, (_, number) => entry({ path: `${number}` })))],
      ],
      [
        'takes a link for a file that has not changed',
        [link('l', 'before'), entry({ path: 'l', unchanged: true, size: 6 })],
      ],
    ])('%s', async (_, parts) => {
      await expect(replace(...parts)).rejects.toThrow(/^cannot put what the container has written into /);
      expect(readdirSync(at())).toEqual(['before']);
      expect(readdirSync(join(dir, 'work'))).toEqual(['kiln-upper']);
      expect(readFileSync(join(dir, 'outside', 'file'), 'utf8')).toBe('outside');
    });

    test('a file with a size of exabytes takes no room', async () => {
      const size = 2 ** 49;
      const huge = {
        path: 'huge',
        type: 'file',
        mode: 0o600,
        uid: 0,
        gid: 0,
        mtimeNs: 0n,
        target: '',
        major: 0,
        minor: 0,
      } as const;
      const header = tarHeader({ ...huge, xattrs: new Map(), unchanged: false, size }, []);
      const map = Buffer.alloc(512);
      map.write('0\n');
      // Whether there can be such a file at all is up to the host's filesystem.
      const outcome = await replace(header, map).then(
        () => lstatSync(at('huge')).blocks,
        (error: Error) => error.message,
      );
      expect(String(outcome)).toMatch(/^0$|EFBIG|EINVAL/);
    });

    test('does not end', async () => {
      const zeros = async function* () {
        for (;;) yield Buffer.alloc(2 ** 20);
      };
      const begun = async function* () {
        yield entry({ path: 'f' }, 'x');
        yield* zeros();
      };
      await expect(upper.replace(begun(), { maxBytes })).rejects.toMatchObject({ code: 'resource-exhausted' });
      expect(readdirSync(at())).toEqual(['before']);
    });
  });

  test('gets no devices of a guest, and tells which', async () => {
    const node = { type: 'block', major: 8, minor: 0 } as const;
    const { leftOut, leftOutCount } = await replace(
      entry({ path: 'disk', ...node }),
      entry({ path: 'null', type: 'character', major: 1, minor: 3 }),
      entry({ path: 'gone', type: 'character' }),
    );
    expect(readdirSync(at())).toEqual(['gone']);
    expect(lstatSync(at('gone')).rdev).toBe(0);
    expect({ leftOut, leftOutCount }).toEqual({ leftOut: ['disk', 'null'], leftOutCount: 2 });
  });

  test('gets no attributes that are the kernel’s or overlayfs’s own', async () => {
    const xattrs = new Map([
      ['trusted.overlay.redirect', Buffer.from('/etc')],
      ['trusted.overlay.metacopy', Buffer.from('x')],
      ['trusted.overlay.opaque', Buffer.from('x')],
      ['user.overlay.opaque', Buffer.from('y')],
      ['security.selinux', Buffer.from('x')],
      ['user.mine', Buffer.from('m')],
    ]);
    await replace(entry({ path: 'd', type: 'directory', xattrs }));
    expect(xattrsOf(at('d'))).toEqual(['user.mine=6d']);
  });

  test('follows no link that somebody has put in its own place', async () => {
    rmSync(at(), { recursive: true });
    symlinkSync('outside', at());
    await expect(replace(entry({ path: 'f' }, 'x'))).rejects.toThrow();
    expect(readlinkSync(at())).toBe('outside');
    expect(readdirSync(join(dir, 'outside'))).toEqual([]);
  });

  test('stays as it was on a disk that is full', async () => {
    await mustRun('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'kiln-test', join(dir, 'outside')]);
    try {
      for (const name of ['fs', 'work']) mkdirSync(join(dir, 'outside', name));
      const small = new SnapshotUpper({
        path: join(dir, 'outside/fs'),
        work: join(dir, 'outside/work'),
        userxattr: false,
      });
      const full = small.replace(streamOf(entry({ path: 'f' }, 'x'.repeat(2 ** 21))), { maxBytes });
      await expect(full).rejects.toMatchObject({
        code: 'resource-exhausted',
        message: expect.stringContaining('the disk is full'),
      });
      expect(readdirSync(join(dir, 'outside/fs'))).toEqual([]);
      expect(readdirSync(join(dir, 'outside/work'))).toEqual([]);
    } finally {
      await mustRun('umount', [join(dir, 'outside')]);
    }
  });
});
