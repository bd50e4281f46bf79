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
