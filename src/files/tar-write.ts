import {
  type BinaryString,
  blockBytes,
  type Piece,
  type TarEntry,
  typeLetters,
  unchangedRecord,
  xattrRecord,
} from './tar-entry.ts';

/** What fits into the header's fields: bytes of a name, and the largest number of seven and of eleven octal digits. */
const nameBytes = 100;
const maxId = 0o7777777;
const maxSize = 0o77777777777;

/** The end of a stream. */
export const tarEnd: Buffer = Buffer.alloc(2 * blockBytes);

/** What fills a file's content up to whole blocks. */
export function padding(length: number): Buffer {
  return Buffer.alloc((blockBytes - (length % blockBytes)) % blockBytes);
}

/**
 * The header of a file, with what has to come before it.
 *
 * @param pieces of a file with holes: what is none, in ascending order. The content in the stream is `sparseMap` and then
 *   the pieces
 */
export function tarHeader(entry: TarEntry, pieces?: readonly Piece[]): Buffer {
  const { path, type, size, target, uid, gid, mtimeNs } = entry;
  const name = type === 'directory' ? `${path}/` : path;
  let content = type === 'file' && !entry.unchanged ? size : 0;
  const records: [string, Buffer][] = [];
  const say = (key: string, value: BinaryString) => records.push([key, Buffer.from(value, 'latin1')]);
  if (pieces !== undefined) {
    content = sparseMap(pieces).length + pieces.reduce((sum, { length }) => sum + length, 0);
    say('GNU.sparse.major', '1');
    say('GNU.sparse.minor', '0');
    say('GNU.sparse.name', name);
    say('GNU.sparse.realsize', String(size));
  }
  if (name.length > nameBytes || !isAscii(name)) say('path', name);
  if (target.length > nameBytes || !isAscii(target)) say('linkpath', target);
  if (uid > maxId) say('uid', String(uid));
  if (gid > maxId) say('gid', String(gid));
  if (content > maxSize) say('size', String(content));
  const whole = mtimeNs >= 0n && mtimeNs % 1_000_000_000n === 0n && mtimeNs / 1_000_000_000n <= BigInt(maxSize);
  if (!whole) say('mtime', decimalSeconds(mtimeNs));
  if (entry.unchanged) say(unchangedRecord, String(size));
  for (const [key, value] of entry.xattrs) records.push([xattrRecord + key, value]);
  const header = block({
    ...entry,
    name: name.slice(0, nameBytes),
    letter: typeLetters[type],
    size: Math.min(content, maxSize),
    seconds: whole ? Number(mtimeNs / 1_000_000_000n) : 0,
  });
  if (records.length === 0) return header;
  const body = Buffer.concat(records.map(([key, value]) => record(key, value)));
  const plain = { mode: 0o644, uid: 0, gid: 0, target: '', major: 0, minor: 0, seconds: 0 };
  const before = block({ ...plain, name: 'PaxHeaders/x', letter: 'x', size: body.length });
  return Buffer.concat([before, body, padding(body.length), header]);
}

/** Where a file's pieces belong: it comes before them, in whole blocks. */
export function sparseMap(pieces: readonly Piece[]): Buffer {
  const numbers = [pieces.length, ...pieces.flatMap(({ offset, length }) => [offset, length])];
  const text = Buffer.from(`${numbers.join('\n')}\n`);
  return Buffer.concat([text, padding(text.length)]);
}

interface Block extends Pick<TarEntry, 'mode' | 'uid' | 'gid' | 'size' | 'target' | 'major' | 'minor'> {
  readonly name: BinaryString;
  readonly letter: string;
  readonly seconds: number;
}

/** POSIX.1-2001, ustar Interchange Format. */
function block({ name, mode, uid, gid, size, seconds, letter, target, major, minor }: Block): Buffer {
  const bytes = Buffer.alloc(blockBytes);
  const octal = (value: number, at: number, digits: number) =>
    bytes.write(value.toString(8).padStart(digits, '0'), at, 'latin1');
  bytes.write(name, 0, nameBytes, 'latin1');
  octal(mode & 0o7777, 100, 7);
  octal(Math.min(uid, maxId), 108, 7);
  octal(Math.min(gid, maxId), 116, 7);
  octal(size, 124, 11);
  octal(seconds, 136, 11);
  bytes.write(letter, 156, 'latin1');
  bytes.write(target.slice(0, nameBytes), 157, 'latin1');
  bytes.write('ustar\0' + '00', 257, 'latin1');
  octal(Math.min(major, maxId), 329, 7);
  octal(Math.min(minor, maxId), 337, 7);
  bytes.fill(' ', 148, 156);
  const sum = bytes.reduce((total, byte) => total + byte, 0);
  bytes.write(`${sum.toString(8).padStart(6, '0')}\0 `, 148, 'latin1');
  return bytes;
}

/** "LENGTH KEY=VALUE\n", where the length counts its own digits. */
function record(key: string, value: Buffer): Buffer {
  const rest = Buffer.byteLength(key) + value.length + 3;
  let length = rest + String(rest).length;
  if (rest + String(length).length !== length) length = rest + String(length).length;
  return Buffer.concat([Buffer.from(`${length} ${key}=`), value, Buffer.from('\n')]);
}

function decimalSeconds(ns: bigint): string {
  const [sign, absolute] = ns < 0n ? ['-', -ns] : ['', ns];
  return `${sign}${absolute / 1_000_000_000n}.${String(absolute % 1_000_000_000n).padStart(9, '0')}`;
}

function isAscii(text: BinaryString): boolean {
  return /^[\x20-\x7e]*$/.test(text);
}
