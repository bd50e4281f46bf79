import { Bytes } from './bytes.ts';
import {
  type BinaryString,
  blockBytes,
  FilesError,
  type Piece,
  shown,
  type TarEntry,
  type TarType,
  typeLetters,
  unchangedRecord,
  xattrRecord,
} from './tar-entry.ts';

/** The most bytes of what comes before a header: names, and extended attributes, of which a file has at most 64 KiB each. */
const maxExtraBytes = 1024 * 1024;
/** PATH_MAX less the final NUL, linux/limits.h. */
const maxPathBytes = 4095;
const maxPieces = 1_000_000;

/** One file of a stream, with its content: to be read before the next one is asked for, or not at all. */
export interface TarFile {
  readonly entry: TarEntry;
  /** The content without holes: each piece at its offset. */
  readonly content: AsyncIterable<{ readonly offset: number; readonly data: Buffer }>;
  /** Where the content stands in the stream, in one piece; undefined of a file with holes, and of what has none. */
  readonly stored: Piece | undefined;
}

export interface ReadOptions {
  /**
   * "required": a stream that just stops may have been cut off, and is refused. "optional": who reads knows by other means
   * that it is whole. Not every program that writes images ends its tars.
   */
  readonly end: 'required' | 'optional';
}

const typesByLetter = new Map(Object.entries(typeLetters).map(([type, letter]) => [letter, type as TarType]));

/** As it stands in the header, and in what came before it. */
type Records = Map<string, Buffer>;

/**
 * The files of a stream. Nothing of it is kept but the file that is being read.
 *
 * @throws FilesError invalid-argument for what is no tar stream, or ends too early; resource-exhausted for a header beyond
 *   its limits; unimplemented for formats that Kiln does not read
 */
export async function* readTar(
  source: AsyncIterable<Buffer>,
  { end }: ReadOptions = { end: 'required' },
): AsyncGenerator<TarFile> {
  const bytes = new Bytes(source);
  let records: Records = new Map();
  for (;;) {
    if (end === 'optional' && records.size === 0 && (await bytes.atEnd())) return;
    const header = await bytes.take(blockBytes, 'a header');
    if (header.every((byte) => byte === 0)) {
      await bytes.drain();
      return;
    }
    checkSum(header);
    const letter = header.toString('latin1', 156, 157);
    if ('xgLK'.includes(letter)) {
      const size = number(header, 124, 12);
      if (size > maxExtraBytes)
        throw new FilesError('resource-exhausted', `a header in the tar stream has ${size} bytes`);
      const extra = await bytes.take(size, 'a header');
      await bytes.take(fill(size), 'a header');
      if (letter === 'x') records = new Map([...records, ...parseRecords(extra)]);
      if (letter === 'L') records.set('path', untilNul(extra));
      if (letter === 'K') records.set('linkpath', untilNul(extra));
      continue;
    }
    const { entry, length } = entryOf(header, letter, records);
    const sparse = records.has('GNU.sparse.major');
    if (sparse && text(records, 'GNU.sparse.major') !== '1')
      throw new FilesError('unimplemented', `${shown(entry.path)} has holes in a format that Kiln does not read`);
    records = new Map();
    let left = length;
    const next = async (most: number): Promise<Buffer> => {
      const data = await bytes.some(Math.min(left, most), 'the content of a file');
      left -= data.length;
      return data;
    };
    yield {
      entry,
      content: sparse ? sparseContent(entry, next, () => left) : wholeContent(next, () => left),
      stored: sparse || entry.type !== 'file' ? undefined : { offset: bytes.taken, length },
    };
    while (left > 0) await next(left);
    await bytes.take(fill(length), 'the content of a file');
  }
}

type Next = (most: number) => Promise<Buffer>;

async function* wholeContent(next: Next, left: () => number) {
  for (let offset = 0; left() > 0; ) {
    const data = await next(left());
    yield { offset, data };
    offset += data.length;
  }
}

/** GNU tar's manual, "Sparse Formats", version 1.0. */
async function* sparseContent({ path, size }: TarEntry, next: Next, left: () => number) {
  const bad = (why: string) => new FilesError('invalid-argument', `the holes of ${shown(path)} ${why}`);
  let text = '';
  const numbers: number[] = [];
  let wanted = 1;
  while (numbers.length < wanted) {
    let block = '';
    while (block.length < blockBytes) {
      if (left() === 0) throw bad('end too early');
      block += (await next(blockBytes - block.length)).toString('latin1');
    }
    const lines = (text + block).split('\n');
    text = lines.pop() ?? '';
    for (const line of lines) {
      if (numbers.length === wanted) break;
      if (!/^\d{1,15}$/.test(line)) throw bad('are no numbers');
      numbers.push(Number(line));
      if (numbers.length === 1) wanted = 1 + 2 * Math.min(Number(line), maxPieces + 1);
    }
    if (wanted > 1 + 2 * maxPieces) throw bad('are too many');
    if (numbers.length < wanted && text.length > 20) throw bad('are no numbers');
  }
  for (const { offset, length } of piecesOf(numbers)) {
    if (offset + length > size) throw bad('reach beyond its end');
    for (let at = 0; at < length; ) {
      if (left() === 0) throw bad('leave more content than there is');
      const data = await next(length - at);
      yield { offset: offset + at, data };
      at += data.length;
    }
  }
}

function* piecesOf(numbers: readonly number[]): Generator<Piece> {
  for (let at = 1; at + 1 < numbers.length; at += 2) yield { offset: numbers[at] ?? 0, length: numbers[at + 1] ?? 0 };
}

