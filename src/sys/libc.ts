/**
 * How the other files of this folder reach the C library.
 *
 * Nothing is loaded before the first call: importing a file of `sys/` costs nothing, and only the symbols that are
 * really called are looked up (the guest runs under slow emulation, where each lookup counts).
 */
import koffi, { type LibraryHandle } from 'koffi';
import { SysError } from './error.ts';

/** What crosses the boundary: numbers, strings (copied, null is NULL), arrays of these, and memory that C reads or writes in place. */
type Argument = number | bigint | string | null | readonly (string | null)[] | NodeJS.ArrayBufferView;

/** A C function that returns an int. */
export interface CFunction<Arguments extends Argument[]> {
  /** Calls it on this thread. */
  (...args: Arguments): number;
  /** Calls it on a thread of libuv's pool, for calls that can take long. @throws SysError when it returned -1 */
  readonly promise: (syscall: string, path: string | undefined, ...args: Arguments) => Promise<number>;
}

let libc: LibraryHandle | undefined;

/**
 * Declares a C function; it is looked up when it is called first.
 *
 * @param definition its C prototype, as the man page has it
 */
export function declare<Arguments extends Argument[]>(definition: string): CFunction<Arguments> {
  let resolved: ReturnType<LibraryHandle['func']> | undefined;
  const resolve = () => {
    if (resolved === undefined) {
      libc ??= koffi.load('libc.so.6');
      resolved = libc.func(definition);
    }
    return resolved;
  };
  const call = (...args: Arguments): number => resolve()(...args);
  const promise = (syscall: string, path: string | undefined, ...args: Arguments): Promise<number> =>
    new Promise((done, fail) => {
      resolve().async(...args, (error: Error | null, result: number) => {
        // koffi has only the addresses of memory: so long that is held here.
        args.length = 0;
        if (error !== null) fail(error);
        // koffi carries the worker thread's errno over to the callback.
        else if (result === -1) fail(new SysError(koffi.errno(), syscall, path));
        else done(result);
      });
    });
  return Object.assign(call, { promise });
}

/** The errno of the call that was made last on this thread. Read it before anything else is called. */
export function errno(): number {
  return koffi.errno();
}

/**
 * The result of a call, for the calls that return -1 on failure.
 *
 * @throws SysError
 */
export function check(result: number, syscall: string, path?: string): number {
  if (result === -1) throw new SysError(koffi.errno(), syscall, path);
  return result;
}
