/** A tar with the files of an image: which there are, and what is in them. It may be compressed as a whole. */
import { createHash } from 'node:crypto';
import { closeSync, createReadStream, createWriteStream, openSync, readSync } from 'node:fs';
import { Readable } from 'node:stream';
import { buffer } from 'node:stream/consumers';
import { pipeline } from 'node:stream/promises';
import { createGunzip, createZstdDecompress } from 'node:zlib';
import { KilnError } from '../errors.ts';
import type { BinaryString, Piece } from '../files/tar-entry.ts';
import { readTar } from '../files/tar-read.ts';

/** No manifest or configuration comes near; a runaway one must not fill memory. */
const maxJsonBytes = 4 * 1024 * 1024;

/** Links between members, one behind the other. Docker's archives have such for layers that come twice. */
const maxLinks = 8;

export class Archive {
  /** For messages. */
  readonly name: string;
  readonly #file: string;
  readonly #members: ReadonlyMap<string, Piece>;
  readonly #links: ReadonlyMap<string, string>;

  private constructor(name: string, file: string, members: Map<string, Piece>, links: Map<string, string>) {
    this.name = name;
    this.#file = file;
    this.#members = members;
    this.#links = links;
  }

  /**
   * @param scratch a file that a compressed archive is unpacked to; the caller's to remove
   * @throws KilnError invalid-argument for what is no tar
   */
  static async open(name: string, scratch: string): Promise<Archive> {
    try {
      const file = await plainTar(name, scratch);
      const members = new Map<string, Piece>();
      const links = new Map<string, string>();
      const reading = createReadStream(file);
      try {
        for await (const { entry, stored } of readTar(reading as AsyncIterable<Buffer>, { end: 'optional' })) {
          const path = pathOf(textOf(entry.path));
          const target = textOf(entry.target);
          if (stored !== undefined) members.set(path, stored);
          if (entry.type === 'symlink') links.set(path, linkTarget(path, target));
          if (entry.type === 'link') links.set(path, pathOf(target));
        }
      } finally {
        reading.destroy();
      }
      return new Archive(name, file, members, links);
    } catch (error) {
      if (error instanceof KilnError) throw error;
      const { message } = error as Error;
      throw new KilnError('invalid-argument', `${name}: cannot be read as a tar archive: ${message}`, { cause: error });
    }
  }

  has(path: string): boolean {
    return this.#find(path) !== undefined;
  }

  /** @throws KilnError invalid-argument for a member that is not there */
  read(path: string): Readable {
    const { offset, length } = this.#require(path);
    return length === 0 ? Readable.from([]) : createReadStream(this.#file, { start: offset, end: offset + length - 1 });
  }

  /** @throws KilnError invalid-argument for a member that is not there, too large, or no JSON */
  async readJson(path: string, digest?: string): Promise<unknown> {
    const { length } = this.#require(path);
    if (length > maxJsonBytes) throw this.error(`${path} has ${length} bytes, which is too much for what it should be`);
    const bytes = await buffer(this.read(path));
    if (digest !== undefined) this.requireDigest(path, digest, createHash('sha256').update(bytes).digest('hex'));
    try {
      return JSON.parse(bytes.toString());
    } catch (cause) {
      throw this.error(`${path} is not valid JSON`, cause);
    }
  }

  /** @throws KilnError invalid-argument, with both */
  requireDigest(what: string, expected: string, actualHex: string): void {
    const actual = `sha256:${actualHex}`;
    if (expected !== actual) throw this.error(`${what} is damaged: its digest is ${actual}, not ${expected}`);
  }

  error(message: string, cause?: unknown): KilnError {
    return new KilnError('invalid-argument', `${this.name}: ${message}`, cause === undefined ? {} : { cause });
  }

  #require(path: string): Piece {
    const member = this.#find(path);
    if (member === undefined) throw this.error(`${path} is missing`);
    return member;
  }

  #find(path: string): Piece | undefined {
    let at = pathOf(path);
    for (let links = 0; links < maxLinks; links++) {
      const next = this.#links.get(at);
      if (next === undefined) return this.#members.get(at);
      at = next;
    }
    return undefined;
  }
}

/** A name in the archive as those of its manifest are. @throws KilnError invalid-argument for one that climbs */
function pathOf(name: string): string {
  const parts = name.split('/').filter((part) => part !== '' && part !== '.');
  if (!parts.includes('..')) return parts.join('/');
  throw new KilnError(
    'invalid-argument',
    `the image has a file called ${JSON.stringify(name)}, which is no place in it`,
  );
}

function textOf(name: BinaryString): string {
  return Buffer.from(name, 'latin1').toString();
}

/** A link's target within the archive, as a path from its root; one that leaves it leads nowhere. */
function linkTarget(path: string, target: string): string {
  const place = path.split('/').slice(0, -1);
  for (const step of target.split('/')) {
    if (step === '..') place.pop();
    else if (step !== '' && step !== '.') place.push(step);
  }
  return place.join('/');
}

async function plainTar(file: string, scratch: string): Promise<string> {
  const start = Buffer.alloc(4);
  const fd = openSync(file, 'r');
  try {
    readSync(fd, start);
  } finally {
    closeSync(fd);
  }
  const decompress = decompressorFor(start);
  if (decompress === undefined) return file;
  await pipeline(createReadStream(file), decompress, createWriteStream(scratch, { mode: 0o600 }));
  return scratch;
}

/** For what begins with these four bytes; undefined where it is not compressed. RFC 1952, RFC 8878. */
export function decompressorFor(start: Buffer) {
  if (start.readUInt16BE(0) === 0x1f8b) return createGunzip();
  if (start.readUInt32LE(0) === 0xfd2fb528) return createZstdDecompress();
  return undefined;
}
