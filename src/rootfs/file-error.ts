import { type ErrorCode, KilnError } from '../errors.ts';

const codes: Readonly<Record<string, ErrorCode>> = {
  ENOENT: 'not-found',
  ENOTDIR: 'not-found',
  EACCES: 'permission-denied',
  EPERM: 'permission-denied',
  ENOSPC: 'resource-exhausted',
  EDQUOT: 'resource-exhausted',
};

const reasons: Readonly<Record<string, string>> = {
  ENOENT: 'it does not exist',
  ENOTDIR: 'a part of its path is not a directory',
  EACCES: 'permission denied',
  EPERM: 'operation not permitted',
  ENOSPC: 'the disk is full',
  EDQUOT: 'the disk quota is used up',
  EROFS: 'the filesystem is read-only',
  ELOOP: 'it is a symbolic link',
  EEXIST: 'it already exists',
};

/** A failed file operation as a KilnError; what is not one goes through unchanged. */
export function fileError(error: unknown, message: string): unknown {
  const code = errnoCode(error);
  if (code === undefined) return error;
  return new KilnError(codes[code] ?? 'internal', `${message}: ${reasons[code] ?? code}`, { cause: error });
}

/** The symbolic errno of a thrown value, if it has one. */
export function errnoCode(error: unknown): string | undefined {
  if (!(error instanceof Error) || error instanceof KilnError || !('syscall' in error)) return undefined;
  const { code } = error as NodeJS.ErrnoException;
  return code;
}
