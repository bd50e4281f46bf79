import { constants } from 'node:os';
import { check, declare } from './libc.ts';

/** prctl(2), from linux/prctl.h. */
const PR_SET_CHILD_SUBREAPER = 36;

/** waitid(2): which children (sys/wait.h) and options (linux/wait.h). */
const P_ALL = 0;
const P_PID = 1;
const WNOHANG = 1;
const WEXITED = 4;
const WNOWAIT = 0x01000000;

/** siginfo_t on 64-bit Linux (asm-generic/siginfo.h): 128 bytes, these at the given byte offsets. */
const SIGINFO_SIZE = 128;
const SI_CODE = 8;
const SI_PID = 16;
const SI_STATUS = 24;
/** si_code of a child that called exit(2); any other code of a finished child means a signal. */
const CLD_EXITED = 1;

const cPrctl = declare<[number, number, number, number, number]>(
  'int prctl(int op, unsigned long arg2, unsigned long arg3, unsigned long arg4, unsigned long arg5)',
);
const cWaitid = declare<[idtype: number, id: number, infop: Int32Array, options: number]>(
  'int waitid(int idtype, unsigned int id, int32_t *infop, int options)',
);
const cSethostname = declare<[name: string, length: number]>('int sethostname(const char *name, size_t len)');

/** "SIGKILL" for 9; undefined where signal(7) has no name for it. */
export function signalName(signal: number): NodeJS.Signals | undefined {
  const found = Object.entries(constants.signals).find(([, number]) => number === signal);
  return found?.[0] as NodeJS.Signals | undefined;
}

/** How a child ended. */
export type Exit =
  | { readonly kind: 'exited'; readonly code: number }
  | { readonly kind: 'signaled'; readonly signal: number };

/**
 * prctl(2), PR_SET_CHILD_SUBREAPER: orphans among our descendants become our children, and are ours to wait for.
 *
 * @throws SysError
 */
export function becomeChildSubreaper(): void {
  check(cPrctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), 'prctl', 'PR_SET_CHILD_SUBREAPER');
}

/**
 * waitid(2) for one child, without blocking. When the child has ended, this takes it away: its id can be used again.
 *
 * @returns null while it still runs
 * @throws SysError ECHILD when it is no child of ours (or has been waited for)
 */
export function waitpid(pid: number): Exit | null {
  const info = new Int32Array(SIGINFO_SIZE / 4);
  check(cWaitid(P_PID, pid, info, WEXITED | WNOHANG), 'waitid', `pid ${pid}`);
  if (info[SI_PID / 4] === 0) return null;
  const status = info[SI_STATUS / 4] ?? 0;
  return info[SI_CODE / 4] === CLD_EXITED ? { kind: 'exited', code: status } : { kind: 'signaled', signal: status };
}

/**
 * waitid(2) with WNOWAIT: the id of some child that has ended, which stays to be waited for.
 *
 * @returns null when no child has ended, or there are no children
 */
export function peekEndedChild(): number | null {
  const info = new Int32Array(SIGINFO_SIZE / 4);
  if (cWaitid(P_ALL, 0, info, WEXITED | WNOHANG | WNOWAIT) === -1) return null;
  const pid = info[SI_PID / 4] ?? 0;
  return pid === 0 ? null : pid;
}

/** sethostname(2): the name of this UTS namespace. @throws SysError */
export function sethostname(name: string): void {
  check(cSethostname(name, Buffer.byteLength(name)), 'sethostname', name);
}
