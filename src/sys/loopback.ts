/**
 * Sockets for loopback addresses of the network namespace in which this thread is: ip(7), ipv6(7), tcp(7), udp(7). Node makes
 * its own ones later, when the thread may be in another namespace.
 */
import { closeSync } from 'node:fs';
import { check, declare } from './libc.ts';

/** bits/socket.h of Linux. */
const AF_INET = 2;
const AF_INET6 = 10;
const SOCK_STREAM = 1;
const SOCK_DGRAM = 2;
const SOCK_CLOEXEC = 0o2000000;
const SOCK_NONBLOCK = 0o4000;
const SOL_SOCKET = 1;
const SO_REUSEADDR = 2;
/** linux/in.h. */
const IPPROTO_IP = 0;
const IP_FREEBIND = 15;

export type LoopbackFamily = 'ipv4' | 'ipv6';

const cSocket = declare<[domain: number, type: number, protocol: number]>(
  'int socket(int domain, int type, int protocol)',
);
const cSetsockopt = declare<[fd: number, level: number, name: number, value: Int32Array, length: number]>(
  'int setsockopt(int sockfd, int level, int optname, const int *optval, unsigned int optlen)',
);
const cBind = declare<[fd: number, address: Uint8Array, length: number]>(
  'int bind(int sockfd, const uint8_t *addr, unsigned int addrlen)',
);

/**
 * A socket that is not bound.
 *
 * @returns a non-blocking, close-on-exec descriptor; the caller closes it
 * @throws SysError EAFNOSUPPORT where there is no IPv6
 */
export function openSocket(family: LoopbackFamily, transport: 'tcp' | 'udp'): number {
  const domain = family === 'ipv4' ? AF_INET : AF_INET6;
  const type = transport === 'tcp' ? SOCK_STREAM : SOCK_DGRAM;
  return check(cSocket(domain, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), 'socket', `${family} ${transport}`);
}

/**
 * A socket that is bound to 127.0.0.1 or ::1, for `net.Server.listen`. The interface `lo` need not be up.
 *
 * @returns a non-blocking, close-on-exec descriptor; the caller closes it
 * @throws SysError EADDRINUSE; EAFNOSUPPORT where there is no IPv6
 */
export function bindLoopback(family: LoopbackFamily, port: number): number {
  const name = family === 'ipv4' ? `127.0.0.1:${port}` : `[::1]:${port}`;
  const fd = openSocket(family, 'tcp');
  try {
    const on = Int32Array.of(1);
    // Connections of an earlier listener may not have ended.
    check(cSetsockopt(fd, SOL_SOCKET, SO_REUSEADDR, on, on.byteLength), 'setsockopt', 'SO_REUSEADDR');
    check(cSetsockopt(fd, IPPROTO_IP, IP_FREEBIND, on, on.byteLength), 'setsockopt', 'IP_FREEBIND');
    const address = sockaddr(family, port);
    check(cBind(fd, address, address.length), 'bind', name);
    return fd;
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

/** struct sockaddr_in of ip(7), or struct sockaddr_in6 of ipv6(7), whose address has four bytes of flow information before it. */
function sockaddr(family: LoopbackFamily, port: number): Buffer {
  const bytes = Buffer.alloc(family === 'ipv4' ? 16 : 28);
  bytes.writeUInt16LE(family === 'ipv4' ? AF_INET : AF_INET6, 0);
  bytes.writeUInt16BE(port, 2);
  if (family === 'ipv4') bytes.set([127, 0, 0, 1], 4);
  else bytes.writeUInt8(1, 8 + 15);
  return bytes;
}
