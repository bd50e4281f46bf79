/**
 * A regular file as stdout or stderr (`file:///var/log/x`, or the path of a file that exists).
 *
 * A full disk must not stop the container, nor leave it blocked on a full pipe. So a chunk that cannot be written is
 * dropped, the owner is told once, and writing is tried again with the next chunk.
 */
import { close, constants, openSync, write } from 'node:fs';
import { Writable } from 'node:stream';

export interface FileWriterOptions {
  /** Make the file if it does not exist. Its folder must. */
  readonly create: boolean;
  /** Told of the first of a row of writes that failed. */
  readonly onError: (error: Error) => void;
}

export class FileWriter extends Writable {
  readonly #fd: number;
  readonly #onError: (error: Error) => void;
  #failing = false;
  #idle: Promise<void> = Promise.resolve();

  /** @throws the error of open(2) */
  constructor(path: string, { create, onError }: FileWriterOptions) {
    super();
    const flags = constants.O_WRONLY | constants.O_APPEND | constants.O_NOCTTY | (create ? constants.O_CREAT : 0);
    this.#fd = openSync(path, flags, 0o644);
    this.#onError = onError;
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, callback: () => void): void {
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#idle = promise;
    const writeFrom = (offset: number): void => {
      write(this.#fd, chunk, offset, chunk.length - offset, null, (error, written) => {
        if (error === null && offset + written < chunk.length && !this.destroyed) {
          writeFrom(offset + written);
          return;
        }
        if (error !== null && !this.#failing) this.#onError(error);
        this.#failing = error !== null;
        resolve();
        callback();
      });
    };
    writeFrom(0);
  }

  override _destroy(error: Error | null, callback: (error: Error | null) => void): void {
    // Not while a thread of the pool still writes: the number could name another file by then.
    this.#idle.then(() => close(this.#fd, (closeError) => callback(error ?? closeError)));
  }
}
