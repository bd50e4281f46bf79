/**
 * A layer of an image: a tar whose files go on top of what the layers below have left. image-spec, layer.md: a file
 * `.wh.NAME` removes NAME of the layers below, and `.wh..wh..opq` all that they have in its folder; a folder that is there
 * stays, with its attributes changed; anything else that is there is replaced.
 */
import { constants, openSync } from 'node:fs';
import type { Readable } from 'node:stream';
import { KilnError } from '../errors.ts';
import { Place } from '../files/place.ts';
import { type BinaryString, shown } from '../files/tar-entry.ts';
import { describeLeftOut, unpackFiles } from '../files/unpack.ts';
import { Whiteouts } from './whiteouts.ts';

/** Attributes that mean on the host's disk what they mean in a container. trusted.* would speak to the host's overlayfs. */
const attribute = /^(security\.capability|user\..+)$/s;

export interface LayerTarget {
  /** Where the image's root is. */
  readonly root: string;
  /** Told of what was left out. */
  readonly warn: (message: string) => void;
}

/**
 * Puts a layer on top of the folder. Links mean what they would in a container, whose root it is, and none leads out.
 *
 * @param tar uncompressed
 * @throws KilnError invalid-argument for a tar that is damaged, or wants to leave the folder; resource-exhausted for a disk
 *   that is full
 */
export async function applyLayer(tar: Readable, { root, warn }: LayerTarget): Promise<void> {
  using top = new Place(openSync(root, constants.O_DIRECTORY | constants.O_RDONLY));
  const leaveOut = (name: string, path: BinaryString, why = ''): undefined => {
    warn(`${shown(path)}: its attribute ${shown(name)} is left out${why}`);
  };
  try {
    const unpacked = await unpackFiles(tar, top, {
      walk: 'in-root',
      makesParents: true,
      taken: 'replace',
      marks: 'refuse',
      namedMarks: new Whiteouts(),
      devices: 'leave-out',
      xattr: (name, _value, path) => (attribute.test(name) ? name : leaveOut(name, path)),
      unkept: (name, path) => leaveOut(name, path, ': the filesystem of the bundle has none such'),
      rename: plain,
      end: 'optional',
    });
    if (unpacked.leftOutCount > 0) warn(`device nodes of an image are left out: ${describeLeftOut(unpacked)}`);
  } catch (error) {
    throw damaged(error);
  } finally {
    tar.destroy();
  }
}

/** Names in images may begin at the root. One with ".." stays what it is, and is refused. */
function plain(path: BinaryString): BinaryString {
  return path
    .split('/')
    .filter((part) => part !== '' && part !== '.')
    .join('/');
}

function damaged(error: unknown): KilnError {
  const { code, message } = error as NodeJS.ErrnoException;
  if (code === 'ENOSPC' || code === 'EDQUOT') {
    return new KilnError('resource-exhausted', 'there is no room to unpack the image', { cause: error });
  }
  return new KilnError('invalid-argument', `cannot unpack a layer of the image: ${message}`, { cause: error });
}
