/**
 * Name servers at loopback addresses of a sandbox's network namespace, as Docker's is at 127.0.0.11 of networks of one's own.
 * For the guest's programs these addresses are the guest's own. So where a container's /etc/resolv.conf names one, the guest
 * takes its programs' queries for it, and kilnd sends them from sockets in the namespace.
 */
import { forLog, KilnError } from '../errors.ts';
import type { Guest } from '../guest/guest.ts';
import { TimeLimit } from '../host/time-limit.ts';
import type { NameAnswer, NameQuery } from '../network/ask.ts';
import type { ConnectedNetwork } from '../network/networks.ts';
import { readLoopbackNameservers } from '../network/resolv-conf.ts';
import type { Logger } from '../observe/logger.ts';

/** How long an answer may take, in ms; whoever asks has asked again by then. */
const answerLimitMs = 10_000;

/** The most name servers of a sandbox: its containers may write what they like to their files. */
const maxNameservers = 16;

export interface NameserversOptions {
  readonly guest: Pick<Guest, 'serveNameservers' | 'relayQueries'>;
  readonly network: Pick<ConnectedNetwork, 'ask' | 'admitAnswers'>;
  readonly logger: Logger;
}

export class Nameservers implements Disposable {
  readonly #options: NameserversOptions;
  /** The files of its containers. */
  readonly #files = new Set<string>();
  /** What the guest was asked to serve, as `readLoopbackNameservers` has it. */
  readonly #served = new Set<string>();
  readonly #disposed = new AbortController();
  #relaying = false;
  #last: Promise<void> = Promise.resolve();

  constructor(options: NameserversOptions) {
    this.#options = options;
  }

  /** Takes a container's /etc/resolv.conf into account from now on. Resolves as `look`. */
  follow(file: string): Promise<void> {
    this.#files.add(file);
    return this.look();
  }

  /** Resolves when the guest serves all that the files name now; where it cannot, that is logged. Never rejects. */
  look(): Promise<void> {
    this.#last = this.#last.then(() => this.#look());
    return this.#last;
  }

  async #look(): Promise<void> {
    const { guest, network, logger } = this.#options;
    const named = new Set([...this.#files].flatMap(readLoopbackNameservers));
    const fresh = [...named]
      .filter((address) => !this.#served.has(address))
      .slice(0, maxNameservers - this.#served.size);
    if (fresh.length === 0 || this.#disposed.signal.aborted) return;
    for (const address of fresh) this.#served.add(address);
    if (!this.#relaying) void this.#relay();
    try {
      network.admitAnswers();
    } catch (error) {
      logger.warn({ err: forLog(error) }, 'name servers in the network namespace cannot ask others');
    }
    try {
      await guest.serveNameservers(fresh);
    } catch (error) {
      if (isLost(error)) return;
      logger.warn({ err: forLog(error), nameservers: fresh }, 'the guest does not reach its name servers');
    }
  }

  async #relay(): Promise<void> {
    const { guest, logger } = this.#options;
    const { signal } = this.#disposed;
    this.#relaying = true;
    try {
      await guest.relayQueries((query) => this.#ask(query), signal);
    } catch (error) {
      if (!isLost(error)) logger.warn({ err: forLog(error) }, 'the guest does not reach its name servers any more');
    }
  }

  /** The guest may name any server, but reaches only those that it was asked to serve. */
  async #ask(query: NameQuery): Promise<NameAnswer> {
    if (!this.#served.has(query.nameserver)) return 'none';
    using limit = new TimeLimit(answerLimitMs, this.#disposed.signal);
    try {
      return await this.#options.network.ask(query, limit.signal);
    } catch (error) {
      this.#options.logger.debug({ err: forLog(error) }, 'cannot ask a name server');
      return 'refused';
    }
  }

  /** Nothing of it is left in the namespace. Safe to call twice. */
  [Symbol.dispose](): void {
    this.#disposed.abort();
  }
}

function isLost(error: unknown): boolean {
  return error instanceof KilnError && error.code === 'unavailable';
}
