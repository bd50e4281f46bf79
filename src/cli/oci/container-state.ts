/**
 * What the command line keeps of a container: `<root>/<id>/state.json`, and beside it the FIFOs of its stdio. The folder is
 * made first, which only one can; the file comes when the container exists.
 */
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import path from 'node:path';
import { z } from 'zod';
import { KilnError } from '../../errors.ts';
import { replaceFile } from '../../host/replace-file.ts';

const containerState = z.object({
  ociVersion: z.string(),
  id: z.string(),
  /** The process on the host that stands for it. */
  pid: z.int().positive(),
  /** Absolute. */
  bundle: z.string(),
  rootfs: z.string(),
  /** RFC 3339. */
  created: z.string(),
  annotations: z.record(z.string(), z.string()).optional(),
  /** Uid of who has created it. */
  owner: z.int().nonnegative(),
  /** The socket of its task service. */
  address: z.string(),
});
export type ContainerState = Readonly<z.infer<typeof containerState>>;

const fileName = 'state.json';

/** runc's rule, and what a folder's name can hold. */
const idPattern = /^[\w+.-]{1,255}$/;

/** @throws KilnError invalid-argument, in runc's words */
export function requireId(id: string): void {
  if (id === '') throw new KilnError('invalid-argument', 'container id cannot be empty');
  if (idPattern.test(id) && id !== '.' && id !== '..') return;
  throw new KilnError('invalid-argument', `invalid container ID format: ${JSON.stringify(id.slice(0, 80))}`, {
    hint: 'it has 1 to 255 letters, digits, "_", "+", "-" or "."',
  });
}

/** As `mkdir -p`. Node's own tries for ever where a folder cannot be made although the one above is there, as in /proc. */
function makeFolders(folder: string, mode: number): void {
  const above = path.dirname(folder);
  if (!existsSync(above)) makeFolders(above, mode);
  try {
    mkdirSync(folder, { mode });
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
  }
}

export function idInUse(id: string): KilnError {
  return new KilnError('already-exists', `container with given ID already exists: ${id}`);
}

/** The containers below one `--root`. */
export class ContainerStates {
  readonly root: string;

  constructor(root: string) {
    this.root = path.resolve(root);
  }

  directory(id: string): string {
    requireId(id);
    return path.join(this.root, id);
  }

  /** Takes the id. @throws KilnError already-exists */
  claim(id: string): string {
    const directory = this.directory(id);
    try {
      makeFolders(this.root, 0o711);
      mkdirSync(directory, { mode: 0o700 });
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code === 'EEXIST') throw idInUse(id);
      throw new KilnError('failed-precondition', `cannot keep the state of container ${id} in ${this.root}: ${code}`, {
        hint: 'choose another folder with --root',
        cause: error,
      });
    }
    return directory;
  }

  write(state: ContainerState): void {
    replaceFile(path.join(this.directory(state.id), fileName), JSON.stringify(state));
  }

  /** @throws KilnError not-found, in runc's words; failed-precondition for a file that is no state */
  read(id: string): ContainerState {
    const file = path.join(this.directory(id), fileName);
    let text: string;
    try {
      text = readFileSync(file, 'utf8');
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code === 'ENOENT' || code === 'ENOTDIR') throw new KilnError('not-found', 'container does not exist');
      throw new KilnError('failed-precondition', `cannot read ${file}: ${code}`, { cause: error });
    }
    try {
      return containerState.parse(JSON.parse(text));
    } catch (cause) {
      throw new KilnError('failed-precondition', `${file} is not the state of a container`, {
        hint: `remove what is left of it with: kiln delete --force ${id}`,
        cause,
      });
    }
  }

  /** Gives the id back. What is missing is no error. */
  remove(id: string): void {
    rmSync(this.directory(id), { recursive: true, force: true });
  }

  /** Ids of all that exist, sorted. */
  ids(): string[] {
    try {
      const entries = readdirSync(this.root, { withFileTypes: true });
      return entries.flatMap((entry) => (entry.isDirectory() && idPattern.test(entry.name) ? [entry.name] : [])).sort();
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
      throw error;
    }
  }
}
