import type { Guest } from '../guest/guest.ts';

/** The files of a container that lives, as its processes see them: with its volumes, and all that is mounted in it. */
export interface ContainerFiles {
  /**
   * A file or directory as a tar stream, under its last name. A path that ends with "/." is what is in a directory.
   *
   * @throws KilnError not-found, failed-precondition for what is no directory
   */
  read(path: string): AsyncGenerator<Buffer>;
  /** Puts a tar stream's files into a directory, as root's unless `keepOwners`. What came before an error stays. */
  write(directory: string, stream: AsyncIterable<Buffer>, keepOwners: boolean): Promise<void>;
}

export function filesOf(id: string, guest: Pick<Guest, 'readFiles' | 'writeFiles'>): ContainerFiles {
  return {
    read: (path) => guest.readFiles(id, Buffer.from(path)),
    write: (directory, stream, keepOwners) =>
      guest.writeFiles({ id, path: Buffer.from(directory), keepOwners }, stream),
  };
}
