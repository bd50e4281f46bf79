/**
 * The way between a sandbox's network namespace and its VM. Whoever makes containers' networks (CNI's plugins, mostly) puts
 * interfaces into a namespace and configures them there. For each of them a card of the VM takes its place: the card's tap
 * device is brought into the namespace, everything that arrives at the interface leaves by the tap, and the other way round;
 * the guest takes over MAC, addresses and routes. The interface itself keeps them, for whoever looks.
 *
 * A tap in a sandbox's namespace says by its name which card it belongs to, and by its alias which interface it stands for.
 * So a later kilnd finds out from there.
 */
import { readlinkSync } from 'node:fs';
import { KilnError } from '../errors.ts';
import { NetworkNamespace } from '../sys/netns.ts';
import { deleteLink, type Link, listLinks, setLink } from '../sys/rtnetlink/links.ts';
import { endRedirect, redirect } from '../sys/rtnetlink/redirect.ts';
import { RtnetlinkSocket } from '../sys/rtnetlink/socket.ts';
import { isEthernetOfOthers, tapName } from './classify.ts';
import type { NetworkConfig } from './config.ts';
import { type ConnectedLink, readNetwork } from './read.ts';

/** A network card of a VM, as src/vmm has it. */
export interface Card {
  readonly mac: string;
  /** The tap's name in the namespace where it was made. */
  readonly tap: string;
}

/** The largest MTU of a tap: drivers/net/tun.c, MAX_MTU. */
const largestTapMtu = 65535 - 14;

/** A sandbox's network, as the sandbox sees it. */
export type ConnectedNetwork = Pick<SandboxNetwork, 'connect' | 'told' | typeof Symbol.dispose>;

/** What makes the networks of sandboxes. */
export interface NetworkSource {
  attach(id: string, cards: readonly Card[], path: string): ConnectedNetwork;
  adopt(id: string, cards: readonly Card[], path: string): ConnectedNetwork;
}

export class Networks implements NetworkSource {
  readonly #parking: Pick<NetworkNamespace, 'run'>;

  /** @param parking where taps wait until their VM has a namespace */
  constructor(parking: Pick<NetworkNamespace, 'run'>) {
    this.#parking = parking;
  }

  /**
   * Brings the taps of a VM's cards into a namespace.
   *
   * @param path of the namespace
   * @throws KilnError failed-precondition when another VM is there already; not-found when there is no such namespace;
   *   invalid-argument for the host's own
   */
  attach(id: string, cards: readonly Card[], path: string): SandboxNetwork {
    using stack = new DisposableStack();
    const namespace = stack.use(openNamespace(id, path));
    refuseTheHosts(id, namespace);
    namespace.run(() => {
      using socket = new RtnetlinkSocket();
      if (!listLinks(socket).some(({ name }) => cards.some((_, index) => name === tapName(index)))) return;
      throw new KilnError('failed-precondition', `container ${id}: another container's VM is connected to ${path}`, {
        hint: 'a network namespace belongs to one sandbox; containers of one pod share a VM',
      });
    });
    const network = stack.use(new SandboxNetwork(id, cards, namespace));
    this.#parking.run(() => {
      using socket = new RtnetlinkSocket();
      const links = listLinks(socket);
      for (const [index, { tap }] of cards.entries()) {
        const link = links.find(({ name }) => name === tap);
        if (link === undefined) throw new KilnError('internal', `container ${id}: the VM's tap device ${tap} is gone`);
        setLink(socket, link.index, { name: tapName(index), namespaceFd: namespace.fd });
      }
    });
    stack.move();
    return network;
  }

  /** The network of a VM that an earlier kilnd has attached. @throws KilnError not-found */
  adopt(id: string, cards: readonly Card[], path: string): SandboxNetwork {
    const network = new SandboxNetwork(id, cards, openNamespace(id, path));
    network.recall();
    return network;
  }
}

/** Whose interfaces are the host's own: all that arrives at them would go to the guest. @throws KilnError invalid-argument */
function refuseTheHosts(id: string, { identity }: NetworkNamespace): void {
  if (!['self', '1'].some((process) => identity === identityOf(process))) return;
  const message = `container ${id}: its network namespace is the host's own, which a virtual machine cannot share`;
  throw new KilnError('invalid-argument', message, { hint: 'the spec names it by a path' });
}

/** The namespace of a process; undefined where kilnd may not look, as in a container that is not privileged. */
function identityOf(process: string): string | undefined {
  try {
    return readlinkSync(`/proc/${process}/ns/net`);
  } catch {
    return undefined;
  }
}

/** @throws KilnError not-found */
function openNamespace(id: string, path: string): NetworkNamespace {
  try {
    return NetworkNamespace.open(path);
  } catch (cause) {
    throw new KilnError('not-found', `container ${id}: its network namespace ${path} is gone`, { cause });
  }
}

/** A sandbox's namespace, with the taps of its VM in it. */
export class SandboxNetwork implements Disposable {
  readonly #id: string;
  readonly #cards: readonly Card[];
  /** Held open, since whoever it is named after may end before its VM. */
  readonly #namespace: NetworkNamespace;
  /** What the guest has, as text. */
  #told = '';
  /** The interfaces that are connected, by index: a tap that says so may be gone with its VM. */
  readonly #connected = new Set<number>();
  #disposed = false;

