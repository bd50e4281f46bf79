/**
 * The way between a sandbox's network namespace and its VM. Whoever makes containers' networks (CNI's plugins, mostly) puts
 * interfaces into a namespace and configures them there. For each of them a card of the VM takes its place: the card's tap
 * device is brought into the namespace, everything that arrives at the interface leaves by the tap, and the other way round;
 * the guest takes over MAC, addresses and routes. The interface itself keeps them, for whoever looks.
 *
 * A tap comes only when there is an interface for it, since moving one takes the kernel some 20 ms, in which it changes no other
 * interface. Until then it waits in the namespace of the VMM. In the sandbox's namespace it says by its name which card it belongs
 * to, and by its alias which interface it stands for. So a later kilnd finds out from there.
 */
import { readlinkSync, writeFileSync } from 'node:fs';
import { isIPv6 } from 'node:net';
import { KilnError } from '../errors.ts';
import { Turns } from '../host/turns.ts';
import { bindLoopback, type LoopbackFamily, openSocket } from '../sys/loopback.ts';
import { NetworkNamespace } from '../sys/netns.ts';
import { deleteLink, type Link, listLinks, moveLink, setLink } from '../sys/rtnetlink/links.ts';
import { openNetworkMonitor, watchNetwork } from '../sys/rtnetlink/monitor.ts';
import { admitAnswers, askingPorts, endRedirect } from '../sys/rtnetlink/redirect.ts';
import { RtnetlinkSocket } from '../sys/rtnetlink/socket.ts';
import { ask, type NameAnswer, type NameQuery } from './ask.ts';
import { isEthernetOfOthers, loopbackIsAlone, tapName } from './classify.ts';
import type { NetworkConfig } from './config.ts';
import { readNetwork } from './read.ts';
import { connectLink, ignoringAbsence, standsForOf, tapMtuFor } from './tie.ts';

/** A network card of a VM, as src/vmm has it. */
export interface Card {
  readonly mac: string;
  /** The tap's name in the namespace where it was made. */
  readonly tap: string;
}

/** What of a VM is connected: src/vmm's `Vm` is one. */
export interface NetworkedVm {
  /** The VMM's, in whose network namespace taps wait. */
  readonly pid: number;
  readonly nics: readonly Card[];
  /** A card's tap is in the sandbox's namespace now. */
  cardMoved(card: number): void;
}

/** What a guest has that an earlier kilnd has told it. */
const unknown = 'unknown';

/** Of the network namespace of the thread that writes to it: ip(7). */
const localPortRange = '/proc/sys/net/ipv4/ip_local_port_range';

/** A sandbox's network, as the sandbox sees it. */
export type ConnectedNetwork = Pick<
  SandboxNetwork,
  'connect' | 'told' | 'watch' | 'bindLoopback' | 'ask' | 'admitAnswers' | typeof Symbol.asyncDispose
>;

/** What makes the networks of sandboxes. */
export interface NetworkSource {
  /** @throws KilnError not-found when there is no such namespace; invalid-argument for the host's own */
  attach(id: string, vm: NetworkedVm, path: string): ConnectedNetwork;
  /** The network of a VM that an earlier kilnd has attached. @throws KilnError not-found */
  adopt(id: string, vm: NetworkedVm, path: string): ConnectedNetwork;
}

export const networks: NetworkSource = {
  attach(id, vm, path) {
    using stack = new DisposableStack();
    const namespace = stack.use(openNamespace(id, path));
    refuseTheHosts(id, namespace);
    stack.move();
    return new SandboxNetwork(id, vm, namespace);
  },
  adopt(id, vm, path) {
    using stack = new DisposableStack();
    const network = new SandboxNetwork(id, vm, stack.use(openNamespace(id, path)));
    network.recall();
    stack.move();
    return network;
  },
};

/** Those of kilnd and of the host's first process, which stay where they are. */
let ofHost: ReadonlySet<string | undefined> | undefined;

