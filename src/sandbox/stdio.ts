import type { Readable, Writable } from 'node:stream';

/** The host's side of a container's standard streams; null where the program gets /dev/null. */
export interface ContainerStdio {
  readonly stdin: Readable | null;
  readonly stdout: Writable | null;
  readonly stderr: Writable | null;
  /**
   * The program starts: from here on `stdin` flows. A client that is not there has nothing to send, unless it may return:
   * to a program that was started under an earlier kilnd.
   *
   * @returns whether nothing will come: `stdin` has ended, and is empty
   */
  startStdin(options?: { readonly clientMayReturn?: boolean }): boolean;
  /** No more input will come: `stdin` ends once what was written before is read. */
  closeStdin(): void;
  /** No more output will come: resolves when everything is written and the readers will see the end. */
  finish(): Promise<void>;
  /** Releases everything at once, at any time. */
  dispose(): Promise<void>;
}