  /** @param namespace is this object's from now on */
  constructor(id: string, cards: readonly Card[], namespace: NetworkNamespace) {
    this.#id = id;
    this.#cards = cards;
    this.#namespace = namespace;
  }

  /**
   * Connects the interfaces that have come since, and says what the guest has to take over, all in all. Undefined when that is
   * nothing, or what it has already.
   *
   * @throws KilnError resource-exhausted when there are more interfaces than cards; internal with the kernel's words
   */
  connect(): NetworkConfig | undefined {
    const config = this.#namespace.run(() => {
      using socket = new RtnetlinkSocket();
      try {
        return readNetwork(socket, this.#connectLinks(socket));
      } catch (cause) {
        if (cause instanceof KilnError) throw cause;
        const message = `container ${this.#id}: cannot connect its network: ${(cause as Error).message}`;
        throw new KilnError('internal', message, { cause });
      }
    });
    return config.interfaces.length === 0 || textOf(config) === this.#told ? undefined : config;
  }

  /** The guest has taken it over. */
  told(config: NetworkConfig): void {
    this.#told = textOf(config);
  }

  /** Finds out what an earlier kilnd has connected. @throws SysError */
  recall(): void {
    this.#namespace.run(() => {
      using socket = new RtnetlinkSocket();
      const links = listLinks(socket);
      for (const tap of this.#taps(links)) {
        const link = standsForOf(tap, links);
        if (link !== undefined) this.#connected.add(link.index);
      }
    });
  }

  /** The tap of each card, where it is there. */
  #taps(links: readonly Link[]): (Link | undefined)[] {
    return this.#cards.map((_, index) => links.find(({ name }) => name === tapName(index)));
  }

  #connectLinks(socket: RtnetlinkSocket): ConnectedLink[] {
    const links = listLinks(socket);
    const interfaces = links.filter(isEthernetOfOthers);
    const taps = this.#taps(links);
    const standsFor = taps.map((tap) => standsForOf(tap, interfaces));
    const fresh = interfaces.filter((link) => !standsFor.includes(link));
    const free = taps.flatMap((tap, card) =>
      tap !== undefined && standsFor[card] === undefined ? [{ tap, card }] : [],
    );
    if (fresh.length > free.length) {
      const names = interfaces.map(({ name }) => name).join(', ');
      throw new KilnError(
        'resource-exhausted',
        `container ${this.#id}: its VM has network cards for ${this.#cards.length} interfaces, but there are ${interfaces.length}: ${names}`,
        { hint: 'vm.network_cards in the config file sets how many a VM has' },
      );
    }
    for (const [position, link] of fresh.entries()) {
      const { tap, card } = free[position] as { tap: Link; card: number };
      this.#connected.add(link.index);
      connectLink(socket, link, tap);
      standsFor[card] = link;
    }
    return standsFor.flatMap((link, card) =>
      link === undefined ? [] : [{ link, cardMac: this.#cards[card]?.mac ?? '' }],
    );
  }

  /** Leaves the interfaces as they were. Safe to call twice. @throws SysError */
  [Symbol.dispose](): void {
    if (this.#disposed) return;
    this.#disposed = true;
    using namespace = this.#namespace;
    namespace.run(() => {
      using socket = new RtnetlinkSocket();
      for (const index of this.#connected) ignoringAbsence(() => endRedirect(socket, index));
      // Those that are not persistent have gone with the VM.
      for (const tap of this.#taps(listLinks(socket))) {
        if (tap !== undefined) ignoringAbsence(() => deleteLink(socket, tap.index));
      }
    });
  }
}

/** All that goes in at one goes out at the other, and is not looked at here. */
function connectLink(socket: RtnetlinkSocket, link: Link, tap: Link): void {
  // What a killed kilnd, or a VM that ended, has left at the interface leads nowhere.
  ignoringAbsence(() => endRedirect(socket, link.index));
  setLink(socket, tap.index, { mtu: Math.min(link.mtu, largestTapMtu), up: true });
  ignoringAbsence(() => endRedirect(socket, tap.index));
  redirect(socket, tap.index, link.index);
  redirect(socket, link.index, tap.index);
  // Last: what has the alias is complete.
  setLink(socket, tap.index, { alias: aliasOf(link.index) });
}

/** The interface whose place a tap takes. */
function standsForOf(tap: Link | undefined, links: readonly Link[]): Link | undefined {
  return links.find(({ index }) => tap?.alias === aliasOf(index));
}

function aliasOf(index: number): string {
  return `kiln:${index}`;
}

/** Does it, be there anything to be undone or not. */
function ignoringAbsence(action: () => void): void {
  try {
    action();
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== 'ENODEV' && code !== 'ENOENT' && code !== 'EINVAL') throw error;
  }
}

function textOf(config: NetworkConfig): string {
  return JSON.stringify(config, (_, value) =>
    value instanceof Uint8Array ? Buffer.from(value).toString('hex') : value,
  );
}
