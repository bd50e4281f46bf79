/** How a tap is tied to the interface whose place it takes: by the kernel's redirects, and by an alias that says so. */
import { type Link, setLink } from '../sys/rtnetlink/links.ts';
import { endRedirect, redirect } from '../sys/rtnetlink/redirect.ts';
import type { RtnetlinkSocket } from '../sys/rtnetlink/socket.ts';

/** The largest MTU of a tap: drivers/net/tun.c, MAX_MTU. */
const largestTapMtu = 65535 - 14;

/** All that goes in at one goes out at the other, and is not looked at here. */
export function connectLink(socket: RtnetlinkSocket, link: Link, tap: Link): void {
  // What a killed kilnd, or a VM that ended, has left at the interface leads nowhere.
  ignoringAbsence(() => endRedirect(socket, link.index));
  setLink(socket, tap.index, { mtu: tapMtuFor(link), up: true });
  ignoringAbsence(() => endRedirect(socket, tap.index));
  redirect(socket, tap.index, link.index);
  redirect(socket, link.index, tap.index);
  // Last: what has the alias is complete.
  setLink(socket, tap.index, { alias: aliasOf(link.index) });
}

export function tapMtuFor(link: Link): number;
export function tapMtuFor(link: Link | undefined): number | undefined;
export function tapMtuFor(link: Link | undefined): number | undefined {
  return link && Math.min(link.mtu, largestTapMtu);
}

/** The interface whose place a tap takes. */
export function standsForOf(tap: Link | undefined, links: readonly Link[]): Link | undefined {
  return links.find(({ index }) => tap?.alias === aliasOf(index));
}

function aliasOf(index: number): string {
  return `kiln:${index}`;
}

/** Does it, be there anything to be undone or not. */
export function ignoringAbsence(action: () => void): void {
  try {
    action();
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== 'ENODEV' && code !== 'ENOENT' && code !== 'EINVAL') throw error;
  }
}
