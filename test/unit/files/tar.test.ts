import { describe, expect, test } from 'vitest';
import type { TarEntry } from '../../../src/files/tar-entry.ts';
import { readTar } from '../../../src/files/tar-read.ts';
import { padding, sparseMap, tarEnd, tarHeader } from '../../../src/files/tar-write.ts';
import { run } from '../../support/spawn.ts';

const plain: TarEntry = {
  path: 'a',
  type: 'file',
  mode: 0o644,
  uid: 0,
  gid: 0,
  mtimeNs: 1_700_000_000_000_000_000n,
  size: 0,
  target: '',
  major: 0,
  minor: 0,
  xattrs: new Map(),
  unchanged: false,
};

async function* inPieces(bytes: Buffer, length = 100_000) {
  for (let at = 0; at < bytes.length; at += length) yield bytes.subarray(at, at + length);
}

interface Read {
  readonly entry: TarEntry;
  readonly content: readonly [offset: number, data: string][];
}

async function read(bytes: Buffer, pieceLength?: number): Promise<Read[]> {
  const files: Read[] = [];
  for await (const { entry, content } of readTar(inPieces(bytes, pieceLength))) {
    const pieces: [number, string][] = [];
    for await (const { offset, data } of content) pieces.push([offset, data.toString()]);
    files.push({ entry, content: pieces });
  }
  return files;
}

function file(entry: Partial<TarEntry>, content = ''): Buffer {
  const whole = { ...plain, ...entry, size: content.length };
  return Buffer.concat([tarHeader(whole), Buffer.from(content), padding(content.length)]);
}

const odd: Partial<TarEntry>[] = [
  { path: 'd', type: 'directory', mode: 0o1777 },
  { path: `${'long/'.repeat(60)}name` },
  { path: 'not \xff\xfe utf-8', mtimeNs: 1_700_000_000_123_456_789n },
  { path: 'old', mtimeNs: -1_500_000_000n },
  { path: 'ids', uid: 4_000_000_000, gid: 3_000_000_000 },
  { path: 'soft', type: 'symlink', target: `../${'x'.repeat(300)}` },
  { path: 'hard', type: 'link', target: 'ids' },
  { path: 'device', type: 'character', major: 1, minor: 3 },
  { path: 'gone', type: 'character' },
  { path: 'fifo', type: 'fifo', mode: 0o4755 },
  {
    path: 'attributes',
    xattrs: new Map([
      ['user.a', Buffer.from([0, 255, 10, 61])],
      ['user.empty', Buffer.alloc(0)],
    ]),
  },
  { path: 'same', unchanged: true },
];

describe('a tar stream', () => {
  test('gives back every field that it was made of, however it is cut into pieces', async () => {
    const bytes = Buffer.concat([...odd.map((entry) => file(entry)), file({ path: 'content' }, 'hello'), tarEnd]);
    for (const pieceLength of [1, 511, 513, 1_000_000]) {
      const files = await read(bytes, pieceLength);
      expect(files.slice(0, -1).map(({ entry }) => entry)).toEqual(odd.map((entry) => ({ ...plain, ...entry })));
      expect(
        files
          .at(-1)
          ?.content.map(([, data]) => data)
          .join(''),
      ).toBe('hello');
    }
  });

  test('is read by GNU tar, with its names, holes and times', async () => {
    const entry = { ...plain, path: 'holes', size: 100_000 };
    const pieces = [
      { offset: 4096, length: 4 },
      { offset: 90_000, length: 3 },
    ];
    const holes = Buffer.concat([tarHeader(entry, pieces), sparseMap(pieces), Buffer.from('fourend'), padding(7)]);
    const bytes = Buffer.concat([holes, file({ path: `${'long/'.repeat(60)}name`, mode: 0o600 }, 'x'), tarEnd]);
    const { stdout, code } = await run('tar', ['--numeric-owner', '-tvf', '-'], { stdin: bytes });
    expect(code).toBe(0);
    expect(stdout.toString()).toMatch(/^-rw-r--r-- 0\/0 +100000 .* holes\n-rw------- 0\/0 +1 .* (long\/){60}name\n$/);
    const [first] = await read(bytes);
    expect(first).toMatchObject({
      entry,
      content: [
        [4096, 'four'],
        [90_000, 'end'],
      ],
    });
  });

  test('of GNU tar and of Python is read', async () => {
    const script = 'mkdir d; printf 12345 >d/f; ln d/f d/g; ln -s f d/s; printf x >$(printf "%0150d" 7); tar cf - d 0*';
    const made = await run('sh', ['-euc', `cd "$(mktemp -d)"; ${script}; rm -r "$PWD"`]);
    const names = (await read(made.stdout)).map(({ entry: { path, type, target } }) => `${type} ${path} ${target}`);
    expect(names).toEqual(
      ['directory d ', 'symlink d/s f', 'file d/f ', 'link d/g d/f', `file ${'0'.repeat(149)}7 `].sort(
        (a, b) => names.indexOf(a) - names.indexOf(b),
      ),
    );
    expect(names).toHaveLength(5);
  });

  test.each<[string, Buffer, string]>([
    ['that is none', Buffer.from('x'.repeat(1024)), 'no tar stream'],
    ['that ends within a header', file({}).subarray(0, 100), 'ends in the middle of a header'],
    ['without an end', file({}), 'ends in the middle of a header'],
    [
      'that ends within a file',
      Buffer.concat([tarHeader({ ...plain, size: 5 }), Buffer.from('abc')]),
      'content of a file',
    ],
    ['with a broken record', paxHeader(Buffer.from('99 path=x\n')), 'broken record'],
    ['with a record without a length', paxHeader(Buffer.from('path=x\n')), 'broken record'],
    ['with a size that is no number', paxHeader(Buffer.from('13 size=-500\n')), 'size in the tar stream is'],
    ['with a NUL in a name', paxHeader(Buffer.from('11 path=a\0\n')), 'a NUL in it'],
    ['of an unknown type', retyped(file({}), 'S'), 'which Kiln does not read'],
    ['with holes behind the end', holed('1\n5\n10\n', 8), 'reach beyond its end'],
    ['with more holes than there are', holed('9999999999\n', 8), 'are too many'],
    ['with holes that are none', holed('one\n', 8), 'are no numbers'],
  ])('%s is refused', async (_, bytes, words) => {
    await expect(read(bytes)).rejects.toThrow(words);
  });

  test('with a header of gigabytes is refused before it is read', async () => {
    const header = retyped(tarHeader({ ...plain, size: 4 * 2 ** 30 }), 'x');
    await expect(read(Buffer.concat([header, Buffer.alloc(1024)]))).rejects.toThrow(
      'a header in the tar stream has 4294967296 bytes',
    );
  });
});

/** Another type letter, with the right sum. */
function retyped(bytes: Buffer, letter: string): Buffer {
  const header = Buffer.from(bytes);
  header.write(letter, 156, 'latin1');
  header.fill(' ', 148, 156);
  const sum = header.subarray(0, 512).reduce((total, byte) => total + byte, 0);
  header.write(`${sum.toString(8).padStart(6, '0')}\0 `, 148, 'latin1');
  return header;
}

function paxHeader(records: Buffer): Buffer {
  const header = retyped(tarHeader({ ...plain, size: records.length }), 'x');
  return Buffer.concat([header, records, padding(records.length), file({}), tarEnd]);
}

function holed(map: string, size: number): Buffer {
  const header = tarHeader({ ...plain, size }, [{ offset: 0, length: 0 }]);
  const block = Buffer.alloc(512);
  block.write(map);
  return Buffer.concat([header, block, tarEnd]);
}
