import { type BigIntStats, fstatSync, lstatSync, readdirSync, rmdirSync, unlinkSync } from 'node:fs';
import { Place } from '../files/place.ts';
import type { BinaryString } from '../files/tar-entry.ts';
import type { NamedMarks } from '../files/unpack.ts';

const prefix = '.wh.';
const opaqueMarker = '.wh..wh..opq';

/** Whiteouts of one layer, which hide what the layers below have, and nothing of its own, in whatever order they come. */
export class Whiteouts implements NamedMarks {
  readonly #own = new Set<string>();

  made(directory: Place, name: BinaryString): void {
    this.#own.add(keyOf(directory, name));
  }

  obey(directory: Place, name: BinaryString): boolean {
    if (!name.startsWith(prefix)) return false;
    const hidden = name.slice(prefix.length);
    if (name === opaqueMarker) this.#hideAll(directory);
    // Others that begin so are aufs's own affairs: image-spec, layer.md "Whiteouts".
    else if (!['', '.', '..'].includes(hidden) && !hidden.startsWith(prefix)) this.#hide(directory, hidden);
    return true;
  }

  #hideAll(directory: Place): void {
    for (const name of readdirSync(`/proc/self/fd/${directory.fd}`, 'latin1')) this.#hide(directory, name);
  }

  #hide(directory: Place, name: BinaryString): void {
    const file = directory.at(name);
    const stats = lstatSync(file, { throwIfNoEntry: false });
    if (stats === undefined) return;
    const isOwn = this.#own.has(keyOf(directory, name));
    if (!stats.isDirectory()) {
      if (!isOwn) unlinkSync(file);
      return;
    }
    using inner = Place.open(directory.fd, name, 'beneath');
    this.#hideAll(inner);
    // One that was not in the layer may have files of it.
    if (!isOwn && readdirSync(`/proc/self/fd/${inner.fd}`).length === 0) rmdirSync(file);
  }
}

/** A name in a directory, whatever links have led there. */
function keyOf(directory: Place, name: BinaryString): string {
  const { dev, ino }: BigIntStats = fstatSync(directory.fd, { bigint: true });
  return `${dev}:${ino}/${name}`;
}
