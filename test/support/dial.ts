/** A connection as containerd makes it for CRI's port-forward: it enters a network namespace and dials localhost there. */
import { closeSync } from 'node:fs';
import { Socket } from 'node:net';
import { check, declare } from '../../src/sys/libc.ts';
import { NetworkNamespace } from '../../src/sys/netns.ts';

const cSocket = declare<[domain: number, type: number, protocol: number]>(
  'int socket(int domain, int type, int protocol)',
);
const cConnect = declare<[fd: number, address: Uint8Array, length: number]>(
  'int connect(int sockfd, const uint8_t *addr, unsigned int addrlen)',
);

/** bits/socket.h of Linux. */
const AF_INET = 2;
const AF_INET6 = 10;
const SOCK_STREAM = 1;
const SOCK_CLOEXEC = 0o2000000;

/**
 * A connection to 127.0.0.1 or ::1 of the namespace; the kernel answers at once.
 *
 * @throws SysError ECONNREFUSED
 */
export function dialIn(namespacePath: string, host: '127.0.0.1' | '::1', port: number): Socket {
  using namespace = NetworkNamespace.open(namespacePath);
  const isFour = host === '127.0.0.1';
  const address = Buffer.alloc(isFour ? 16 : 28);
  address.writeUInt16LE(isFour ? AF_INET : AF_INET6, 0);
  address.writeUInt16BE(port, 2);
  if (isFour) address.set([127, 0, 0, 1], 4);
  else address.writeUInt8(1, 23);
  const fd = namespace.run(() => check(cSocket(isFour ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0), 'socket'));
  try {
    check(cConnect(fd, address, address.length), 'connect', `${host}:${port}`);
  } catch (error) {
    closeSync(fd);
    throw error;
  }
  return new Socket({ fd, readable: true, writable: true, allowHalfOpen: true });
}
