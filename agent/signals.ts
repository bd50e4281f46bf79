/** Which signals mean what, where the kernel alone would not do what users expect. */
import { constants } from 'node:os';

const s = constants.signals;

/**
 * What ends a container that waits for its start, beside SIGKILL: the signals that runc's waiting init dies of. crun's
 * has no handler and is the first of its PID namespace, so the kernel would drop them (pid_namespaces(7)), and whoever
 * sent SIGTERM would wait in vain.
 */
export const deadlyBeforeStart: ReadonlySet<number> = new Set([
  ...[s.SIGHUP, s.SIGINT, s.SIGQUIT, s.SIGILL, s.SIGTRAP, s.SIGABRT],
  ...[s.SIGBUS, s.SIGFPE, s.SIGSEGV, s.SIGTERM, s.SIGSTKFLT, s.SIGSYS],
]);