/** Whose interfaces are the host's own: all that arrives at them would go to the guest. @throws KilnError invalid-argument */
function refuseTheHosts(id: string, { identity }: NetworkNamespace): void {
  ofHost ??= new Set(['self', '1'].map(identityOf));
  if (!ofHost.has(identity)) return;
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

/** Taps move one after the other: the kernel lets no two at once, and each would keep one of libuv's four threads waiting. */
const moves = new Turns();

/** What `#look` has found. */
interface Seen {
  /** The cards that interfaces wait for, whose taps are not there yet. */
  readonly missing: readonly number[];
  /** Undefined also when there is nothing for the guest. */
  readonly config?: NetworkConfig;
}

/** A sandbox's namespace, with the taps of its VM in it. */
export class SandboxNetwork implements AsyncDisposable {
  readonly #id: string;
  readonly #vm: NetworkedVm;
  /** Held open, since whoever it is named after may end before its VM. */
  readonly #namespace: NetworkNamespace;
  /** What the guest has, as text; empty for nothing. */
  #told = '';
  /** The interfaces that are connected, by index: a tap that says so may be gone with its VM. */
  readonly #connected = new Set<number>();
  /** The cards whose taps are in the namespace, by their places. */
  readonly #moved = new Set<number>();
  /** See `admitAnswers`. */
  #admitsAnswers = false;
  /** Of `connect`, and of the end. */
  readonly #turns = new Turns();
  #disposed = false;

  /** @param namespace is this object's from now on */
  constructor(id: string, vm: NetworkedVm, namespace: NetworkNamespace) {
    this.#id = id;
    this.#vm = vm;
    this.#namespace = namespace;
  }

  /**
   * Connects the interfaces that have come since, and says what the guest has to take over, all in all. Undefined when that is
   * nothing, or what it has already.
   *
   * @throws KilnError resource-exhausted when there are more interfaces than cards; unavailable when the network is disposed of;
   *   internal with the kernel's words
   */
  connect(): Promise<NetworkConfig | undefined> {
    return this.#turns.take('', () => this.#connect());
  }

  async #connect(): Promise<NetworkConfig | undefined> {
    let seen = this.#look();
    // Afterwards there may be others.
    for (; seen.missing.length > 0; seen = this.#look()) {
      for (const card of seen.missing) await moves.take('', () => this.#bring(card));
    }
    const { config } = seen;
    const hasNothing = config?.interfaces.length === 0 && this.#told === '';
    return config === undefined || hasNothing || textOf(config) === this.#told ? undefined : config;
  }

  #look(): Seen {
    if (this.#disposed) throw new KilnError('unavailable', `container ${this.#id}: its network has ended`);
    return this.#namespace.run(() => {
      if (this.#told === '' && loopbackIsAlone()) return { missing: [] };
      using socket = new RtnetlinkSocket();
      try {
        return this.#connectLinks(socket);
      } catch (cause) {
        throw this.#failure(cause);
      }
    });
  }

  #failure(cause: unknown): KilnError {
    if (cause instanceof KilnError) return cause;
    const message = `container ${this.#id}: cannot connect its network: ${(cause as Error).message}`;
    return new KilnError('internal', message, { cause });
  }

  /** The guest has taken it over. */
  told(config: NetworkConfig): void {
    this.#told = config.interfaces.length === 0 ? '' : textOf(config);
  }

  /** Calls `onChange` whenever something may have changed in the namespace, until disposed. @throws SysError */
  watch(onChange: () => void): Disposable {
    let current = this.#monitor(onChange, () => again());
    const again = () => {
      current[Symbol.dispose]();
      current = this.#monitor(onChange, again);
      onChange();
    };
    return { [Symbol.dispose]: () => current[Symbol.dispose]() };
  }

  #monitor(onChange: () => void, onLost: () => void): Disposable {
    return watchNetwork(this.#namespace.run(openNetworkMonitor), onChange, onLost);
  }

  /** As `bindLoopback` of sys/loopback.ts, in the sandbox's namespace. @throws SysError */
  bindLoopback(family: LoopbackFamily, port: number): number {
    return this.#namespace.run(() => bindLoopback(family, port));
  }

  /** As `ask` of ask.ts, in the sandbox's namespace. Rejects with SysError where it has no such socket. */
  async ask(query: NameQuery, signal: AbortSignal): Promise<NameAnswer> {
    const family = isIPv6(query.nameserver) ? 'ipv6' : 'ipv4';
    return ask(
      this.#namespace.run(() => openSocket(family, query.transport)),
      query,
      signal,
    );
  }

  /**
   * From now on programs of the host in the namespace can ask name servers outside, as Docker's resolver does: what arrives at
   * the interfaces goes to the guest, but for answers to ports that the namespace's own network stack has then.
   *
   * @throws SysError
   */
  admitAnswers(): void {
    if (this.#admitsAnswers) return;
    this.#admitsAnswers = true;
    this.#namespace.run(() => {
      writeFileSync(localPortRange, `${askingPorts.first} ${askingPorts.last}`);
      using socket = new RtnetlinkSocket();
      const links = listLinks(socket);
      for (const tap of this.#taps(links)) {
        const link = standsForOf(tap, links);
        if (tap !== undefined && link !== undefined) admitAnswers(socket, link.index, tap.index);
      }
    });
  }

  /** Finds out what an earlier kilnd has connected. @throws SysError */
  recall(): void {
    this.#namespace.run(() => {
      using socket = new RtnetlinkSocket();
      const links = listLinks(socket);
      for (const [card, tap] of this.#taps(links).entries()) {
        if (tap === undefined) continue;
        this.#moved.add(card);
        const link = standsForOf(tap, links);
        if (link !== undefined) this.#connected.add(link.index);
      }
      // Whatever it was: the guest is told again.
      this.#told = unknown;
    });
  }

  /** The tap of each card, where it is there. */
  #taps(links: readonly Link[]): (Link | undefined)[] {
    return this.#vm.nics.map((_, card) => links.find(({ name }) => name === tapName(card)));
  }

  /** Connects the interfaces, if the taps for all of them are there, and reads what is configured. */
  #connectLinks(socket: RtnetlinkSocket): Seen {
    const { nics } = this.#vm;
    const links = listLinks(socket);
    const taps = this.#removeAbandoned(socket, this.#taps(links));
    this.#refuseSecondVm(taps);
    const interfaces = links.filter(isEthernetOfOthers);
    const standsFor = taps.map((tap) => standsForOf(tap, interfaces));
    const fresh = interfaces.filter((link) => !standsFor.includes(link));
    const free = [...nics.keys()].filter((card) => standsFor[card] === undefined);
    if (fresh.length > free.length) {
      const names = interfaces.map(({ name }) => name).join(', ');
      throw new KilnError(
        'resource-exhausted',
        `container ${this.#id}: its VM has network cards for ${nics.length} interfaces, but there are ${interfaces.length}: ${names}`,
        { hint: 'vm.network_cards in the config file sets how many a VM has' },
      );
    }
    const chosen = free.slice(0, fresh.length);
    const missing = chosen.filter((card) => !this.#moved.has(card));
    if (missing.length > 0) return { missing };
    for (const [card, tap] of taps.entries()) {
      const mtu = tapMtuFor(standsFor[card]);
      if (tap !== undefined && mtu !== undefined && tap.mtu !== mtu) setLink(socket, tap.index, { mtu });
    }
    for (const [position, link] of fresh.entries()) {
      const card = chosen[position] as number;
      const tap = taps[card];
      if (tap === undefined) throw new KilnError('internal', `container ${this.#id}: ${tapName(card)} is gone`);
      this.#connected.add(link.index);
      connectLink(socket, link, tap);
      if (this.#admitsAnswers) admitAnswers(socket, link.index, tap.index);
      standsFor[card] = link;
    }
    const connected = standsFor.flatMap((link, card) => {
      return link === undefined ? [] : [{ link, cardMac: nics[card]?.mac ?? '' }];
    });
    return { missing, config: readNetwork(this.#id, socket, connected) };
  }

  /** A persistent tap outlives its VM where kilnd was killed while it made the container, or the VM ended without kilnd. */
  #removeAbandoned(socket: RtnetlinkSocket, taps: readonly (Link | undefined)[]): (Link | undefined)[] {
    return taps.map((tap, card) => {
      if (tap === undefined || tap.carrier || this.#moved.has(card)) return tap;
      ignoringAbsence(() => deleteLink(socket, tap.index));
      return undefined;
    });
  }

  #refuseSecondVm(taps: readonly (Link | undefined)[]): void {
    if (!taps.some((tap, card) => tap !== undefined && !this.#moved.has(card))) return;
    const message = `container ${this.#id}: another container's VM is connected to its network namespace`;
    throw new KilnError('failed-precondition', message, {
      hint: 'a network namespace belongs to one sandbox; containers of one pod share a VM',
    });
  }

  /** Brings a card's tap into the sandbox's namespace. */
  async #bring(card: number): Promise<void> {
    // While it waited for its turn.
    if (this.#disposed) return;
    const { pid, nics } = this.#vm;
    using waiting = openNamespace(this.#id, `/proc/${pid}/ns/net`);
    try {
      using there = waiting.run(() => new RtnetlinkSocket());
      const link = listLinks(there).find(({ name }) => name === nics[card]?.tap);
      if (link === undefined) throw new KilnError('internal', `container ${this.#id}: a tap device of its VM is gone`);
      await moveLink(there, link.index, tapName(card), this.#namespace.fd);
    } catch (cause) {
      throw this.#failure(cause);
    }
    this.#moved.add(card);
    this.#vm.cardMoved(card);
  }

  /** Leaves the interfaces as they were. Safe to call twice. @throws SysError */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#disposed) return;
    this.#disposed = true;
    // A tap that is on its way arrives.
    await this.#turns.take('', async () => this.#leave());
  }

  #leave(): void {
    using namespace = this.#namespace;
    // Without a tap that was brought there, nothing was connected.
    if (this.#moved.size === 0) return;
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

function textOf(config: NetworkConfig): string {
  return JSON.stringify(config, (_, value) =>
    value instanceof Uint8Array ? Buffer.from(value).toString('hex') : value,
  );
}
