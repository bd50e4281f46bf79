/**
 * A 9P2000.L client that says just what it is told to, right or wrong: what a guest with root could send to the file
 * server over its connection. Messages: include/net/9p/9p.h and net/9p/client.c of Linux.
 */
import { once } from 'node:events';
import type { Socket } from 'node:net';

export const Rlerror = 7;

/** Names of the requests and their numbers; a reply's is one more. */
export const T = {
  statfs: 8,
  lopen: 12,
  lcreate: 14,
  symlink: 16,
  mknod: 18,
  rename: 20,
  readlink: 22,
  getattr: 24,
  setattr: 26,
  xattrwalk: 30,
  xattrcreate: 32,
  readdir: 40,
  fsync: 50,
  lock: 52,
  getlock: 54,
  link: 70,
  mkdir: 72,
  renameat: 74,
  unlinkat: 76,
  version: 100,
  auth: 102,
  attach: 104,
  flush: 108,
  walk: 110,
  read: 116,
  write: 118,
  clunk: 120,
  remove: 122,
} as const;

/** Of Tsetattr. */
export const attr = { mode: 1, uid: 2, gid: 4, size: 8, atime: 16, mtime: 32, ctime: 64, atimeSet: 128, mtimeSet: 256 };

/** Of Tlock: its type and the status in the reply. */
export const lockType = { read: 0, write: 1, unlock: 2 };
export const lockStatus = { success: 0, blocked: 1, failed: 2 };

/** An Rlerror. */
export class NinePError extends Error {
  readonly errno: number;

  constructor(errno: number) {
    super(`errno ${errno}`);
    this.errno = errno;
  }
}

/** A field of a message: [size in bytes, value], a text, or bytes as they are. */
export type Field = readonly [1 | 2 | 4 | 8, number | bigint] | string | Buffer;

export function encode(fields: readonly Field[]): Buffer {
  return Buffer.concat(
    fields.map((field) => {
      if (Buffer.isBuffer(field)) return field;
      if (typeof field === 'string') {
        const text = Buffer.from(field);
        return Buffer.concat([encode([[2, text.length]]), text]);
      }
      const [size, value] = field;
      const bytes = Buffer.alloc(8);
      bytes.writeBigUInt64LE(BigInt.asUintN(64, BigInt(value)));
      return bytes.subarray(0, size);
    }),
  );
}

export function message(type: number, tag: number, body: Buffer): Buffer {
  return Buffer.concat([
    encode([
      [4, 7 + body.length],
      [1, type],
      [2, tag],
    ]),
    body,
  ]);
}

export class Reader {
  readonly bytes: Buffer;
  at = 0;

  constructor(bytes: Buffer) {
    this.bytes = bytes;
  }

