import { check, declare } from './libc.ts';

const cMkfifo = declare<[path: string, mode: number]>('int mkfifo(const char *pathname, unsigned int mode)');

/** mkfifo(3): makes a FIFO; the umask takes from its mode. @throws SysError EEXIST, ENOENT */
export function mkfifo(path: string, mode: number): void {
  check(cMkfifo(path, mode), 'mkfifo', path);
}
