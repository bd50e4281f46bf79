import { createHash, type Hash } from 'node:crypto';
import { readFileSync, statSync } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import path from 'node:path';
import { z } from 'zod';
import { KilnError } from '../errors.ts';
import { replaceFile } from '../host/replace-file.ts';
import { nextExtent } from '../sys/sparse.ts';
import type { TemplateParts } from './key.ts';

/*
 * template.json: what a template was made of, and by which it is known to be whole. Written last, so that a template
 * without it is none. Its time of change is when the template was used last.
 */

const templateRecord = z.object({
  version: z.literal(1),
  parts: z.custom<TemplateParts>((value) => typeof value === 'object' && value !== null),
  madeAt: z.iso.datetime(),
  /** Of all files, in hexadecimal. */
  sha256: z.string().regex(/^[0-9a-f]{64}$/),
});

export type TemplateRecord = z.infer<typeof templateRecord>;

/** Its name in the template's directory. */
export const recordName = 'template.json';

/** Bytes that are read at a time. */
const chunkBytes = 1 << 20;
const zeroes = Buffer.alloc(chunkBytes);

export function writeTemplateRecord(directory: string, record: TemplateRecord): void {
  replaceFile(path.join(directory, recordName), JSON.stringify(record, null, 2));
}

/** @throws KilnError not-found, or invalid-argument for a file that is no record */
export function readTemplateRecord(directory: string): TemplateRecord {
  const file = path.join(directory, recordName);
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch (cause) {
    throw new KilnError('not-found', `${file} cannot be read`, { cause });
  }
  try {
    return templateRecord.parse(JSON.parse(text));
  } catch (cause) {
    throw new KilnError('invalid-argument', `${file} is not the record of a template`, { cause });
  }
}

/**
 * The digest of files in a directory: of their names, their lengths, and where in them is which data. Holes are not read.
 *
 * @throws the error of the file system
 */
export async function digestOf(directory: string, names: readonly string[], signal: AbortSignal): Promise<string> {
  const hash = createHash('sha256');
  const buffer = Buffer.alloc(chunkBytes);
  for (const name of names) {
    const file = await open(path.join(directory, name), 'r');
    try {
      const { size } = await file.stat();
      hash.update(`${name} ${size}\n`);
      await digestData(hash, file, buffer, signal);
    } finally {
      await file.close();
    }
  }
  return hash.digest('hex');
}

/** By whole chunks, so that it does not depend on how the filesystem keeps zeroes. */
async function digestData(hash: Hash, file: FileHandle, buffer: Buffer, signal: AbortSignal): Promise<void> {
  for (let piece = nextExtent(file.fd, 0); piece !== undefined; ) {
    const at = piece.start - (piece.start % chunkBytes);
    signal.throwIfAborted();
    const { bytesRead } = await file.read(buffer, 0, chunkBytes, at);
    const chunk = buffer.subarray(0, bytesRead);
    if (!chunk.equals(zeroes.subarray(0, bytesRead))) hash.update(`${at}\n`).update(chunk);
    piece = nextExtent(file.fd, at + chunkBytes);
  }
}

/** Bytes on the disk of the files of a template. */
export function sizeOf(directory: string, names: readonly string[]): number {
  const blocks = names.map((name) => statSync(path.join(directory, name), { throwIfNoEntry: false })?.blocks ?? 0);
  return blocks.reduce((sum, count) => sum + count, 0) * blockBytes;
}

/** Of st_blocks, stat(2). */
const blockBytes = 512;
