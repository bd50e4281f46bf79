/**
 * AF_VSOCK, vsock(7): sockets between a virtual machine and its host. An address is a context id (CID: 2 is the host,
 * each guest has one of its own) and a 32-bit port. There is no name service, no routing and no loss: a stream socket
 * works like TCP's, minus TCP's options.
 *
 * Node knows only TCP and Unix sockets, but its TCP handle works on any stream socket that libuv can put into epoll. So
 * the socket is made here with libc, and its descriptor is opened by a handle of `process.binding('tcp_wrap')`, the one
 * internal module of Node that this project uses.
 */
import { closeSync } from 'node:fs';
import { createServer, type Server, type ServerOpts, Socket } from 'node:net';
import { SysError } from './error.ts';
import { type CFunction, check, declare } from './libc.ts';

/** The host, seen from a guest (linux/vm_sockets.h). */
export const VMADDR_CID_HOST = 2;
/** Any address of this machine, to listen on (linux/vm_sockets.h). */
export const VMADDR_CID_ANY = 0xffffffff;
/** A free port above 1023 of the kernel's choice, to listen on (linux/vm_sockets.h). */
export const VMADDR_PORT_ANY = 0xffffffff;

/** bits/socket.h of Linux. */
const AF_VSOCK = 40;
const SOCK_STREAM = 1;
const SOCK_CLOEXEC = 0o2000000;
/** Connections that wait to be accepted; listen(2). */
const BACKLOG = 128;

/** struct sockaddr_vm of linux/vm_sockets.h: family, reserved (2 bytes each), port, cid (4 each), 4 more of flags and zero. */
const SOCKADDR_VM_SIZE = 16;

const cSocket = declare<[domain: number, type: number, protocol: number]>(
  'int socket(int domain, int type, int protocol)',
);
type AddressArguments = [fd: number, address: Uint8Array, length: number];
const cConnect = declare<AddressArguments>('int connect(int sockfd, const uint8_t *addr, unsigned int addrlen)');
const cBind = declare<AddressArguments>('int bind(int sockfd, const uint8_t *addr, unsigned int addrlen)');
const cListen = declare<[fd: number, backlog: number]>('int listen(int sockfd, int backlog)');
type NameArguments = [fd: number, address: Uint8Array, length: Uint32Array];
const cGetsockname = declare<NameArguments>('int getsockname(int sockfd, uint8_t *addr, uint32_t *addrlen)');
const cGetpeername = declare<NameArguments>('int getpeername(int sockfd, uint8_t *addr, uint32_t *addrlen)');

export interface VsockAddress {
  readonly cid: number;
  readonly port: number;
}

/** The bytes of a struct sockaddr_vm (little-endian on every architecture that Kiln knows). */
export function sockaddrVm(cid: number, port: number): Uint8Array {
  const bytes = new DataView(new ArrayBuffer(SOCKADDR_VM_SIZE));
  bytes.setUint16(0, AF_VSOCK, true);
  bytes.setUint32(4, port, true);
  bytes.setUint32(8, cid, true);
  return new Uint8Array(bytes.buffer);
}

/** The address in the bytes of a struct sockaddr_vm. */
export function parseSockaddrVm(bytes: Uint8Array): VsockAddress {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return { port: view.getUint32(4, true), cid: view.getUint32(8, true) };
}

function readName(read: CFunction<NameArguments>, syscall: string, fd: number): VsockAddress {
  const bytes = new Uint8Array(SOCKADDR_VM_SIZE);
  check(read(fd, bytes, new Uint32Array([SOCKADDR_VM_SIZE])), syscall, `fd ${fd}`);
  return parseSockaddrVm(bytes);
}

interface TcpHandle {
  readonly fd: number;
  open(fd: number): number;
}
interface TcpWrap {
  readonly TCP: new (kind: number) => TcpHandle;
  readonly constants: { readonly SOCKET: number; readonly SERVER: number };
}

function wrap(fd: number, kind: 'SOCKET' | 'SERVER'): TcpHandle {
  const binding = (process as unknown as { binding(name: 'tcp_wrap'): TcpWrap }).binding('tcp_wrap');
  const handle = new binding.TCP(binding.constants[kind]);
  const result = handle.open(fd);
  if (result < 0) throw new SysError(-result, 'uv_tcp_open', `fd ${fd}`);
  return handle;
}

/** A vsock socket, closed again when `use` throws. */
function withSocket<T>(use: (fd: number) => T): T {
  const fd = check(cSocket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0), 'socket', 'AF_VSOCK');
  try {
    return use(fd);
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

/**
 * socket(2) and connect(2). Blocks this thread until the other side has answered: at once from a guest to its host
 * (where nobody listens that is ECONNRESET), at most two seconds (vsock(7), SO_VM_SOCKETS_CONNECT_TIMEOUT) elsewhere.
 *
 * @throws SysError ECONNRESET when nobody listens, ENODEV or EAFNOSUPPORT without vsock
 */
export function connectVsock(cid: number, port: number): Socket {
  return withSocket((fd) => {
    check(cConnect(fd, sockaddrVm(cid, port), SOCKADDR_VM_SIZE), 'connect', `vsock:${cid}:${port}`);
    // `handle` is an option of net.Socket's constructor that the types leave out.
    return new Socket({ handle: wrap(fd, 'SOCKET') } as object);
  });
}

/** A listening vsock socket. */
export interface VsockServer {
  /** Its `connection` events bring the accepted sockets. */
  readonly server: Server;
  /** The port it listens on: the one asked for, or the kernel's choice. */
  readonly port: number;
}

/**
 * socket(2), bind(2), getsockname(2) and listen(2).
 *
 * @param cid the address to listen on, VMADDR_CID_ANY for all
 * @param port VMADDR_PORT_ANY for a free one
 * @param options of Node's server
 * @throws SysError EADDRINUSE, EAFNOSUPPORT without vsock
 */
export function listenVsock(cid: number, port: number, options: ServerOpts = {}): VsockServer {
  return withSocket((fd) => {
    const address = `vsock:${cid}:${port}`;
    check(cBind(fd, sockaddrVm(cid, port), SOCKADDR_VM_SIZE), 'bind', address);
    const bound = readName(cGetsockname, 'getsockname', fd);
    check(cListen(fd, BACKLOG), 'listen', address);
    return { server: createServer(options).listen(wrap(fd, 'SERVER')), port: bound.port };
  });
}

/**
 * getpeername(2) of a connection that a VsockServer accepted: who called.
 *
 * @throws SysError ENOTCONN when the caller is gone, EBADF when the socket is closed
 */
export function peerOfVsock(socket: Socket): VsockAddress {
  return readName(cGetpeername, 'getpeername', fdOfVsock(socket));
}

/** Its descriptor; -1 when it is closed. */
export function fdOfVsock(socket: Socket): number {
  // The handle that Node's stream reads from; its types leave it out.
  const handle = (socket as unknown as { readonly _handle: TcpHandle | null })._handle;
  return handle?.fd ?? -1;
}
