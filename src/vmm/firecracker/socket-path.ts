import { closeSync, constants, fstatSync, openSync } from 'node:fs';
import { KilnError } from '../../errors.ts';

/** open(2) on Linux: a descriptor that names a file, and no more. Node has no name for it. */
const O_PATH = 0o10000000;

/** A socket's file by its descriptor. */
export interface HeldSocket extends Disposable {
  /** A path for connect(2) that leads to this file, whatever is under its name by then: proc(5), /proc/self/fd. */
  readonly path: string;
}

/**
 * Takes hold of a socket that lies where somebody else may have put a link to another program's.
 *
 * @throws KilnError unavailable when there is no socket of that name
 */
export function holdSocket(file: string): HeldSocket {
  const fd = open(file);
  const held = { path: `/proc/self/fd/${fd}`, [Symbol.dispose]: () => closeSync(fd) };
  if (fstatSync(fd).isSocket()) return held;
  held[Symbol.dispose]();
  throw new KilnError('unavailable', `${file} is no socket`);
}

function open(file: string): number {
  try {
    return openSync(file, O_PATH | constants.O_NOFOLLOW);
  } catch (cause) {
    throw new KilnError('unavailable', `there is no socket ${file}: ${(cause as NodeJS.ErrnoException).code}`, {
      cause,
    });
  }
}
