import { constants } from 'node:os';
import { getSystemErrorMap } from 'node:util';

/**
 * A system call that failed: what `errno` said, which call it was, and the path it was about.
 *
 * The fields are named as on Node's own system errors, so that callers can treat both alike (`error.code === 'ENOENT'`).
 */
export class SysError extends Error {
  override readonly name = 'SysError';
  /** The errno's name, for example `ENOENT`; `E` and the number for one that is not in errno(3). */
  readonly code: string;
  /** The errno's number, positive. */
  readonly errno: number;
  /** The name of the call's man page, for example `mount`. */
  readonly syscall: string;
  /** The path or address the call was about. */
  readonly path: string | undefined;

  constructor(errno: number, syscall: string, path?: string) {
    // Node's table of names is complete; libuv's of texts (keyed by negative errno) lacks some, for example ECHILD.
    const code = Object.entries(constants.errno).find(([, value]) => value === errno)?.[0] ?? `E${errno}`;
    const text = getSystemErrorMap().get(-errno)?.[1] ?? 'system error';
    super(`${code}: ${text}, ${syscall}${path === undefined ? '' : ` '${path}'`}`);
    this.code = code;
    this.errno = errno;
    this.syscall = syscall;
    this.path = path;
  }
}
