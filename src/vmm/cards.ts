import { randomBytes } from 'node:crypto';
import { closeSync } from 'node:fs';
import { KilnError } from '../errors.ts';
import type { NetworkNamespace } from '../sys/netns.ts';
import { closeTap, deleteTap, openTap, type TapOptions } from '../sys/tap.ts';
import { cardMac, type NetworkCard } from './vmm.ts';

/*
 * A VM has all its network cards from its start, since a template's clones have what the template had, and a card cannot be
 * added to a microvm. Until a container needs it, a card's tap device waits in a network namespace without any way out, the
 * parking namespace, in which the VMM runs, too. Then the tap moves to the container's network namespace; the VMM keeps it by
 * its descriptor.
 */

/** The namespace in which taps wait. */
export type Parking = Pick<NetworkNamespace, 'run'>;

/**
 * New tap devices, one per card. They are open here, too, until they are disposed of: to close the last descriptor of a tap takes
 * long, and the VMM would not end before.
 */
export interface Taps extends Disposable {
  readonly nics: readonly NetworkCard[];
  /** One each, in the order of the cards, for the VMM to inherit. */
  readonly fds: readonly number[];
  /** Leaves a card's tap to the VMM that has inherited it: it is gone when the VMM is. */
  leave(card: number): void;
}

/**
 * Makes taps that live as long as somebody has them open.
 *
 * @throws KilnError failed-precondition where the host has no tap devices
 */
export function makeTaps(parking: Parking, count: number): Taps {
  const nics: NetworkCard[] = [];
  const held = new Set<number>();
  const close = () => {
    held.forEach(closeTap);
    held.clear();
  };
  try {
    // There and back once for all.
    if (count > 0) {
      parking.run(() => {
        for (let index = 0; index < count; index += 1) {
          const { tap, fd } = newTap();
          held.add(fd);
          nics.push({ mac: cardMac(index), tap });
        }
      });
    }
  } catch (error) {
    close();
    throw error;
  }
  const fds = [...held];
  const leave = (card: number) => {
    const fd = fds[card];
    if (fd !== undefined && held.delete(fd)) closeSync(fd);
  };
  return { nics, fds, leave, [Symbol.dispose]: close };
}

/** Taps that a VMM opens by their names. Disposing deletes those that still wait. */
export interface PersistentTaps extends Disposable {
  readonly nics: readonly NetworkCard[];
}

/**
 * Makes taps that live until they are deleted.
 *
 * @param owner the user id that may open them, beside root
 * @throws KilnError failed-precondition where the host has no tap devices
 */
export function makePersistentTaps(parking: Parking, count: number, owner?: number): PersistentTaps {
  const nics: NetworkCard[] = [];
  const remove = () => nics.forEach(({ tap }) => void parking.run(() => deleteTap(tap)));
  try {
    for (let index = 0; index < count; index += 1) {
      const options = { persistent: true, ...(owner === undefined ? {} : { owner }) };
      const { tap, fd } = parking.run(() => newTap(options));
      closeSync(fd);
      nics.push({ mac: cardMac(index), tap });
    }
  } catch (error) {
    remove();
    throw error;
  }
  return { nics, [Symbol.dispose]: remove };
}

/** In the namespace in which this thread is. */
function newTap(options?: TapOptions): { readonly tap: string; readonly fd: number } {
  // At random, so that it is no other VM's, in whatever namespace it is: 14 of the 15 letters that a name can have.
  const tap = `kt${randomBytes(6).toString('hex')}`;
  try {
    return { tap, fd: openTap(tap, options) };
  } catch (cause) {
    throw new KilnError('failed-precondition', `cannot make a tap device: ${(cause as Error).message}`, {
      hint: 'load the kernel module with `modprobe tun`, or set vm.network_cards = 0 in the config file',
      cause,
    });
  }
}
