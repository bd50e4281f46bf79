/**
 * Files as a stream: the tar format of POSIX.1-2001 (pax), as far as Kiln reads and writes it.
 *
 * Every file is a header of 512 bytes, then its content, filled up to a multiple of 512; two blocks of zeros end the stream.
 * What does not fit into the header comes before it, as a "file" of type x whose content is records
 * ("27 mtime=1700000000.5\n", the length first). Extended attributes are records SCHILY.xattr.<name>, as GNU tar, bsdtar and
 * Go's archive/tar have them; a file with holes comes as GNU tar's sparse format 1.0.
 *
 * Kiln has a reader of its own because what a guest or an image says may be hostile, so each part of a stream has a limit before
 * it is read; because names and attributes are bytes, which libraries take for text (a file's capabilities are none); and
 * because of the holes.
 */

/** One character for each byte of a name, because a name need not be UTF-8: Buffer's "latin1". */
export type BinaryString = string;

export type TarType = 'file' | 'link' | 'symlink' | 'character' | 'block' | 'directory' | 'fifo';

export interface TarEntry {
  /** As it stands in the stream, without a slash at its end. */
  readonly path: BinaryString;
  readonly type: TarType;
  /** Permissions with setuid, setgid and sticky. */
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  /** Nanoseconds since the epoch. */
  readonly mtimeNs: bigint;
  /** Of a file: its whole length in bytes, holes included. */
  readonly size: number;
  /** Of a symlink where it leads; of a hard link the path of the file that it is another name of. */
  readonly target: BinaryString;
  /** Of a device. */
  readonly major: number;
  readonly minor: number;
  readonly xattrs: ReadonlyMap<string, Buffer>;
  /** Of a file whose content does not come, because whoever reads has it from the last time. */
  readonly unchanged: boolean;
}

/** A piece of a file that is no hole. */
export interface Piece {
  readonly offset: number;
  readonly length: number;
}

export const blockBytes = 512;

/** The types that there are, by their letters. */
export const typeLetters: Readonly<Record<TarType, string>> = {
  file: '0',
  link: '1',
  symlink: '2',
  character: '3',
  block: '4',
  directory: '5',
  fifo: '6',
};

export const xattrRecord = 'SCHILY.xattr.';
/** Kiln's own record, with the file's length. Only between kilnd and the agent. */
export const unchangedRecord = 'KILN.unchanged';

export type FilesErrorCode =
  | 'invalid-argument'
  | 'resource-exhausted'
  | 'failed-precondition'
  | 'not-found'
  | 'unimplemented';

/** What is wrong with a stream, or with what it asks for. */
export class FilesError extends Error {
  override readonly name = 'FilesError';
  readonly code: FilesErrorCode;

  constructor(code: FilesErrorCode, message: string) {
    super(message);
    this.code = code;
  }
}

/** A name for a message: short, and without what a terminal would obey. */
export function shown(path: BinaryString): string {
  const text = Buffer.from(path, 'latin1').toString();
  return JSON.stringify(text.length <= 120 ? text : `${text.slice(0, 120)}…`);
}
