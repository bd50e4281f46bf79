/**
 * Tap devices: Documentation/networking/tuntap.rst of Linux. A tap is a network interface whose other end is a descriptor:
 * what the host sends to the interface is read there, one Ethernet frame at a time, and what is written there arrives at the
 * interface. Before each frame goes a struct virtio_net_hdr (IFF_VNET_HDR), which tells of checksums and segments that are
 * still to be made: VMMs hand it through from and to their guests.
 *
 * The interface lives as long as the descriptor, unless it is persistent. It can be moved to another network namespace
 * meanwhile; the descriptor goes on. To take it away, the kernel waits until no CPU can be at it any more, some 15 ms
 * (netdev_run_todo, net/core/dev.c), in whoever closes the last descriptor.
 */
import { close, closeSync, constants, openSync } from 'node:fs';
import { check, declare } from './libc.ts';

const device = '/dev/net/tun';

/** linux/if_tun.h. */
const IFF_TAP = 0x0002;
const IFF_NO_PI = 0x1000;
const IFF_VNET_HDR = 0x4000;
const TUNSETIFF = 0x400454ca;
const TUNSETPERSIST = 0x400454cb;
const TUNSETOWNER = 0x400454cc;

/** struct ifreq, netdevice(7): a name of at most 15 bytes, and here flags. */
const IFREQ_SIZE = 40;
const IFNAMSIZ = 16;

const cIoctlRequest = declare<[fd: number, op: number, request: Uint8Array]>(
  'int ioctl(int fd, unsigned long op, uint8_t *request)',
);
const cIoctlNumber = declare<[fd: number, op: number, value: number]>(
  'int ioctl(int fd, unsigned long op, unsigned long value)',
);

export interface TapOptions {
  /** It stays when the descriptor is closed, until it is deleted. */
  readonly persistent?: boolean;
  /** A user id that may open it, too, beside those with CAP_NET_ADMIN. */
  readonly owner?: number;
}

/**
 * Makes a tap device in the network namespace of this thread, or opens a persistent one there. It is down.
 *
 * @param name at most 15 bytes
 * @returns a non-blocking, close-on-exec descriptor; the caller closes it
 * @throws SysError EBUSY for a name in use, EPERM, EINVAL for a bad name; a system error without /dev/net/tun
 */
export function openTap(name: string, { persistent = false, owner }: TapOptions = {}): number {
  const bytes = Buffer.from(name);
  if (bytes.length === 0 || bytes.length >= IFNAMSIZ) throw new RangeError(`"${name}" is no interface's name`);
  const request = Buffer.alloc(IFREQ_SIZE);
  request.set(bytes);
  request.writeUInt16LE(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, IFNAMSIZ);
  const fd = openSync(device, constants.O_RDWR | constants.O_NONBLOCK);
  try {
    check(cIoctlRequest(fd, TUNSETIFF, request), 'TUNSETIFF', name);
    if (owner !== undefined) check(cIoctlNumber(fd, TUNSETOWNER, owner), 'TUNSETOWNER', name);
    if (persistent) check(cIoctlNumber(fd, TUNSETPERSIST, 1), 'TUNSETPERSIST', name);
    return fd;
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

/**
 * Deletes a persistent tap device in the network namespace of this thread, as soon as nobody has it open. It is gone a little
 * later, as with `closeTap`.
 *
 * @throws SysError; a device that is not there is made, and gone again
 */
export function deleteTap(name: string): void {
  const fd = openTap(name);
  try {
    check(cIoctlNumber(fd, TUNSETPERSIST, 0), 'TUNSETPERSIST', name);
  } finally {
    closeTap(fd);
  }
}

/** Of libuv's four threads; the others have files to read and write meanwhile. */
const closersAtMost = 2;
const toClose: number[] = [];
let closers = 0;

/** Closes a tap's descriptor on another thread, so that nobody waits while the interface goes. */
export function closeTap(fd: number): void {
  toClose.push(fd);
  if (closers === closersAtMost) return;
  closers += 1;
  closeNext();
}

function closeNext(): void {
  const fd = toClose.shift();
  if (fd === undefined) closers -= 1;
  else close(fd, closeNext);
}
