/**
 * A layer of an image: a tar whose files go on top of what the layers below have left. image-spec, layer.md: a file
 * `.wh.NAME` removes NAME of the layers below, and `.wh..wh..opq` all that they have in its folder; a folder that is there
 * stays, with its attributes changed; anything else that is there is replaced.
 */
import { chmodSync, lchownSync, linkSync, lutimesSync, mkdirSync, readdirSync, rmSync, symlinkSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import type { Readable } from 'node:stream';
import { type Extract, extract, type Header } from 'tar-stream';
import { KilnError } from '../errors.ts';
import { SysError } from '../sys/error.ts';
import { mkfifo } from '../sys/fifo.ts';
import { lsetxattr } from '../sys/xattr.ts';
import { lstatIfThere, partsOf, placeOf } from './scoped-path.ts';

type Entry = Extract extends AsyncIterable<infer Item> ? Item : never;

const whiteoutPrefix = '.wh.';
const opaqueMarker = '.wh..wh..opq';

/** Attributes that mean on the host's disk what they mean in a container. trusted.* would speak to the host's overlayfs. */
const attribute = /^SCHILY\.xattr\.(security\.capability|user\..+)$/;

export interface LayerTarget {
  /** Where the image's root is; nobody else changes it. */
  readonly root: string;
  /** Told of what was left out, once a file. */
  readonly warn: (message: string) => void;
}

/**
 * Puts a layer on top of the folder.
 *
 * @param tar uncompressed
 * @throws KilnError invalid-argument for a tar that is damaged, or wants to leave the folder
 */
export async function applyLayer(tar: Readable, target: LayerTarget): Promise<void> {
  const layer = new Layer(target);
  const entries = extract();
  tar.on('error', (error) => entries.destroy(error));
  tar.pipe(entries);
  try {
    for await (const entry of entries) {
      await layer.add(entry);
      entry.resume();
    }
  } catch (error) {
    tar.destroy();
    throw error instanceof KilnError ? error : damaged(error);
  }
  layer.finish();
}

function damaged(error: unknown): KilnError {
  const { code, message } = error as NodeJS.ErrnoException;
  if (code === 'ENOSPC' || code === 'EDQUOT') {
    return new KilnError('resource-exhausted', 'there is no room to unpack the image', { cause: error });
  }
  return new KilnError('invalid-argument', `cannot unpack a layer of the image: ${message}`, { cause: error });
}

class Layer {
  readonly #target: LayerTarget;
  /** Places that are this layer's own, which its whiteouts spare. */
  readonly #own = new Set<string>();
  /** Times of folders, which change with each file in them. */
  readonly #folders = new Map<string, Date>();

  constructor(target: LayerTarget) {
    this.#target = target;
  }

  async add(entry: Entry): Promise<void> {
    const { header } = entry;
    const parts = partsOf(header.name);
    const { root } = this.#target;
    if (parts.length === 0) {
      if (header.type === 'directory') this.#attributes(root, header);
      return;
    }
    const place = placeOf(root, parts);
    const name = place.at(-1) ?? '';
    if (name.startsWith(whiteoutPrefix)) this.#whiteOut(place.slice(0, -1), name);
    else await this.#put(entry, place);
  }

  finish(): void {
    for (const [path, mtime] of this.#folders) {
      // A later whiteout or file may be in its place.
      if (lstatIfThere(path)?.isDirectory()) lutimesSync(path, mtime, mtime);
    }
  }

  async #put(entry: Entry, place: readonly string[]): Promise<void> {
    const { header } = entry;
    const path = join(this.#target.root, ...place);
    const there = lstatIfThere(path);
    const keeps = header.type === 'directory' && there?.isDirectory();
    if (there !== undefined && !keeps) rmSync(path, { recursive: true });
    if (!(await this.#make(entry, path, keeps === true))) return;
    for (let length = place.length; length > 0; length--) this.#own.add(place.slice(0, length).join('/'));
    if (header.type !== 'link') this.#attributes(path, header);
  }

  /** @returns false for what is left out */
  async #make(entry: Entry, path: string, keeps: boolean): Promise<boolean> {
    const { root, warn } = this.#target;
    const { name, type, linkname } = entry.header;
    switch (type) {
      case 'file':
      case 'contiguous-file': {
        await using file = await open(path, 'wx', 0o600);
        for await (const chunk of entry) await file.writeFile(chunk as Buffer);
        return true;
      }
      case 'directory':
        if (!keeps) mkdirSync(path, { mode: 0o700 });
        return true;
      case 'symlink':
        symlinkSync(linkname, path);
        return true;
      case 'link':
        linkSync(join(root, ...placeOf(root, requireParts(linkname, name))), path);
        return true;
      case 'fifo':
        mkfifo(path, 0o600);
        return true;
      case 'character-device':
      case 'block-device':
        warn(`${name}: device nodes of an image are left out`);
        return false;
      default:
        throw new KilnError('invalid-argument', `${name}: the image has a file of the unknown type "${type}"`);
    }
  }

  /** After its making, as its owner takes bits of its mode. */
  #attributes(path: string, { name, type, mode, mtime, uid, gid, ...others }: Header): void {
    const pax = (others.pax ?? {}) as Readonly<Record<string, string>>;
    lchownSync(path, Number(pax.uid ?? uid), Number(pax.gid ?? gid));
    if (type !== 'symlink') chmodSync(path, mode & 0o7777);
    for (const [key, value] of Object.entries(pax)) this.#attribute(path, name, key, value);
    if (type === 'directory') this.#folders.set(path, mtime);
    else lutimesSync(path, mtime, mtime);
  }

  #attribute(path: string, name: string, key: string, value: string): void {
    if (!key.startsWith('SCHILY.xattr.')) return;
    const attributeName = attribute.exec(key)?.[1];
    // The reader takes values for text; one that is none has come out otherwise.
    if (attributeName === undefined || value.includes('\uFFFD')) {
      this.#target.warn(`${name}: its attribute ${key.slice('SCHILY.xattr.'.length)} is left out`);
      return;
    }
    try {
      lsetxattr(path, attributeName, Buffer.from(value));
    } catch (error) {
      if (!(error instanceof SysError) || error.code !== 'EOPNOTSUPP') throw error;
      this.#target.warn(
        `${name}: its attribute ${attributeName} is left out: the filesystem of the bundle has none such`,
      );
    }
  }

  #whiteOut(folder: readonly string[], name: string): void {
    if (name === opaqueMarker) {
      this.#clear(folder);
      return;
    }
    const hidden = name.slice(whiteoutPrefix.length);
    // Others that begin so are aufs's own affairs: image-spec, layer.md "Whiteouts".
    if (hidden === '' || hidden === '.' || hidden === '..' || hidden.startsWith(whiteoutPrefix)) return;
    const place = [...folder, hidden];
    if (!this.#own.has(place.join('/'))) rmSync(join(this.#target.root, ...place), { recursive: true, force: true });
    else if (lstatIfThere(join(this.#target.root, ...place))?.isDirectory()) this.#clear(place);
  }

  /** Removes what the layers below have in a folder. */
  #clear(folder: readonly string[]): void {
    const path = join(this.#target.root, ...folder);
    for (const name of readdirSync(path)) {
      const place = [...folder, name];
      if (!this.#own.has(place.join('/'))) rmSync(join(path, name), { recursive: true });
      else if (lstatIfThere(join(path, name))?.isDirectory()) this.#clear(place);
    }
  }
}

function requireParts(linkname: string, name: string): string[] {
  const parts = partsOf(linkname);
  if (parts.length > 0) return parts;
  throw new KilnError('invalid-argument', `${name}: a hard link to ${JSON.stringify(linkname)} is none`);
}
