/**
 * Descriptors that another process sends over a Unix socket: unix(7), SCM_RIGHTS; cmsg(3).
 *
 * Node can neither listen without its event loop nor receive a descriptor, so both are done with libc. The sender may
 * connect, send and go before we look: connection and message wait in the socket.
 */
import { closeSync } from 'node:fs';
import koffi from 'koffi';
import { check, declare } from './libc.ts';

/** bits/socket.h of Linux. */
const AF_UNIX = 1;
const SOCK_STREAM = 1;
/** Also O_NONBLOCK of open(2). */
const SOCK_NONBLOCK = 0o4000;
const SOCK_CLOEXEC = 0o2000000;
const F_GETFL = 3;
const F_SETFL = 4;
const SOL_SOCKET = 1;
const SCM_RIGHTS = 1;
const MSG_DONTWAIT = 0x40;
const MSG_CMSG_CLOEXEC = 0x40000000;

/** sun_path of struct sockaddr_un, with its NUL. */
const SUN_PATH_SIZE = 108;

/** struct msghdr and struct cmsghdr on 64-bit Linux: sizes, and the offsets of the fields that are used. */
const MSGHDR_SIZE = 56;
const MSG_IOV = 16;
const MSG_IOVLEN = 24;
const MSG_CONTROL = 32;
const MSG_CONTROLLEN = 40;
const CMSG_LEVEL = 8;
const CMSG_TYPE = 12;
const CMSG_DATA = 16;
/** CMSG_SPACE of one descriptor. */
const CONTROL_SIZE = 24;
/** The message's own bytes are of no interest, but there must be some; the sender chooses how many. */
const PAYLOAD_SIZE = 4096;

const cSocket = declare<[domain: number, type: number, protocol: number]>(
  'int socket(int domain, int type, int protocol)',
);
const cBind = declare<[fd: number, address: Uint8Array, length: number]>(
  'int bind(int sockfd, const uint8_t *addr, unsigned int addrlen)',
);
const cListen = declare<[fd: number, backlog: number]>('int listen(int sockfd, int backlog)');
const cConnect = declare<[fd: number, address: Uint8Array, length: number]>(
  'int connect(int sockfd, const uint8_t *addr, unsigned int addrlen)',
);
const cFcntl = declare<[fd: number, op: number, argument: number]>('int fcntl(int fd, int op, int argument)');
const cAccept4 = declare<[fd: number, address: null, length: null, flags: number]>(
  'int accept4(int sockfd, void *addr, void *addrlen, int flags)',
);
const cRecvmsg = declare<[fd: number, message: Uint8Array, flags: number]>(
  'int recvmsg(int sockfd, uint8_t *msg, int flags)',
);

/**
 * A Unix socket that listens on `path`: for one who sends a descriptor, or for another process to accept on.
 *
 * @returns a non-blocking descriptor; the caller closes it and removes the file
 * @throws SysError; RangeError for a path of over 107 bytes
 */
export function listenForPeers(path: string): number {
  return newSocket(path, (fd, address, length) => {
    check(cBind(fd, address, length), 'bind', path);
    check(cListen(fd, 1), 'listen', path);
  });
}

/**
 * A connection to who listens on `path`, for another process. It is there at once: it waits at the listener to be accepted.
 *
 * @returns a blocking, close-on-exec descriptor; the caller closes it
 * @throws SysError ECONNREFUSED or ENOENT where nobody listens, EAGAIN where too many wait; RangeError as above
 */
export function connectToPeer(path: string): number {
  return newSocket(path, (fd, address, length) => {
    check(cConnect(fd, address, length), 'connect', path);
    setBlocking(fd);
  });
}

/** fcntl(2), F_SETFL without O_NONBLOCK: of the open file, so for all who have it. @throws SysError */
export function setBlocking(fd: number): void {
  const flags = check(cFcntl(fd, F_GETFL, 0), 'fcntl', 'F_GETFL');
  check(cFcntl(fd, F_SETFL, flags & ~SOCK_NONBLOCK), 'fcntl', 'F_SETFL');
}

function newSocket(path: string, use: (fd: number, address: Uint8Array, length: number) => void): number {
  const name = Buffer.from(path);
  const address = Buffer.alloc(2 + SUN_PATH_SIZE);
  address.writeUInt16LE(AF_UNIX, 0);
  if (name.length >= SUN_PATH_SIZE) throw new RangeError(`the socket path ${path} is too long`);
  address.set(name, 2);
  const fd = check(cSocket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), 'socket');
  try {
    use(fd, address, 2 + name.length + 1);
    return fd;
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

/**
 * The descriptor that somebody has connected to the listener and sent; nothing waits for it.
 *
 * @returns close-on-exec; the caller closes it
 * @throws SysError EAGAIN when there is none
 */
export function receiveFd(listener: number): number {
  const connection = check(cAccept4(listener, null, null, SOCK_CLOEXEC), 'accept4');
  try {
    const payload = Buffer.alloc(PAYLOAD_SIZE);
    const control = Buffer.alloc(CONTROL_SIZE);
    const iov = Buffer.alloc(16);
    iov.writeBigUInt64LE(koffi.address(payload), 0);
    iov.writeBigUInt64LE(BigInt(payload.length), 8);
    const message = Buffer.alloc(MSGHDR_SIZE);
    message.writeBigUInt64LE(koffi.address(iov), MSG_IOV);
    message.writeBigUInt64LE(1n, MSG_IOVLEN);
    message.writeBigUInt64LE(koffi.address(control), MSG_CONTROL);
    message.writeBigUInt64LE(BigInt(control.length), MSG_CONTROLLEN);
    check(cRecvmsg(connection, message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC), 'recvmsg');
    const received = message.readBigUInt64LE(MSG_CONTROLLEN) > 0n;
    if (!received || control.readInt32LE(CMSG_LEVEL) !== SOL_SOCKET || control.readInt32LE(CMSG_TYPE) !== SCM_RIGHTS) {
      throw new Error('a message came without a file descriptor');
    }
    return control.readInt32LE(CMSG_DATA);
  } finally {
    closeSync(connection);
  }
}
