/** The kernel's random number generator and OpenSSL's in this process, random(4) and RAND_add(3). */
import { closeSync, openSync } from 'node:fs';
import koffi from 'koffi';
import { check, declare } from './libc.ts';

/** Requests of ioctl(2) on /dev/random, linux/random.h. */
const RNDADDENTROPY = 0x40085203n;
const RNDRESEEDCRNG = 0x5207n;

/** struct rand_pool_info before its bytes: how many bits of entropy they hold, and how many bytes they are. */
const poolInfoHead = 8;

/** getrandom(2) gives at most so much in one piece when a signal comes. */
const maxUninterrupted = 256;

const cIoctl = declare<[fd: number, request: bigint, argument: NodeJS.ArrayBufferView | null]>(
  'int ioctl(int fd, unsigned long request, void *argument)',
);
const cGetrandom = declare<[buffer: Buffer, length: number, flags: number]>(
  'int getrandom(void *buffer, size_t length, unsigned int flags)',
);

/**
 * Mixes bytes that nobody else knows into the kernel's generator, counted as full entropy, and seeds it again from its
 * pool at once: else what it gives would follow from its old state for some time.
 *
 * @throws SysError EPERM without CAP_SYS_ADMIN
 */
export function reseedKernel(entropy: Uint8Array): void {
  const info = Buffer.alloc(poolInfoHead + entropy.length);
  info.writeInt32LE(entropy.length * 8, 0);
  info.writeInt32LE(entropy.length, 4);
  info.set(entropy, poolInfoHead);
  const fd = openSync('/dev/random', 'r');
  try {
    check(cIoctl(fd, RNDADDENTROPY, info), 'ioctl', 'RNDADDENTROPY');
    check(cIoctl(fd, RNDRESEEDCRNG, null), 'ioctl', 'RNDRESEEDCRNG');
  } finally {
    closeSync(fd);
  }
}

/**
 * Seeds the generator that node:crypto uses from the kernel's, and mixes bytes into it besides. Those that it serves
 * (one for keys, one for all else) notice that at their next use.
 */
export function reseedOpenssl(entropy: Uint8Array): void {
  // Node exports its OpenSSL to the addons that it loads.
  const node = koffi.load(null);
  if (node.func('int RAND_poll()')() !== 1) throw new Error('RAND_poll: OpenSSL cannot seed its generator');
  node.func('void RAND_add(const void *bytes, int length, double entropy)')(entropy, entropy.length, entropy.length);
}

/** getrandom(2). @param length at most 256 bytes. @throws SysError */
export function getrandom(length: number): Buffer {
  if (length > maxUninterrupted) throw new RangeError(`getrandom: ${length} bytes are more than ${maxUninterrupted}`);
  const bytes = Buffer.alloc(length);
  check(cGetrandom(bytes, length, 0), 'getrandom');
  return bytes;
}