  u8(): number {
    return this.bytes.readUInt8(this.#take(1));
  }
  u16(): number {
    return this.bytes.readUInt16LE(this.#take(2));
  }
  u32(): number {
    return this.bytes.readUInt32LE(this.#take(4));
  }
  u64(): bigint {
    return this.bytes.readBigUInt64LE(this.#take(8));
  }
  number(): number {
    return Number(this.u64());
  }
  raw(length: number): Buffer {
    const at = this.#take(length);
    return this.bytes.subarray(at, at + length);
  }
  text(): string {
    return this.raw(this.u16()).toString();
  }
  qid(): { type: number; version: number; path: bigint } {
    return { type: this.u8(), version: this.u32(), path: this.u64() };
  }

  #take(length: number): number {
    const at = this.at;
    this.at += length;
    return at;
  }
}

export interface Attributes {
  readonly qid: { readonly type: number; readonly version: number; readonly path: bigint };
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly nlink: number;
  readonly rdev: number;
  readonly size: number;
  readonly blocks: number;
  /** Nanoseconds since 1970. */
  readonly atime: bigint;
  readonly mtime: bigint;
}

export interface Entry {
  readonly name: string;
  readonly type: number;
  readonly next: bigint;
}

export const rootFid = 0;

export class NinePClient implements Disposable {
  readonly #socket: Socket;
  readonly #waiting = new Map<number, (reply: { type: number; body: Reader } | Error) => void>();
  #pending: Buffer[] = [];
  #length = 0;
  #tag = 0;
  #fid = rootFid;
  /** Resolves when the server has closed the connection. */
  readonly closed: Promise<void>;
  /** What both have agreed on. */
  msize = 0;

  constructor(socket: Socket) {
    this.#socket = socket;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.closed = promise;
    socket.on('data', (chunk: Buffer) => this.#receive(chunk));
    socket.on('error', () => {});
    socket.once('close', () => {
      for (const settle of this.#waiting.values()) settle(new Error('the connection was closed'));
      this.#waiting.clear();
      resolve();
    });
  }

  /** As Linux begins: version, and an attach as root of the guest. */
  static async open(socket: Socket, { msize = 128 * 1024, uid = 0 } = {}): Promise<NinePClient> {
    const client = new NinePClient(socket);
    await client.version(msize);
    await client.attach(rootFid, { uid });
    return client;
  }

  [Symbol.dispose](): void {
    this.#socket.destroy();
  }

  /** A number that no fid has. */
  newFid(): number {
    this.#fid += 1;
    return this.#fid;
  }

  nextTag(): number {
    do this.#tag = (this.#tag + 1) % 0xffff;
    while (this.#waiting.has(this.#tag));
    return this.#tag;
  }

  /** Bytes as they are. */
  async send(bytes: Buffer): Promise<void> {
    if (!this.#socket.write(bytes)) await Promise.race([once(this.#socket, 'drain'), this.closed]);
  }

  /** The reply's fields. @throws NinePError for an Rlerror; Error when the connection ends */
  async call(type: number, fields: readonly Field[], tag = this.nextTag()): Promise<Reader> {
    if (this.#socket.destroyed) throw new Error('the connection was closed');
    const reply = await new Promise<{ type: number; body: Reader }>((resolve, reject) => {
      this.#waiting.set(tag, (answer) => (answer instanceof Error ? reject(answer) : resolve(answer)));
      this.#socket.write(message(type, tag, encode(fields)));
    });
    if (reply.type === Rlerror) throw new NinePError(reply.body.u32());
    if (reply.type !== type + 1) throw new Error(`a reply of type ${reply.type} to a request of type ${type}`);
    return reply.body;
  }

  async version(msize: number, version = '9P2000.L'): Promise<string> {
    const reply = await this.call(T.version, [[4, msize], version], 0xffff);
    this.msize = reply.u32();
    return reply.text();
  }

  async attach(fid: number, { uid = 0, aname = '', uname = '' } = {}): Promise<void> {
    await this.call(T.attach, [[4, fid], [4, 0xffffffff], uname, aname, [4, uid]]);
  }

  /** The new fid. Fails with ENOENT where only a part of the way was there. */
  async walk(path: string, { from = rootFid, to = this.newFid() } = {}): Promise<number> {
    const names = path.split('/').filter((name) => name !== '');
    const reply = await this.call(T.walk, [[4, from], [4, to], [2, names.length], ...names]);
    if (reply.u16() < names.length) throw new NinePError(2);
    return to;
  }

  async clunk(fid: number): Promise<void> {
    await this.call(T.clunk, [[4, fid]]);
  }

  async lopen(fid: number, flags: number): Promise<number> {
    await this.call(T.lopen, [
      [4, fid],
      [4, flags],
    ]);
    return fid;
  }

  async open(path: string, flags: number, from = rootFid): Promise<number> {
    return this.lopen(await this.walk(path, { from }), flags);
  }

  /** A fid of the new file, open. */
  async create(path: string, { flags = 2, mode = 0o644, gid = 0, from = rootFid } = {}): Promise<number> {
    const { parent, name } = split(path);
    const fid = await this.walk(parent, { from });
    await this.call(T.lcreate, [[4, fid], name, [4, flags], [4, mode], [4, gid]]);
    return fid;
  }

  async read(fid: number, offset: number, count: number): Promise<Buffer> {
    const reply = await this.call(T.read, [
      [4, fid],
      [8, offset],
      [4, count],
    ]);
    return reply.raw(reply.u32());
  }

  async write(fid: number, offset: number, data: Buffer | string): Promise<number> {
    const bytes = Buffer.from(data);
    return (await this.call(T.write, [[4, fid], [8, offset], [4, bytes.length], bytes])).u32();
  }

  async getattr(fid: number): Promise<Attributes> {
    const reply = await this.call(T.getattr, [
      [4, fid],
      [8, 0x7ff],
    ]);
    reply.u64();
    const qid = reply.qid();
    const [mode, uid, gid] = [reply.u32(), reply.u32(), reply.u32()];
    const [nlink, rdev, size] = [reply.number(), reply.number(), reply.number()];
    reply.u64();
    const blocks = reply.number();
    const time = () => reply.u64() * 1_000_000_000n + reply.u64();
    return { qid, mode, uid, gid, nlink, rdev, size, blocks, atime: time(), mtime: time() };
  }

  async setattr(
    fid: number,
    valid: number,
    { mode = 0, uid = 0, gid = 0, size = 0, atime = 0n, mtime = 0n } = {},
  ): Promise<void> {
    const time = (ns: bigint): Field[] => [
      [8, ns / 1_000_000_000n],
      [8, ns % 1_000_000_000n],
    ];
    await this.call(T.setattr, [
      ...([
        [4, fid],
        [4, valid],
        [4, mode],
        [4, uid],
        [4, gid],
        [8, size],
      ] as const),
      ...time(atime),
      ...time(mtime),
    ]);
  }

  /** All entries of a directory that is open, as Linux reads them. */
  async readdir(fid: number, count = this.msize - 24): Promise<Entry[]> {
    const entries: Entry[] = [];
    for (let offset = 0n; ; ) {
      const reply = await this.call(T.readdir, [
        [4, fid],
        [8, offset],
        [4, count],
      ]);
      const end = reply.u32() + reply.at;
      if (end === reply.at) return entries;
      while (reply.at < end) {
        reply.qid();
        offset = reply.u64();
        const type = reply.u8();
        entries.push({ type, name: reply.text(), next: offset });
      }
    }
  }

  async mkdir(path: string, { mode = 0o755, gid = 0, from = rootFid } = {}): Promise<void> {
    const { parent, name } = split(path);
    const fid = await this.walk(parent, { from });
    await this.call(T.mkdir, [[4, fid], name, [4, mode], [4, gid]]);
    await this.clunk(fid);
  }

  async symlink(path: string, target: string, { gid = 0, from = rootFid } = {}): Promise<void> {
    const { parent, name } = split(path);
    const fid = await this.walk(parent, { from });
    await this.call(T.symlink, [[4, fid], name, target, [4, gid]]);
  }

  async readlink(fid: number): Promise<string> {
    return (await this.call(T.readlink, [[4, fid]])).text();
  }

  async mknod(path: string, mode: number, { major = 0, minor = 0, gid = 0 } = {}): Promise<void> {
    const { parent, name } = split(path);
    const fid = await this.walk(parent);
    await this.call(T.mknod, [[4, fid], name, [4, mode], [4, major], [4, minor], [4, gid]]);
  }

  async link(target: number, path: string): Promise<void> {
    const { parent, name } = split(path);
    await this.call(T.link, [[4, await this.walk(parent)], [4, target], name]);
  }

  async rename(from: string, to: string): Promise<void> {
    const [source, target] = [split(from), split(to)];
    const fids = [await this.walk(source.parent), await this.walk(target.parent)] as const;
    await this.call(T.renameat, [[4, fids[0]], source.name, [4, fids[1]], target.name]);
  }

  async unlink(path: string, flags = 0): Promise<void> {
    const { parent, name } = split(path);
    await this.call(T.unlinkat, [[4, await this.walk(parent)], name, [4, flags]]);
  }

  async fsync(fid: number, dataOnly = false): Promise<void> {
    await this.call(T.fsync, [
      [4, fid],
      [4, dataOnly ? 1 : 0],
    ]);
  }

  async getxattr(fid: number, name: string): Promise<Buffer> {
    const to = this.newFid();
    const size = (await this.call(T.xattrwalk, [[4, fid], [4, to], name])).number();
    const value = await this.read(to, 0, size);
    await this.clunk(to);
    return value;
  }

  async setxattr(path: string, name: string, value: string | Buffer, flags = 0): Promise<void> {
    const fid = await this.walk(path);
    const bytes = Buffer.from(value);
    await this.call(T.xattrcreate, [[4, fid], name, [8, bytes.length], [4, flags]]);
    if (bytes.length > 0) await this.write(fid, 0, bytes);
    await this.clunk(fid);
  }

  /** The status in the reply. */
  async lock(
    fid: number,
    type: number,
    { start = 0, length = 0, process = 1, wait = false, tag = this.nextTag() } = {},
  ): Promise<number> {
    const reply = await this.call(
      T.lock,
      [[4, fid], [1, type], [4, wait ? 1 : 0], [8, start], [8, length], [4, process], 'guest'],
      tag,
    );
    return reply.u8();
  }

  /** The type of the lock that is in the way; "unlock" for none. */
  async getlock(fid: number, type: number, { start = 0, length = 0, process = 1 } = {}): Promise<number> {
    return (await this.call(T.getlock, [[4, fid], [1, type], [8, start], [8, length], [4, process], 'guest'])).u8();
  }

  async flush(tag: number): Promise<void> {
    await this.call(T.flush, [[2, tag]]);
  }

  #receive(chunk: Buffer): void {
    this.#pending.push(chunk);
    this.#length += chunk.length;
    while (this.#length >= 7) {
      const first = this.#pending[0]!;
      if (first.length < 7) this.#join();
      const size = this.#pending[0]!.readUInt32LE(0);
      if (this.#length < size) return;
      this.#join();
      const bytes = this.#pending[0]!;
      this.#pending = [bytes.subarray(size)];
      this.#length -= size;
      const tag = bytes.readUInt16LE(5);
      const settle = this.#waiting.get(tag);
      this.#waiting.delete(tag);
      settle?.({ type: bytes.readUInt8(4), body: new Reader(bytes.subarray(7, size)) });
    }
  }

  #join(): void {
    if (this.#pending.length > 1) this.#pending = [Buffer.concat(this.#pending)];
  }
}

function split(path: string): { parent: string; name: string } {
  const at = path.lastIndexOf('/');
  return { parent: path.slice(0, Math.max(at, 0)), name: path.slice(at + 1) };
}
