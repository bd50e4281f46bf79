import { check, declare } from '../../src/sys/libc.ts';

/** bits/socket.h of Linux. */
const AF_UNIX = 1;
const SOCK_STREAM = 1;
const SOCK_CLOEXEC = 0o2000000;

const cSocketpair = declare<[domain: number, type: number, protocol: number, sv: Int32Array]>(
  'int socketpair(int domain, int type, int protocol, int *sv)',
);

/** socketpair(2): two descriptors, each the caller's to close. */
export function socketPair(): [number, number] {
  const fds = new Int32Array(2);
  check(cSocketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 'socketpair');
  return [fds[0]!, fds[1]!];
}
