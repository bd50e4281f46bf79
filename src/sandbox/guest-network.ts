/**
 * A sandbox's network and its guest. What whoever makes the network changes in the namespace, the guest takes over: with each
 * call that begins something, and later whenever the host's kernel says that something has changed.
 */
import { forLog, KilnError } from '../errors.ts';
import type { Guest } from '../guest/guest.ts';
import type { NetworkConfig } from '../network/config.ts';
import type { ConnectedNetwork } from '../network/networks.ts';
import type { Logger } from '../observe/logger.ts';
import { Localhost } from './localhost.ts';
import { Nameservers } from './nameservers.ts';

/** How long after a first change others are waited for, in ms: whoever makes an interface makes several. */
const settleMs = 50;

export interface GuestNetworkOptions {
  readonly network: ConnectedNetwork;
  readonly guest: Pick<
    Guest,
    'setNetwork' | 'watchListeners' | 'relayConnection' | 'serveNameservers' | 'relayQueries'
  >;
  readonly logger: Logger;
}

export class GuestNetwork implements AsyncDisposable {
  readonly #options: GuestNetworkOptions;
  readonly #following = new DisposableStack();
  readonly #nameservers: Nameservers;
  #timer: NodeJS.Timeout | undefined;
  /** Ends one after the other, so that the guest has what was looked at last. */
  #last: Promise<void> = Promise.resolve();
  #problem = '';

  constructor(options: GuestNetworkOptions) {
    this.#options = options;
    this.#nameservers = this.#following.use(new Nameservers(options));
  }

  /**
   * Has the name servers of a container's /etc/resolv.conf that are in the namespace alone be reached from the guest, now and
   * when the file has changed together with the network. Never rejects.
   */
  followNameservers(file: string): Promise<void> {
    return this.#nameservers.follow(file);
  }

  /** Has the guest take over, with what it is asked for, what has changed since it was asked last. */
  async tell<T>(ask: (config: NetworkConfig | undefined) => Promise<T>): Promise<T> {
    const { network } = this.#options;
    const config = await network.connect();
    const answer = await ask(config);
    if (config !== undefined) network.told(config);
    return answer;
  }

  /**
   * From now on until `stop`, has the guest take over what changes, and has localhost of the namespace reach the guest. A second
   * call changes nothing.
   *
   * @param afterMs how long to put that off: what is short does not need it
   */
  follow(afterMs: number): void {
    if (this.#timer !== undefined || this.#following.disposed) return;
    this.#timer = setTimeout(() => this.#begin(), afterMs);
    this.#timer.unref();
  }

  #begin(): void {
    this.#following.use(new Localhost(this.#options));
    try {
      this.#following.use(this.#options.network.watch(() => this.#lookSoon()));
    } catch (error) {
      this.#report(error);
    }
    this.#look();
  }

  #lookSoon(): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#look(), settleMs);
    this.#timer.unref();
  }

  #look(): void {
    const look = async () => {
      if (this.#following.disposed) return;
      const { guest } = this.#options;
      try {
        await this.tell(async (config) => {
          if (config !== undefined) await guest.setNetwork(config);
        });
        this.#problem = '';
      } catch (error) {
        this.#report(error);
      }
      await this.#nameservers.look();
    };
    this.#last = this.#last.then(look);
  }

  /** Once for each problem: the next change may show the same again. */
  #report(error: unknown): void {
    const { message, code } = KilnError.from(error);
    if (code === 'unavailable' || message === this.#problem) return;
    this.#problem = message;
    this.#options.logger.warn({ err: forLog(error) }, 'the guest has not taken over what has changed in its network');
  }

  /** Nothing of localhost is left in the namespace, and nothing is looked at any more. Safe to call twice. */
  stop(): void {
    clearTimeout(this.#timer);
    this.#following.dispose();
  }

  /** Leaves the namespace as it was; to be called when the VM has ended. @throws SysError */
  async [Symbol.asyncDispose](): Promise<void> {
    this.stop();
    await this.#options.network[Symbol.asyncDispose]();
  }
}
