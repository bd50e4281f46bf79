import { check, declare } from './libc.ts';

/** fcntl.h and linux/fs.h. */
const AT_FDCWD = -100;
const RENAME_EXCHANGE = 2;

const cRenameat2 = declare<[olddirfd: number, oldpath: string, newdirfd: number, newpath: string, flags: number]>(
  'int renameat2(int olddirfd, const char *oldpath, int newdirfd, const char *newpath, unsigned int flags)',
);

/** renameat2(2) with RENAME_EXCHANGE: each gets the other's name, in one step. @throws SysError ENOENT, EXDEV, EINVAL */
export function exchange(one: string, other: string): void {
  check(cRenameat2(AT_FDCWD, one, AT_FDCWD, other, RENAME_EXCHANGE), 'renameat2', one);
}
