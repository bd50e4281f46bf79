/**
 * The kernel's own word of what changes in a network namespace: rtnetlink(7) sends a message to each multicast group for every
 * interface, address or route that comes, changes or goes. Nobody reads here what they say: each is a sign to look.
 */
import { closeSync } from 'node:fs';
import { check, declare } from '../libc.ts';
import { socketFromDevice } from '../terminal.ts';

/** bits/socket.h and linux/netlink.h. */
const AF_NETLINK = 16;
const SOCK_RAW = 3;
const SOCK_CLOEXEC = 0o2000000;
const SOCK_NONBLOCK = 0o4000;
const NETLINK_ROUTE = 0;

/** linux/rtnetlink.h, RTMGRP_*: LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE. Neighbours are learned all the time. */
const groups = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;

/** struct sockaddr_nl: family, padding (2 bytes each), port id (0: the kernel's choice) and groups (4 each). */
const SOCKADDR_NL_SIZE = 12;

const cSocket = declare<[domain: number, type: number, protocol: number]>(
  'int socket(int domain, int type, int protocol)',
);
const cBind = declare<[fd: number, address: Uint8Array, length: number]>(
  'int bind(int sockfd, const uint8_t *addr, unsigned int addrlen)',
);

/** A socket that gets these messages of the namespace in which this thread is, for `watchNetwork`. @throws SysError */
export function openNetworkMonitor(): number {
  const fd = check(cSocket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_ROUTE), 'socket', 'AF_NETLINK');
  try {
    const address = Buffer.alloc(SOCKADDR_NL_SIZE);
    address.writeUInt16LE(AF_NETLINK, 0);
    address.writeUInt32LE(groups, 8);
    check(cBind(fd, address, address.length), 'bind', 'AF_NETLINK');
    return fd;
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

/**
 * Calls `onChange` for each message, until it is disposed of. Takes the descriptor over.
 *
 * @param onLost called once when messages were lost (ENOBUFS): somebody has to look, and to watch with a new socket
 */
export function watchNetwork(fd: number, onChange: () => void, onLost: () => void): Disposable {
  const socket = socketFromDevice(fd, 'read');
  socket.on('data', onChange);
  socket.on('error', onLost);
  socket.unref();
  return {
    [Symbol.dispose]: () =>
      void socket
        .off('error', onLost)
        .on('error', () => {})
        .destroy(),
  };
}
