/** Which name servers at loopback addresses a container's /etc/resolv.conf names: resolv.conf(5). */
import { closeSync, fstatSync, openSync, readSync, realpathSync } from 'node:fs';
import { BlockList, isIPv4, isIPv6 } from 'node:net';
import { O_PATH } from '../sys/openat2.ts';

/** As many as a resolver looks at: MAXNS of resolv.h. */
const maxNameservers = 3;

/** The container may write to the file, and as much as it likes. */
const maxBytes = 65_536;

/** Of open(2), asm-generic/fcntl.h. */
const O_NOFOLLOW = 0o400000;

const loopback = new BlockList();
loopback.addSubnet('127.0.0.0', 8, 'ipv4');
loopback.addAddress('::1', 'ipv6');

/** Those that the file names now; none of one that is gone, or is no regular file. */
export function readLoopbackNameservers(file: string): string[] {
  try {
    return loopbackNameservers(readFile(realpathSync(file)));
  } catch {
    return [];
  }
}

/** As dotted quads, or "::1". */
export function loopbackNameservers(text: string): string[] {
  const words = text.split('\n').map((line) => /^nameserver[ \t]+(\S+)/.exec(line)?.[1]);
  const named = words.filter((word) => word !== undefined).slice(0, maxNameservers);
  return [...new Set(named.flatMap(ifLoopback))];
}

function ifLoopback(address: string): string[] {
  if (isIPv4(address)) return loopback.check(address, 'ipv4') ? [address] : [];
  return isIPv6(address) && loopback.check(address, 'ipv6') ? ['::1'] : [];
}

/** Looks what the file is before it is opened: by that alone a device may begin something. @throws a system error */
function readFile(path: string): string {
  const place = openSync(path, O_PATH | O_NOFOLLOW);
  try {
    if (!fstatSync(place).isFile()) return '';
    const file = openSync(`/proc/self/fd/${place}`, 'r');
    try {
      const bytes = Buffer.alloc(maxBytes);
      return bytes.toString('latin1', 0, readSync(file, bytes, 0, maxBytes, 0));
    } finally {
      closeSync(file);
    }
  } finally {
    closeSync(place);
  }
}
