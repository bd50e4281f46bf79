import { closeSync, openSync, readSync } from 'node:fs';
import { ARPHRD_ETHER, type Link } from '../sys/rtnetlink/links.ts';

/** The name of the tap of a VM's nth card in its sandbox's namespace. */
export function tapName(card: number): string {
  return `kiln-tap${card}`;
}

/** Kernels with these built in give every new namespace an interface of each, which is down. */
const fallbacks = /^(gretap0|erspan0|ip6gretap0|ip6erspan0)$/;

/** An interface that somebody has put into a sandbox's namespace, for a card of the VM to take its place. */
export function isEthernetOfOthers({ name, type, loopback }: Link): boolean {
  return type === ARPHRD_ETHER && !loopback && !name.startsWith('kiln-tap') && !fallbacks.test(name);
}

/** Of the network namespace of the thread that reads it: proc_pid_net(5). Two lines of headings, then one for each interface. */
const interfaces = '/proc/thread-self/net/dev';
const headings = 2;

/** Whether this thread's namespace has no interface but its own loopback, as it has at first. Asking rtnetlink costs twice as much. */
export function loopbackIsAlone(): boolean {
  const fd = openSync(interfaces, 'r');
  try {
    const bytes = Buffer.allocUnsafe(4096);
    const lines = bytes.toString('latin1', 0, readSync(fd, bytes)).trimEnd().split('\n');
    return lines.length === headings + 1 && /^ *lo:/.test(lines[headings] ?? '');
  } finally {
    closeSync(fd);
  }
}