function entryOf(header: Buffer, letter: string, records: Records): { entry: TarEntry; length: number } {
  const prefix = untilNul(header.subarray(345, 500)).toString('latin1');
  const isPosix = header.toString('latin1', 257, 263) === 'ustar\0';
  const name = untilNul(header.subarray(0, 100)).toString('latin1');
  const short = isPosix && prefix !== '' ? `${prefix}/${name}` : name;
  const path = text(records, 'GNU.sparse.name') ?? text(records, 'path') ?? short;
  const type = typesByLetter.get(letter === '\0' || letter === '7' ? '0' : letter);
  if (type === undefined) {
    throw new FilesError('unimplemented', `${shown(path)} is of the type ${shown(letter)}, which Kiln does not read`);
  }
  const target = text(records, 'linkpath') ?? untilNul(header.subarray(157, 257)).toString('latin1');
  for (const value of [path, target]) {
    if (value.length > maxPathBytes) throw new FilesError('resource-exhausted', `the name ${shown(value)} is too long`);
    if (value.includes('\0')) throw new FilesError('invalid-argument', `the name ${shown(value)} has a NUL in it`);
  }
  const length = type === 'file' ? (decimal(records, 'size') ?? number(header, 124, 12)) : 0;
  const unchanged = decimal(records, unchangedRecord);
  const mtime = text(records, 'mtime');
  const xattrs = new Map<string, Buffer>();
  for (const [key, value] of records) {
    if (key.startsWith(xattrRecord)) xattrs.set(key.slice(xattrRecord.length), value);
  }
  const entry: TarEntry = {
    path: path.replace(/\/+$/, ''),
    // The oldest tars know a directory only by its name.
    type: type === 'file' && path.endsWith('/') ? 'directory' : type,
    mode: number(header, 100, 8) & 0o7777,
    uid: decimal(records, 'uid') ?? number(header, 108, 8),
    gid: decimal(records, 'gid') ?? number(header, 116, 8),
    mtimeNs: mtime === undefined ? BigInt(number(header, 136, 12)) * 1_000_000_000n : nanoseconds(mtime),
    size: unchanged ?? decimal(records, 'GNU.sparse.realsize') ?? length,
    target,
    major: number(header, 329, 8),
    minor: number(header, 337, 8),
    xattrs,
    unchanged: unchanged !== undefined,
  };
  return { entry, length };
}

function checkSum(header: Buffer): void {
  let sum = 0;
  for (const [at, byte] of header.entries()) sum += at >= 148 && at < 156 ? 0x20 : byte;
  if (sum !== number(header, 148, 8))
    throw new FilesError('invalid-argument', 'this is no tar stream: a header has a wrong sum');
}

function parseRecords(bytes: Buffer): Records {
  const records: Records = new Map();
  for (let at = 0; at < bytes.length; ) {
    const space = bytes.indexOf(0x20, at);
    const digits = bytes.toString('latin1', at, space);
    const end = at + Number(digits);
    const equals = bytes.indexOf(0x3d, space);
    if (
      space < 0 ||
      !/^[1-9]\d{0,7}$/.test(digits) ||
      end > bytes.length ||
      equals < 0 ||
      equals >= end ||
      bytes[end - 1] !== 0x0a
    ) {
      throw new FilesError('invalid-argument', 'a header in the tar stream has a broken record');
    }
    records.set(bytes.toString('utf8', space + 1, equals), Buffer.from(bytes.subarray(equals + 1, end - 1)));
    at = end;
  }
  return records;
}

function text(records: Records, key: string): BinaryString | undefined {
  return records.get(key)?.toString('latin1');
}

function decimal(records: Records, key: string): number | undefined {
  const value = text(records, key);
  if (value === undefined) return undefined;
  if (!/^\d{1,15}$/.test(value))
    throw new FilesError('invalid-argument', `${key} in the tar stream is ${shown(value)}`);
  return Number(value);
}

/** Octal digits, or, with the first bit set, the number itself in the rest of the field (GNU tar). */
function number(header: Buffer, at: number, length: number): number {
  const field = header.subarray(at, at + length);
  if (((field[0] ?? 0) & 0x80) !== 0) {
    let value = (field[0] ?? 0) & 0x7f;
    for (const byte of field.subarray(1)) value = value * 256 + byte;
    if (Number.isSafeInteger(value)) return value;
    throw new FilesError('invalid-argument', 'a header in the tar stream has a number that is too large');
  }
  const digits = field.toString('latin1').replaceAll(/[\0 ]+$|^ +/g, '');
  if (!/^[0-7]*$/.test(digits))
    throw new FilesError('invalid-argument', 'this is no tar stream: a header has a number that is none');
  return digits === '' ? 0 : Number.parseInt(digits, 8);
}

function nanoseconds(seconds: string): bigint {
  const match = /^(-?)(\d{1,11})(?:\.(\d+))?$/.exec(seconds);
  if (match === null) throw new FilesError('invalid-argument', `mtime in the tar stream is ${shown(seconds)}`);
  const ns = BigInt(match[2] ?? 0) * 1_000_000_000n + BigInt((match[3] ?? '').slice(0, 9).padEnd(9, '0'));
  return match[1] === '-' ? -ns : ns;
}

function untilNul(bytes: Buffer): Buffer {
  const end = bytes.indexOf(0);
  return end < 0 ? bytes : bytes.subarray(0, end);
}

function fill(size: number): number {
  return (blockBytes - (size % blockBytes)) % blockBytes;
}
